"""The attention of a decoding step against its reference: on a GPU, or through Triton's interpreter."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import DEVICE, HALF, chain, packed_rows, randn, random_trees
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

import triton
import triton.language as tl

from fourfold.modeling.attention import grouped_attention, mask_bias
from fourfold.modeling.e4m3_pairs import unpack
from fourfold.modeling.split_attention import parts_for, split_attention
from fourfold.modeling.trunk_tree import MAX_NODES


def tree_bias(starts: Tensor, masks: Tensor, length: int, group: int) -> Tensor:
    """`mask_bias` of trees: -inf where a node may not look, [batch, 1, rows, length]; padding rows see everything."""
    node = torch.arange(length, device=DEVICE) - starts[:, None, None]
    seen = (node <= 0) | ((masks[:, :, None] >> node.clamp(0, 63)) & 1 == 1) & (node < 64)
    chain_bias = mask_bias(starts[:, None].expand(masks.shape), length, group, torch.float32)
    bias = torch.zeros_like(chain_bias)
    rows = seen.repeat_interleave(group, 1)[:, None]
    bias[:, :, : rows.shape[2]].masked_fill_(~rows, float("-inf"))
    return bias


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens", "parts"),
    [(4, 2, 16, 1, 1), (10, 2, 64, 4, 4), (9, 3, 64, 8, 2), (5, 1, 80, 3, None)],
)
def test_split_attention(heads: int, kv_heads: int, dim: int, tokens: int, parts: int | None, dtype: Any) -> None:
    """Lengths of every kind: a first token, both sides of a block's border, the last place; parts without keys."""
    length = 192
    positions = chain([0, 60, 63, 64, 100, length - tokens], tokens)
    batch = len(positions)
    query = randn(batch * tokens, heads + 2 * kv_heads, dim, dtype=dtype)[:, :heads]
    cache = randn(batch + 1, 2 * kv_heads, length, dim, dtype=dtype)
    # Places that nobody may look at must not matter, whatever they hold.
    for row, last in enumerate(positions[:, -1].tolist()):
        cache[row, :, last + 1 :] = 1e4
    got = split_attention(query, cache, positions, parts=parts)
    keys, values = cache[:batch].float().chunk(2, 1)
    bias = mask_bias(positions, length, heads // kv_heads, torch.float32)
    expected = grouped_attention(query.float().reshape(batch, tokens, heads, dim), keys, values, bias).flatten(0, 1)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.tuples(st.sampled_from([(10, 2, 64), (9, 3, 64), (5, 1, 80)]), st.integers(1, 12))
    | st.just(((2, 2, 32), MAX_NODES)),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([torch.float32, HALF, torch.float8_e4m3fn]),
    st.lists(st.integers(0, 129) | st.sampled_from([52, 62, 63, 64, 127]), min_size=1, max_size=3),
    st.integers(0, 2**20),
)
def test_split_attention_of_trees(
    shape: tuple[tuple[int, int, int], int], parts: int, dtype: Any, starts: list[int], seed: int
) -> None:
    """A node sees itself, those above it and what is before the tree; what lies beyond the tree is not even read."""
    ((heads, kv_heads, dim), nodes), length, batch = shape, 192, len(starts)
    _, masks = random_trees(batch, nodes, seed)
    positions = chain(starts, nodes)
    query = randn(batch, nodes, heads, dim, dtype=torch.float32 if dtype == torch.float32 else HALF)
    cache = randn(batch + 1, 2 * kv_heads, length, dim).to(dtype)
    expected_cache = cache.float()
    for row, start in enumerate(starts):
        cache[row, :, start + nodes :] = float("nan")
        expected_cache[row, :, start + nodes :] = 0
    bias = tree_bias(positions[:, 0], masks, length, heads // kv_heads)
    expected = grouped_attention(query.float(), *expected_cache[:batch].chunk(2, 1), bias).flatten(0, 1)
    got = split_attention(query.flatten(0, 1), cache, positions, masks, parts=parts)
    assert got.dtype == query.dtype
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)
    # Trees that end earlier: what lies beyond them is not read either, and the others' rows are what they were.
    sizes = [1 + (seed + 5 * row) % nodes for row in range(batch)]
    packed = packed_rows(sizes, nodes, seed)
    for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        cache[row, :, start + size :] = float("nan")
    some = query.flatten(0, 1)[packed.nodes]
    got = split_attention(some, cache, positions, masks, packed.rows, parts=parts)
    torch.testing.assert_close(got.float(), expected[packed.nodes], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("masked", [False, True])
def test_a_node_sees_no_other_branch(masked: bool) -> None:
    """Huge values at a node change exactly the nodes that see it; a chain's masks are those of no masks."""
    nodes = 9
    positions, (_, masks) = chain([60, 3], nodes), random_trees(2, nodes, 5)
    if not masked:
        masks = ((2 << torch.arange(nodes, device=DEVICE)) - 1).expand(2, -1).contiguous()
    query, cache = randn(2 * nodes, 6, 32), randn(2, 4, 128, 32)
    before = split_attention(query, cache, positions, masks)
    if not masked:
        assert torch.equal(before, split_attention(query, cache, positions))
    for node in range(1, nodes):
        changed = cache.clone()
        changed[torch.arange(2), :, positions[:, node]] += 1e4
        after = split_attention(query, changed, positions, masks)
        assert torch.equal((before != after).any(-1), (masks >> node & 1 == 1).flatten())


@pytest.mark.parametrize("size", [1.0, 1e6])
def test_a_bfloat16_query_with_an_e4m3_cache(size: float) -> None:
    """Its products are in float16, whose range a query may exceed; the result has the query's dtype."""
    positions = chain([100, 63], 4)
    query = (randn(2, 4, 10, 64) * size).bfloat16()
    cache = randn(2, 4, 128, 64).to(torch.float8_e4m3fn)
    keys, values = cache.float().chunk(2, 1)
    bias = mask_bias(positions, 128, 5, torch.float32)
    expected = grouped_attention(query.float().clamp(-65504, 65504), keys, values, bias).flatten(0, 1)
    got = split_attention(query.flatten(0, 1), cache, positions)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-2)
    query[1, 2] = float("nan")
    broken = split_attention(query.flatten(0, 1), cache, positions).isnan()
    assert broken[4 + 2].all()
    assert broken.sum() == broken[4 + 2].sum()


@triton.jit
def _unpack(pairs: tl.tensor, first: tl.tensor, second: tl.tensor) -> None:
    place = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    one, other = unpack(tl.load(pairs + place))
    tl.store(first + place, one)
    tl.store(second + place, other)


def test_every_pair_of_e4m3_values_is_unpacked() -> None:
    pairs = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE)
    got = torch.empty(2, 2**16, dtype=torch.float16, device=DEVICE)
    _unpack[(64,)](pairs, *got)
    expected = pairs.view(torch.float8_e4m3fn).view(-1, 2).T.to(torch.float16)
    # Triton's interpreter knows no NaN in E4M3.
    there = expected.isfinite() | (DEVICE.type == "cuda")
    torch.testing.assert_close(got[there], expected[there], rtol=0, atol=0, equal_nan=True)


def test_parts_fill_the_gpu_and_no_more() -> None:
    assert [parts_for(batch, 8, 2304) for batch in (1, 12, 32, 64)] == [64, 4, 2, 1]
    assert parts_for(1, 8, 100) == 2
