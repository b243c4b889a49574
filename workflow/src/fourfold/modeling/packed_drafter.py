"""A drafter whose layers are the engine's own."""

from collections.abc import Callable

from torch import Tensor, nn

from fourfold.modeling.linear import DenseLinear, Linear, LinearWeights, RowScaledLinear, pack_linear
from fourfold.modeling.redrafter import Redrafter


class PackedLayer(nn.Module):
    """Stands for an nn.Linear with the engine's own layer."""

    def __init__(self, linear: nn.Linear, pack: Callable[[Tensor, Tensor | None], Linear]) -> None:
        super().__init__()
        bias = None if linear.bias is None else linear.bias.detach()
        self.linear = pack(linear.weight.detach(), bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return self.linear(x)


def pack_drafter(drafter: Redrafter, fp8: bool = False) -> Redrafter:
    """Puts the engine's packed layers in the place of the drafter's own; changes and returns the drafter.

    fp8: rounds a bfloat16 drafter on a GPU to FP8, but for rnn_w: where speed matters its products are made once, in
    `draft_decode.DraftChain`. Drafts change a little, tokens do not.
    """
    for module in list(drafter.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                rounded = fp8 and child is not drafter.rnn_w
                setattr(module, name, PackedLayer(child, RowScaledLinear if rounded else pack_linear))
    return drafter


def stored_weights(layer: nn.Module) -> LinearWeights:
    """What a drafter's layer multiplies with: an nn.Linear's, or that of a layer packed on a GPU."""
    plain = layer.linear if isinstance(layer, PackedLayer) else layer
    assert isinstance(plain, nn.Linear | DenseLinear | RowScaledLinear)
    scale = plain.scale if isinstance(plain, RowScaledLinear) else None
    return LinearWeights(plain.weight, plain.bias, scale)
