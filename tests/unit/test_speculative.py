"""Speculation changes nothing but speed: greedy tokens are equal, sampled ones keep the target's distribution."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_engine

from fourfold.engine import LLMEngine, SamplingParams
from fourfold.engine.draft_plan import DraftPlan, DraftShape
from fourfold.engine.draft_tree import DraftTree, pack_beams, single_beam
from fourfold.engine.sampling import SamplingBatch, choose
from fourfold.engine.speculative import choose_everywhere

SMALL = {"vocab_size": 12, "initializer_range": 0.08}
"""Few tokens and a flat distribution: what a statistical test can see."""


def mixed_prompts(count: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("draft_vocab", [None, [0, 3, 5, 8, 13, 15]])
@pytest.mark.parametrize("drafting", [DraftShape(1, 4), DraftShape(1, 4, 0.2), DraftShape(3, 4), DraftShape(3, 4, 0.1)])
def test_greedy_equals_plain_greedy(
    architecture: str, draft_vocab: list[int] | None, drafting: DraftShape, tmp_path: Path
) -> None:
    shape = {"vocab_size": 16}
    plain = tiny_engine(tmp_path / "a", architecture, shape=shape)
    plan = DraftPlan({1: drafting})
    drafted = tiny_engine(tmp_path / "b", architecture, drafter_seed=1, draft_vocab=draft_vocab, plan=plan, shape=shape)
    wanted = mixed_prompts(40, 16)
    # Ends of all kinds, at all places within a draft: the end token, max_tokens, stop strings over two tokens.
    params = [
        SamplingParams(max_tokens=1 + 2 * i, stop=("w5w", "w11") if i % 3 == 0 else (), ignore_eos=i % 2 == 0)
        for i in range(40)
    ]
    expected = plain.generate(wanted, params)
    got = drafted.generate(wanted, params)
    for a, b in zip(expected, got, strict=True):
        assert b.token_ids == a.token_ids
        assert (b.text, b.finish_reason) == (a.text, a.finish_reason)
    assert sum(output.speculation.num_accepted_tokens for output in got) > 20, "no draft was ever right: nothing tested"
    assert {output.finish_reason for output in got} == {"stop", "length"}


def test_counts_add_up(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, drafter_seed=1, shape={"vocab_size": 32})
    (output,) = engine.generate([[1, 2, 3]], [SamplingParams(max_tokens=60, ignore_eos=True)])
    stats = output.speculation
    assert stats.num_draft_tokens == 3 * stats.num_drafts
    assert stats.accepted_per_position == sorted(stats.accepted_per_position, reverse=True)
    # The first token comes from the prompt; the last verification may yield more than max_tokens leaves room for.
    yielded = 1 + stats.num_drafts + stats.num_accepted_tokens
    assert 60 <= yielded < 60 + 4
    assert stats.acceptance_length == pytest.approx((yielded - 1) / stats.num_drafts)


def paths_of(tree: DraftTree, row: int) -> set[tuple[int, ...]]:
    """Every path from the root, as tokens, read from the parents alone."""
    paths = {0: ()}
    for node in range(1, 1 + int(tree.sizes[row])):
        paths[node] = (*paths[int(tree.parents[row, node])], int(tree.tokens[row, node]))
        assert len(paths[node]) == int(tree.depths[row, node])
    return set(paths.values())


@st.composite
def drafts(draw: st.DrawFn) -> tuple[list[list[list[int]]], list[list[list[bool]]]]:
    """Beams of a few sequences over few tokens, and which prefixes are worth verifying."""
    batch, width, length = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    token = st.integers(0, 2)
    beams = draw(nested(batch, nested(width, nested(length, token))))
    bad = draw(st.sets(st.lists(token, min_size=1, max_size=4).map(tuple), max_size=6))
    kept = [
        [[not any(tuple(b[:m]) in bad for m in range(1, n + 2)) for n in range(length)] for b in row] for row in beams
    ]
    return beams, kept


def nested(size: int, of: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(of, min_size=size, max_size=size)


@given(drafts())
def test_a_tree_holds_each_prefix_of_the_beams_once(case: tuple[list[list[list[int]]], list[list[list[bool]]]]) -> None:
    beams, kept = case
    tree = pack_beams(torch.full((len(beams),), 9), torch.tensor(beams), torch.tensor(kept))
    for row, (of_row, worth) in enumerate(zip(beams, kept, strict=True)):
        prefixes = {tuple(beam[:n]) for beam, w in zip(of_row, worth, strict=True) for n in range(sum(w) + 1)}
        assert paths_of(tree, row) == prefixes
        assert int(tree.sizes[row]) == len(prefixes) - 1
        on_paths = {tuple(tree.tokens[row, path[:n]].tolist()) for path in tree.paths[row] for n in range(1, 6)}
        assert {(9, *prefix) for prefix in prefixes} <= on_paths
        for node in range(1, len(prefixes)):
            assert node in tree.paths[row, tree.beam_of(torch.full((len(beams),), node))[row]]
    filler = torch.arange(tree.tokens.shape[1]) > tree.sizes[:, None]
    assert not tree.depths[filler].any()


def pair_counts(engine: LLMEngine, params: dict, samples: int) -> torch.Tensor:
    """How often each pair of (second, third) token was generated."""
    size = engine.target.config.vocab_size
    requests = [SamplingParams(max_tokens=3, ignore_eos=True, seed=seed, **params) for seed in range(samples)]
    outputs = engine.generate([[1, 2, 3]] * samples, requests)
    pairs = torch.tensor([output.token_ids[1] * size + output.token_ids[2] for output in outputs])
    return torch.bincount(pairs, minlength=size * size).double()


def pair_probabilities(engine: LLMEngine, params: dict) -> torch.Tensor:
    """The exact distribution of those pairs, from the target's logits alone."""
    size = engine.target.config.vocab_size
    vocabulary = torch.arange(size)

    def following(prefixes: torch.Tensor) -> torch.Tensor:
        logits = engine.target.logits(engine.target.hidden_states(prefixes)[:, -1])
        p = torch.softmax(logits / params["temperature"], -1)
        p = p * (p >= params.get("min_p", 0) * p.amax(-1, keepdim=True))
        ordered, tokens = p.sort(-1, descending=True)
        ordered[:, params.get("top_k") or size :] = 0
        ordered = ordered / ordered.sum(-1, keepdim=True)
        ordered = ordered * (ordered.cumsum(-1) - ordered < params.get("top_p", 1))
        ordered = ordered / ordered.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter(-1, tokens, ordered).double()

    prompt = torch.tensor([[1, 2, 3]])
    first = following(prompt)[0]
    second = following(torch.cat([prompt.expand(size, -1), vocabulary[:, None]], 1))
    total = torch.zeros(size, size, dtype=torch.float64)
    for token in range(size):
        prefixes = torch.cat([prompt.expand(size, -1), torch.full((size, 1), token), vocabulary[:, None]], 1)
        total += first[token] * second[token][:, None] * following(prefixes)
    return total.flatten()


def chi_square_p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """P of a deviation this large if the counts came from the expected distribution; rare cells are pooled."""
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    expected = expected * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


PARAMS = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.2, "min_p": 0.3},
]


@pytest.mark.parametrize("beam_width", [1, 3])
@pytest.mark.parametrize("params", PARAMS, ids=lambda p: "-".join(p))
def test_sampled_tokens_have_the_targets_distribution(params: dict, beam_width: int, tmp_path: Path) -> None:
    engine = tiny_engine(
        tmp_path, drafter_seed=2, beam_width=beam_width, max_num_seqs=256, shape=SMALL, max_model_len=16
    )
    counts = pair_counts(engine, params, 3000)
    assert chi_square_p_value(counts, pair_probabilities(engine, params)) > 1e-4


def test_a_draft_vocabulary_keeps_the_distribution(tmp_path: Path) -> None:
    engine = tiny_engine(
        tmp_path, drafter_seed=2, draft_vocab=[9, 2, 4], max_num_seqs=256, shape=SMALL, max_model_len=16
    )
    counts = pair_counts(engine, {"temperature": 1.0}, 3000)
    assert chi_square_p_value(counts, pair_probabilities(engine, {"temperature": 1.0})) > 1e-4


def test_the_test_sees_a_wrong_acceptance_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power: drafts that are accepted too often must fail the same test."""
    right = DraftTree.child

    def eager(tree: DraftTree, nodes: torch.Tensor, depth: int, tokens: torch.Tensor) -> torch.Tensor:
        # One request in four takes the first child, whatever the target says.
        first = (tree.depths == depth) & (tree.parents == nodes[:, None])
        first &= first.long().cumsum(1) == 1
        careless = torch.arange(len(nodes)) % 4 == 0
        return torch.where(careless[:, None], first, right(tree, nodes, depth, tokens))

    monkeypatch.setattr(DraftTree, "child", eager)
    engine = tiny_engine(tmp_path, drafter_seed=2, beam_width=2, max_num_seqs=256, shape=SMALL, max_model_len=16)
    counts = pair_counts(engine, {"temperature": 1.0}, 3000)
    assert chi_square_p_value(counts, pair_probabilities(engine, {"temperature": 1.0})) < 1e-4


def test_all_nodes_at_once_choose_what_each_node_chooses() -> None:
    """As a GPU does it: greedy and sampled requests in one batch, by the numbers of their own tokens."""
    logits = 3 * torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(5))
    tree = single_beam(torch.tensor([1, 2, 3]), torch.randint(0, 50, (3, 3)))
    params = [SamplingParams(temperature=t, seed=i, top_k=9 * i) for i, t in enumerate((0.0, 0.9, 1.3))]
    batch, index = SamplingBatch.of(params, logits.device), torch.tensor([1, 5, 9])
    got = choose_everywhere(logits.flatten(0, 1), tree.depths, batch, index).view(3, 4)
    places = torch.tensor([7, 0, 11, 2])
    some = choose_everywhere(logits.flatten(0, 1)[places], tree.depths, batch, index, places)
    assert torch.equal(some, got.flatten()[places])
    for node in range(4):
        assert torch.equal(got[:, node], choose(logits[:, node], batch, index + node))


def test_a_single_beam_is_the_tree_that_packing_gives() -> None:
    last, drafts = torch.tensor([4, 7]), torch.tensor([[1, 2, 3], [3, 3, 3]])
    expected, got = pack_beams(last, drafts[:, None]), single_beam(last, drafts)
    for name in ("tokens", "depths", "parents", "paths", "sizes"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
