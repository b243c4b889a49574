"""The model agrees with transformers, and its cached forward with its own whole forward."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3_ROPE, save_reference, tiny_reference

from fourfold.errors import FourfoldError
from fourfold.modeling.checkpoint import check_device, check_fp8, load_transformer
from fourfold.modeling.kv_cache import KVCache

VARIANTS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-one-kv-head": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_agree_with_transformers(variant: str, tmp_path: Path) -> None:
    architecture, changes = VARIANTS[variant]
    reference = tiny_reference(architecture, **changes)
    model = load_transformer(save_reference(reference, tmp_path), "cpu")
    tokens = torch.randint(0, 320, (3, 130), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(tokens).logits
    torch.testing.assert_close(model.logits(model.hidden_states(tokens)), expected, rtol=2e-4, atol=2e-4)


def test_old_and_new_rope_layouts_read_the_same(tmp_path: Path) -> None:
    save_reference(tiny_reference("llama", rope_parameters=LLAMA3_ROPE), tmp_path)
    new = load_transformer(tmp_path, "cpu").config
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope
    path.write_text(json.dumps(values))
    assert load_transformer(tmp_path, "cpu").config == new


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [17, 3, 1, 4, 15]])
def test_cached_forward_equals_whole_forward(chunks: list[int], tmp_path: Path) -> None:
    model = load_transformer(save_reference(tiny_reference(), tmp_path), "cpu")
    tokens = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(2))
    cache = KVCache.allocate(model.config, 3, 64, model.device, model.dtype)
    parts, start = [], 0
    for size in chunks:
        positions = torch.arange(start, start + size).expand(2, -1)
        parts.append(model.forward(tokens[:, start : start + size], positions, cache.slots(0, 2), start + size))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden_states(tokens), rtol=1e-4, atol=1e-4)
    assert not cache.data[:, 2].any(), "a slot that was not in the batch was written"


def test_a_token_has_the_same_bits_alone_and_in_a_batch(tmp_path: Path) -> None:
    """What makes speculation exact on a CPU: no result depends on what is computed beside it."""
    model = load_transformer(save_reference(tiny_reference(), tmp_path), "cpu")
    tokens = torch.randint(0, 320, (4, 30), generator=torch.Generator().manual_seed(3))

    def decode(batch: list[int], sizes: list[int]) -> torch.Tensor:
        cache = KVCache.allocate(model.config, len(batch), 64, model.device, model.dtype)
        prompt = torch.arange(10).expand(1, -1)
        for slot, row in enumerate(batch):
            model.forward(tokens[row : row + 1, :10], prompt, cache.slots(slot, slot + 1), 10)
        parts, start = [], 10
        for size in sizes:
            positions = torch.arange(start, start + size).expand(len(batch), -1)
            parts.append(model.forward(tokens[batch, start : start + size], positions, cache, start + size))
            start += size
        return model.logits(torch.cat(parts, 1))

    alone = decode([2], [1] * 20)[0]
    for batch, sizes in (([2, 0], [1] * 20), ([0, 1, 2, 3], [4] * 5), ([3, 2], [8, 2, 1, 5, 4]), ([2], [20])):
        assert torch.equal(decode(batch, sizes)[batch.index(2)], alone), (batch, sizes)


def test_broken_checkpoints_are_refused(tmp_path: Path) -> None:
    save_reference(tiny_reference(), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(FourfoldError, match=f"{name} is missing"):
        load_transformer(tmp_path, "cpu")
    save_file({**tensors, name: tensors[name].t().contiguous()}, file)
    with pytest.raises(FourfoldError, match=r"layers.1.down.weight is \(96, 64\), expected \(64, 96\)"):
        load_transformer(tmp_path, "cpu")
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(FourfoldError, match=r"weight_scale is missing|several dtypes"):
        load_transformer(tmp_path, "cpu")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["MistralForCausalLM"], "MistralForCausalLM is not supported"),
        ("hidden_act", "gelu", "gelu is not supported"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "rope type yarn is not supported"),
    ],
)
def test_unsupported_models_are_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    save_reference(tiny_reference(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(FourfoldError, match=message):
        load_transformer(tmp_path, "cpu")


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for capability, fits in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for precision in ("bf16", "int8_wo"):
            check_device(gpu, precision)
        check_device(cpu, "fp8")
        if fits:
            check_device(gpu, "fp8")
        else:
            with pytest.raises(FourfoldError, match=r"NVIDIA A100 has 8\.\d; use precision int8_wo or bf16"):
                check_device(gpu, "fp8")
            with pytest.raises(FourfoldError, match=r"^kv_cache_dtype fp8 needs .* has 8\.\d; set it to auto$"):
                check_fp8(gpu, "kv_cache_dtype fp8", "set it to auto")
