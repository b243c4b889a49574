"""The other Triton kernels of a decoding step against their references: on a GPU, or through Triton's interpreter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DEVICE, HALF, chain, packed_rows, randn, random_trees
from tiny_models import save_reference, tiny_reference

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")


from fourfold.modeling.checkpoint import load_transformer
from fourfold.modeling.decode import decode_forward
from fourfold.modeling.keep_path import keep_path
from fourfold.modeling.kernels import add_norm, merge_heads, rope_write, round_rows, silu_mul
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import quantize_e4m3
from fourfold.modeling.norm import RmsNorm
from fourfold.modeling.rope import apply_rope, rope_tables
from fourfold.modeling.transformer import Transformer


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_add_norm(delta: bool, dtype: Any) -> None:
    x, weight = randn(5, 576, dtype=dtype) * 3, randn(576, dtype=dtype)
    added = randn(3, 5, 576) if delta else None
    total = x if added is None else x + added.sum(0).to(dtype)
    expected = RmsNorm(weight, 1e-5)(total)
    got = add_norm(x, added, weight, 1e-5)
    assert torch.equal(x, total)
    torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter loses the carry of a rounding to E4M3")
def test_results_are_rounded_to_e4m3() -> None:
    """Saturated, where a value is out of range; a rounding may fall to the other side of a near tie."""
    scale = torch.tensor(0.004, device=DEVICE)
    x, weight, gate_up, heads = randn(4, 96), randn(96), randn(1, 4, 2 * 1100), randn(2, 3, 6, 40)
    cases = [
        (add_norm(x.clone(), None, weight, 1e-5, scale), RmsNorm(weight, 1e-5)(x)),
        (silu_mul(gate_up, torch.float32, scale), silu_mul(gate_up, torch.float32)),
        (merge_heads(heads, 2, scale), merge_heads(heads, 2)),
    ]
    for got, exact in cases:
        assert got.dtype == torch.float8_e4m3fn
        expected = quantize_e4m3(exact, scale).float()
        assert expected.abs().max() == 448
        different = got.float() != expected
        assert different.float().mean() < 0.01
        torch.testing.assert_close(got.float(), expected, rtol=0.13, atol=2**-9)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter rounds NaN to a number in E4M3")
def test_nan_stays_nan_in_e4m3() -> None:
    """Or nothing would tell that a request's numbers are broken."""
    scale, nan = torch.tensor(0.004, device=DEVICE), float("nan")
    x, gate_up, heads = randn(2, 96), randn(1, 2, 2 * 1100), randn(1, 3, 4, 40)
    x[1, 5], gate_up[0, 1, 7], heads[0, 2, 3, 9] = nan, nan, nan
    cases = [(add_norm(x.clone(), None, randn(96), 1e-5, scale), 96), (silu_mul(gate_up, torch.float32, scale), 1)]
    cases += [(merge_heads(heads, 2, scale), 1), (round_rows(x)[0], 1)]
    for got, broken in cases:
        assert not got.float()[0].isnan().any()
        assert got.float()[1].isnan().sum() >= broken


def test_silu_mul() -> None:
    partial = randn(2, 3, 2 * 1100)
    gate, up = partial.sum(0).chunk(2, -1)
    torch.testing.assert_close(silu_mul(partial, torch.float32), torch.nn.functional.silu(gate) * up)


def test_rope_write(tmp_path: Path) -> None:
    target = load(tmp_path, "llama")
    config = target.config
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    positions = chain([0, 7, 120], 3)
    partial = randn(2, 9, (heads + 2 * kv_heads) * dim)
    qkv = partial.sum(0).view(3, 3, heads + 2 * kv_heads, dim)
    expected = KVCache.allocate(config, 4, 128, DEVICE, torch.float32)
    got = KVCache.allocate(config, 4, 128, DEVICE, torch.float32)
    cos, sin = rope_tables(config, 128, DEVICE)
    rotated = apply_rope(qkv[:, :, :-kv_heads], cos[positions][:, :, None], sin[positions][:, :, None])
    keys_values = torch.cat((rotated[:, :, heads:], qkv[:, :, -kv_heads:]), 2)
    few = expected.slots(0, 3)
    few.write(1, few.rows(positions), keys_values)
    query = rope_write(partial, (cos, sin), positions, got.data[1], torch.float32)
    torch.testing.assert_close(got.data, expected.data)
    torch.testing.assert_close(query, rotated[:, :, :heads].flatten(0, 1))


def test_rope_write_of_trees(tmp_path: Path) -> None:
    """Nodes are rotated by their depths and lie side by side: moved apart, they are what a write to there leaves."""
    target = load(tmp_path, "llama")
    config = target.config
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    starts, (depths, _) = torch.tensor([0, 61, 120], device=DEVICE), random_trees(3, 6, 1)
    partial = randn(2, 18, (heads + 2 * kv_heads) * dim)
    tables = rope_tables(config, 128, DEVICE)
    got = torch.zeros(3, 2 * kv_heads, 128, dim, device=DEVICE)
    query = rope_write(partial, tables, starts[:, None] + depths, got, torch.float32).view(3, 6, heads, dim)
    for node in range(6):
        alone = torch.zeros_like(got)
        each = partial.view(2, 3, 6, -1)[:, :, node].contiguous()
        positions = starts[:, None] + depths[:, node : node + 1]
        torch.testing.assert_close(rope_write(each, tables, positions, alone, torch.float32), query[:, node])
        row = torch.arange(3)
        torch.testing.assert_close(got[row, :, starts + node], alone[row, :, positions[:, 0]])
        got[row, :, starts + node] = 0
    assert not got.any()


def test_rope_write_of_trees_of_different_sizes(tmp_path: Path) -> None:
    """Rows in any order leave what they leave in their own, and nothing beyond the trees."""
    config = load(tmp_path, "llama").config
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    starts, (depths, _), sizes = torch.tensor([0, 61, 120], device=DEVICE), random_trees(3, 6, 2), [6, 1, 4]
    packed, positions = packed_rows(sizes, 6, 1), starts[:, None] + depths
    partial, tables = randn(2, 18, (heads + 2 * kv_heads) * dim), rope_tables(config, 128, DEVICE)
    expected, got = torch.zeros(2, 3, 2 * kv_heads, 128, dim, device=DEVICE)
    whole = rope_write(partial, tables, positions, expected, torch.float32)
    for row, size in enumerate(sizes):
        expected[row, :, int(starts[row]) + size :] = 0
    some = partial[:, packed.nodes].contiguous()
    query = rope_write(some, tables, positions, got, torch.float32, packed.nodes)
    torch.testing.assert_close(query, whole[packed.nodes])
    torch.testing.assert_close(got, expected)


def test_rope_write_of_prompts(tmp_path: Path) -> None:
    """Each token at its own position, what fills up a prompt at its last; queries as attention takes them."""
    config = load(tmp_path, "llama").config
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group = heads // kv_heads
    positions = torch.tensor([[0, 1, 2, 2, 2], [60, 61, 62, 63, 64]], device=DEVICE)
    qkv = randn(2, 5, heads + 2 * kv_heads, dim)
    qkv[0, 3:] = qkv[0, 2]
    expected, got = (KVCache.allocate(config, 3, 128, DEVICE, torch.float32) for _ in range(2))
    cos, sin = rope_tables(config, 128, DEVICE)
    rotated = apply_rope(qkv[:, :, :-kv_heads], cos[positions][:, :, None], sin[positions][:, :, None])
    few = expected.slots(1, 3)
    few.write(1, few.rows(positions), torch.cat((rotated[:, :, heads:], qkv[:, :, -kv_heads:]), 2))
    partial = qkv.view(1, 10, -1)
    query = rope_write(partial, (cos, sin), positions, got.slots(1, 3).data[1], torch.float32, prompts=True)
    torch.testing.assert_close(got.data, expected.data)
    rows = rotated[:, :, :heads].view(2, 5, kv_heads, group, dim).transpose(1, 2).reshape(2, kv_heads, 5 * group, dim)
    torch.testing.assert_close(query, rows)
    torch.testing.assert_close(merge_heads(query, 5), rotated[:, :, :heads].reshape(10, -1))
    # As some of PyTorch's attention kernels leave them.
    apart = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(merge_heads(apart, 5), merge_heads(query, 5))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from([torch.float32, HALF, torch.float8_e4m3fn]),
    st.sampled_from([32, 80]),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_keep_path(dtype: Any, dim: int, length: int, sequences: list[tuple[int, int]], random: Any) -> None:
    """In all layers, as one copy after the other would; nothing else changes."""
    batch = len(sequences)
    data = randn(3, batch + 1, 4, 80, dim).to(dtype)
    state = torch.tensor([[start for start, _ in sequences], [min(count, length - 1) for _, count in sequences]])
    nodes = torch.tensor([[0, *sorted(random.sample(range(1, 33), length - 1))] for _ in sequences])
    expected = data.clone()
    for row, (start, kept) in enumerate(state.T.tolist()):
        # What lies beyond the kept nodes must not be followed.
        nodes[row, kept + 1 :] = 10**6
        for depth in range(1, kept + 1):
            expected[:, row, :, start + depth] = expected[:, row, :, start + int(nodes[row, depth])]
    starts, kept = state.to(DEVICE)
    keep_path(data, starts, nodes.to(DEVICE), kept)
    assert torch.equal(data.float(), expected.float())


@pytest.mark.parametrize(("tokens", "sizes"), [(1, [1, 1]), (7, [7, 7]), (7, [3, 6])])
def test_the_whole_forward_of_trees(tokens: int, sizes: list[int], tmp_path: Path) -> None:
    """Each node has the hidden state of the plain sequence that ends with it; so has what follows a kept path."""
    target = load(tmp_path, "qwen2")
    cache = KVCache.allocate(target.config, 2, 128, DEVICE, torch.float32)
    lengths = [5, 62]
    for slot, length in enumerate(lengths):
        fill(target, cache.slots(slot, slot + 1), length)
    empty = KVCache(cache.data.clone())
    starts, (depths, masks) = torch.tensor(lengths, device=DEVICE), random_trees(2, tokens, 3)
    new = torch.arange(2 * tokens, device=DEVICE).view(2, tokens) + 17
    if sizes == [tokens] * 2:
        got = decode_forward(target, new, starts[:, None] + depths, cache, masks).view(2, tokens, -1)
    else:
        packed = packed_rows(sizes, tokens, 4)
        some = new.flatten()[packed.nodes]
        got = decode_forward(target, some, starts[:, None] + depths, cache, masks, packed)[packed.rows]
    for slot, length in enumerate(lengths):
        for node in range(sizes[slot]):
            path = [j for j in range(node + 1) if int(masks[slot, node]) >> j & 1]
            plain, one = KVCache(empty.data[:, slot : slot + 1].clone()), torch.tensor([path], device=DEVICE)
            expected = target.forward(new[slot][one], chain([length], len(path)), plain, length + len(path))
            torch.testing.assert_close(got[slot, node], expected[0, -1], rtol=1e-4, atol=1e-4)
        moved = KVCache(cache.data[:, slot : slot + 1].clone())
        keep_path(moved.data, starts[slot : slot + 1], one, torch.tensor([len(path) - 1], device=DEVICE))
        places = slice(0, length + len(path))
        torch.testing.assert_close(moved.data[:, :, :, places], plain.data[:, :, :, places], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_the_whole_forward(architecture: str, tokens: int, tmp_path: Path) -> None:
    """The same hidden states and the same cache as the reference forward, after prompts of different lengths."""
    target = load(tmp_path, architecture)
    lengths = [5, 70, 64]
    caches = [KVCache.allocate(target.config, 3, 128, DEVICE, torch.float32) for _ in range(2)]
    for cache in caches:
        for slot, length in enumerate(lengths):
            fill(target, cache.slots(slot, slot + 1), length)
    new = torch.arange(3 * tokens, device=DEVICE).view(3, tokens) + 17
    positions = chain(lengths, tokens)
    expected = target.forward(new, positions, caches[0], max(lengths) + tokens)
    got = decode_forward(target, new, positions, caches[1])
    torch.testing.assert_close(got, expected.flatten(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(caches[1].data, caches[0].data, rtol=1e-4, atol=1e-4)


def load(path: Path, architecture: str) -> Transformer:
    return load_transformer(save_reference(tiny_reference(architecture), path), str(DEVICE), torch.float32)


def fill(target: Transformer, cache: KVCache, length: int) -> None:
    """Runs a prompt of so many tokens into the only slot of a cache."""
    prompt = torch.arange(length, device=DEVICE)[None]
    target.forward(prompt % 300, prompt, cache, length)
