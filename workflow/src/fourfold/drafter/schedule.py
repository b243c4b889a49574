"""The learning rate over the steps of a training."""

import math


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up to the peak, then a cosine to zero.

    Args:
        step: optimiser steps done before this one, 0 … total - 1.
        total: optimiser steps of the training.
        peak: the highest learning rate.
        warmup_ratio: share of the steps that warm up.
    """
    warmup = round(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
