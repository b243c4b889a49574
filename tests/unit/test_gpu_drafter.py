"""The drafter's chain for a GPU against the network itself: on a GPU, or through Triton's interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from fourfold.engine.memory import check_draft_table
from fourfold.errors import FourfoldError
from fourfold.modeling import draft_decode, packed_drafter
from fourfold.modeling.draft_decode import DraftChain, table_bytes
from fourfold.modeling.draft_kernels import advance
from fourfold.modeling.linear import DenseLinear
from fourfold.modeling.packed_drafter import pack_drafter
from fourfold.modeling.redrafter import Redrafter, RedrafterConfig
from fourfold.modeling.split_product import split_product
from fourfold.modeling.tree_kernels import make_tree
from fourfold.modeling.trunk_kernels import CANDIDATES, Candidates, Drafted, best_logits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, HIDDEN = 700, 48
needs_fp8 = pytest.mark.skipif(
    DEVICE.type == "cpu" or torch.cuda.get_device_capability() < (8, 9), reason="no GPU with FP8 units here"
)


def random_drafter(seed: int = 0, draft_vocab: int | None = None, hidden: int = HIDDEN, **shape: Any) -> Redrafter:
    """With weights so large that every part of it matters to which token is the most likely."""
    generator = torch.Generator().manual_seed(seed)
    config = RedrafterConfig(VOCAB, hidden, shape.pop("exit_dim", 2 * hidden), draft_vocab_size=draft_vocab, **shape)
    tokens = None if draft_vocab is None else torch.randperm(VOCAB, generator=generator)[:draft_vocab]
    drafter = Redrafter(config, tokens).requires_grad_(False)
    for weight in drafter.parameters():
        spread = 0.5 if weight.ndim == 1 else 1.5 / weight.shape[1] ** 0.5
        weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
    return drafter.to(DEVICE)


def inputs(rows: int, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    """The target's embeddings, its states and the newest tokens."""
    generator = torch.Generator().manual_seed(1)
    embedding, states = (torch.randn(n, hidden, generator=generator).to(DEVICE) for n in (VOCAB, rows))
    return embedding, states, torch.randint(0, VOCAB, (rows,), generator=generator).to(DEVICE)


def reference(drafter: Redrafter, embedding: Tensor, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The logits that the network has for each of the tokens but the first: [rows, tokens - 1, logits]."""
    state, result = torch.zeros_like(hidden), []
    for token in tokens[:, :-1].T:
        state = drafter.advance(state, embedding[token])
        result.append(drafter.logits(hidden, state))
    return torch.stack(result, 1)


def in_draft_vocabulary(drafter: Redrafter, tokens: Tensor) -> Tensor:
    """Which logit is each token's."""
    if drafter.draft_to_target is None:
        return tokens
    return (tokens[..., None] == drafter.draft_to_target).long().argmax(-1)


def shortfall(drafter: Redrafter, embedding: Tensor, hidden: Tensor, last: Tensor, drafted: Tensor) -> Tensor:
    """How far each drafted token's logit is below the highest, in standard deviations of the logits: [rows, drafts]."""
    logits = reference(drafter, embedding, hidden, torch.cat((last[:, None], drafted), 1))
    taken = logits.gather(2, in_draft_vocabulary(drafter, drafted)[..., None])[..., 0]
    return (logits.amax(-1) - taken) / logits.std(-1)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"draft_vocab": 600},
        {"num_draft_layers": 3, "draft_vocab": 37},
        {"exit_dim": 80, "num_draft_layers": 1},
        {"rnn": False, "draft_vocab": 600},
        {"rnn": False, "exit_dim": 64},
    ],
    ids=["plain", "draft vocabulary", "three blocks", "projected", "no network", "no network, projected"],
)
def test_the_chain_drafts_what_the_network_does(shape: dict[str, Any]) -> None:
    drafter = random_drafter(**shape)
    embedding, hidden, last = inputs(5)
    chain = DraftChain(drafter, embedding)
    for drafts in (1, 4):
        got = chain(hidden, last, drafts).tokens[:, 1:]
        expected = reference(drafter, embedding, hidden, torch.cat((last[:, None], got), 1)).argmax(-1)
        assert torch.equal(in_draft_vocabulary(drafter, got), expected)
    assert got.unique().numel() > 5, "rows and steps that all draft the same would show nothing"


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter has neither bfloat16 nor products in FP8")
@pytest.mark.parametrize("fp8", [False, pytest.param(True, marks=needs_fp8)])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("rows", [1, 12, 64])
def test_the_chain_in_low_precision(rows: int, width: int, fp8: bool) -> None:
    """A token that is not the network's first choice is nearly as likely: precision may decide, nothing else."""
    exact = random_drafter(draft_vocab=656, hidden=256)
    embedding, hidden, last = inputs(rows, 256)
    embedding, hidden = embedding.bfloat16(), hidden.bfloat16()
    packed = pack_drafter(random_drafter(draft_vocab=656, hidden=256).bfloat16(), fp8)
    got = DraftChain(packed, embedding)(hidden, last, 3, width).tokens[:, 1::width]
    missing = shortfall(exact, embedding.float(), hidden.float(), last, got)
    assert missing.max() < (0.4 if fp8 else 0.1)
    assert (missing == 0).float().mean() > (0.6 if fp8 else 0.9)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has the products themselves")
@pytest.mark.parametrize("shape", [{}, {"exit_dim": 384}, {"rnn": False}], ids=["plain", "projected", "no network"])
@pytest.mark.parametrize("width", [1, 3])
def test_scales_and_halves_of_fp8_weights_find_together(
    width: int, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products in float32 of E4M3 values, in two parts. The interpreter's roundings are coarser than a GPU's."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, input_scale: Tensor) -> Tensor:
        assert x.dtype == weight.dtype == torch.float8_e4m3fn
        y = x.float() @ weight.float().T * scale * input_scale.reshape(-1, 1)
        return torch.stack((0.25 * y, 0.75 * y if bias is None else 0.75 * y + bias))

    monkeypatch.setattr(draft_decode, "split_product", product)
    monkeypatch.setattr(packed_drafter, "pack_linear", DenseLinear)
    exact, packed = (random_drafter(draft_vocab=656, hidden=256, **shape) for _ in range(2))
    embedding, hidden, last = inputs(12, 256)
    got = DraftChain(pack_drafter(packed, fp8=True), embedding)(hidden, last, 3, width).tokens[:, 1::width]
    missing = shortfall(exact, embedding, hidden, last, got)
    assert missing.max() < 0.8
    assert 0.6 < (missing == 0).float().mean() < 1, "all equal: nothing was rounded"


def test_the_table_has_what_each_token_adds() -> None:
    drafter = random_drafter()
    embedding, _, _ = inputs(1)
    assert drafter.rnn_w is not None
    assert drafter.rnn_u is not None
    table = DraftChain(drafter, embedding).table
    torch.testing.assert_close(table, drafter.rnn_w(embedding) + drafter.rnn_u.bias)
    assert table_bytes(drafter, torch.float32) == table.nbytes
    plain = random_drafter(rnn=False)
    assert DraftChain(plain, embedding).table is embedding
    assert table_bytes(plain, torch.float32) == 0


def test_a_table_that_does_not_fit_is_refused() -> None:
    check_draft_table(2**20, DEVICE)
    with pytest.raises(FourfoldError, match=r"table of all tokens .* takes 1048576.00 GiB, but .* are free on"):
        check_draft_table(2**50, DEVICE)


@pytest.mark.parametrize("size", [3, CANDIDATES, 3 * CANDIDATES - 1])
def test_the_first_of_equal_logits_is_chosen(size: int) -> None:
    """As torch.argmax has it; parts are added before they are compared."""
    generator = torch.Generator().manual_seed(2)
    product = torch.randint(-3, 4, (2, 6, size), generator=generator).float().to(DEVICE)
    tokens = torch.randperm(size, generator=generator).to(DEVICE)
    drafted = Drafted(torch.full((6, 3, 1), -1, device=DEVICE), None)
    for draft_to_target in (None, tokens):
        expected = product.sum(0).argmax(-1)
        tree = make_tree(best_logits(product, draft_to_target), drafted, 2)
        assert torch.equal(tree.tokens[:, 2], expected if draft_to_target is None else tokens[expected])
    assert (tree.tokens[:, :2] == -1).all()


def test_a_state_is_rounded_by_a_scale_of_its_own() -> None:
    """Numbers that E4M3 has exactly, times a power of two for each row: rounding loses nothing."""
    rows, size = 4, 48
    exact = torch.arange(-size // 2, size // 2).float().div(4).to(torch.float8_e4m3fn).float()
    exact[0] = 448
    powers = torch.tensor([1.0, 2.0**-9, 2.0**5, 0.0])
    table = (exact * powers[:, None]).to(DEVICE)
    state = torch.full((rows, size), 5.0, device=DEVICE)
    drafted = Drafted.empty(rows, 1, 1, DEVICE)
    newest = Candidates(torch.arange(rows, device=DEVICE)[:, None])
    got = advance(state, newest, table, None, drafted, 0, rnn=False, fp8=True)
    assert torch.equal(state, table), "the state before the first token is zero"
    assert got.scales is not None
    assert torch.equal(got.values.float() * got.scales[:, None], table)
    assert torch.equal(got.scales[:3].cpu(), powers[:3])


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_of_a_product_have_scales_of_their_own(rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight, bias, scales, inputs = (
        torch.randn(*size, generator=generator).to(DEVICE)
        for size in ((rows, 200), (100, 200), (100,), (100,), (rows,))
    )
    expected = x.double() @ weight.double().T * scales.double() * inputs.double()[:, None] + bias.double()
    got = split_product(x, weight, bias, scales, inputs)
    torch.testing.assert_close(got.double().sum(0), expected, rtol=1e-4, atol=1e-3)
