"""The decoder's forward for the few new tokens of a decoding step on a GPU.

Computes what `Transformer.forward` computes, with one launch for everything between two products, and without a number
that the host would have to know: positions alone say how far each sequence reaches. So it can be captured in a CUDA
graph and replayed for sequences of any length.
"""

import torch
from torch import Tensor

from fourfold.modeling.kernels import add_norm, rope_write, silu_mul
from fourfold.modeling.kv_cache import KVCache
from fourfold.modeling.linear import DenseLinear, Linear, ScaledLinear, input_scale, rounded_product
from fourfold.modeling.split_attention import split_attention
from fourfold.modeling.split_product import MAX_ROWS, gated_product, multiplies_gates, split_product
from fourfold.modeling.transformer import Transformer
from fourfold.modeling.trunk_tree import PackedRows


@torch.inference_mode()
def decode_forward(
    target: Transformer,
    token_ids: Tensor,
    positions: Tensor,
    cache: KVCache,
    masks: Tensor | None = None,
    packed: PackedRows | None = None,
) -> Tensor:
    """Runs new tokens, each sequence in the slot of its row, and stores their keys and values side by side.

    Args:
        target: the model; its RoPE tables must cover the cache (`Transformer.rope_tables`).
        token_ids: int64 [batch, tokens]; with `packed` [rows].
        positions: their positions, int64 [batch, tokens], contiguous; everything before the first is in the cache.
        cache: the slots of these sequences come first.
        masks: which of them each token sees, for the nodes of a tree (`split_attention`), int64 [batch, tokens]; None
            for tokens that follow each other.
        packed: which rows are whose tokens, where sequences have different numbers of them.
    Returns the hidden states after the final norm, [rows, hidden].
    """
    rows, nodes = (None, None) if packed is None else (packed.rows, packed.nodes)
    tables = target.rope_tables(cache.length)
    x, delta = target.embed(token_ids.flatten()), None
    for i, layer in enumerate(target.layers):
        normed = add_norm(x, delta, layer.input_norm.weight, layer.input_norm.eps, input_scale(layer.qkv))
        query = rope_write(_product(layer.qkv, normed), tables, positions, cache.data[i], x.dtype, nodes)
        scale = input_scale(layer.o)
        dtype = x.dtype if scale is None else torch.float8_e4m3fn
        delta = _product(layer.o, split_attention(query, cache.data[i], positions, masks, rows, dtype, scale))
        normed = add_norm(x, delta, layer.post_norm.weight, layer.post_norm.eps, input_scale(layer.gate_up))
        delta = _product(layer.down, _gated(layer.gate_up, normed, x.dtype, input_scale(layer.down)))
    return add_norm(x, delta, target.norm.weight, target.norm.eps)


def _product(layer: Linear, x: Tensor) -> Tensor:
    """The layer's result as partial sums: [rows, in] → [parts, rows, out]."""
    if x.shape[0] <= MAX_ROWS and isinstance(layer, ScaledLinear):
        return split_product(x, layer.weight, layer.bias, layer.scale, layer.input_scale)
    if x.shape[0] <= MAX_ROWS and isinstance(layer, DenseLinear):
        return split_product(x, layer.weight, layer.bias)
    return rounded_product(layer, x)[None]


def _gated(layer: Linear, x: Tensor, dtype: torch.dtype, out_scale: Tensor | None) -> Tensor:
    """silu(gate) * up of the layer's result, rounded as `out_scale` says: [rows, in] → [rows, size]."""
    if x.shape[0] <= MAX_ROWS and isinstance(layer, ScaledLinear | DenseLinear) and multiplies_gates(layer.weight):
        scale = layer.scale if isinstance(layer, ScaledLinear) else None
        return gated_product(x, layer.weight, layer.bias, scale, input_scale(layer), dtype, out_scale)
    return silu_mul(_product(layer, x), dtype, out_scale)
