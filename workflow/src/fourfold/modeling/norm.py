"""Root-mean-square norm (Zhang and Sennrich, arXiv 1910.07467)."""

import torch
from torch import Tensor


class RmsNorm:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[0]
        self.weight, self.eps = weight, eps
        # sqrt(mean(x²) + eps) = hypot(|x|, sqrt(n * eps)) / sqrt(n): a norm, a hypot, a division and a product.
        self._root = torch.tensor((size * eps) ** 0.5, device=weight.device)
        self._scaled = weight * size**0.5

    def __call__(self, x: Tensor) -> Tensor:
        """[..., hidden] → the same; a dtype narrower than float32 is rounded before the product, as in transformers."""
        if x.dtype == torch.float32:
            return x.div(torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._root)).mul_(self._scaled)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(self.eps))
        return (wide * scale).to(x.dtype) * self.weight
