"""Times the ways in which stock PyTorch multiplies by int8 weights on a CPU, and whether a row's bits depend on others.

    python docs/measurements/int8_products.py int8-products-cpu.csv

Each product has many matrices of one shape, so that they are read from memory as in a model. Medians of 7, alternating.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.benchmark.rows import write_csv
from fourfold.modeling.linear import HalfLinear, PackedLinear

Product = Callable[[Tensor], Tensor]
MATRICES = {(3072, 576): 40, (576, 1536): 80, (960, 576): 120}
"""[out, in] of SmolLM2-135M's gate and up, down, and qkv → how many of them, beyond what the caches hold."""
ROWS = (1, 4, 8, 16)
DIGIT = 126.0
"""An activation is the sum of three integers of -63 … 63, each of them worth this much less than the one before."""


def candidates(weight: Tensor, scale: Tensor) -> Iterator[tuple[str, Product]]:
    """Name and product of each way; weight int8 [out, in], scale float32 [out]."""
    yield "half, FBGEMM", HalfLinear(weight.float(), None, scale)
    yield "float32, oneDNN", PackedLinear(weight.float() * scale[:, None], None)
    yield "_weight_int8pack_mm, float32", lambda x: torch.ops.aten._weight_int8pack_mm(x, weight, scale)
    short = scale.bfloat16()
    yield "_weight_int8pack_mm, bfloat16", lambda x: torch.ops.aten._weight_int8pack_mm(x.bfloat16(), weight, short)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    yield "int8 FBGEMM, three digits", lambda x: by_digits(x, packed)


def by_digits(x: Tensor, packed: Any) -> Tensor:
    """The product by integer arithmetic: three digits of each activation as rows of one int8 product."""
    unit = x.abs().amax(-1, keepdim=True) / 63
    digits, rest = [], x / unit
    for _ in range(3):
        digits.append(rest.round())
        rest = (rest - digits[-1]) * DIGIT
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    high, middle, low = multiply(torch.cat(digits), 1.0, 64, packed).view(3, len(x), -1)
    return (high + (middle + low / DIGIT) / DIGIT) * unit


def measure(shape: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """One row a way and number of rows."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, list[Product]] = {}
    for _ in range(MATRICES[shape]):
        weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        scale = torch.rand(shape[0], generator=generator) * 1e-2 + 1e-4
        for name, product in candidates(weight, scale):
            layers.setdefault(name, []).append(product)
    x = torch.randn(64, shape[1], generator=generator)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).t()
    for rows in ROWS:
        times: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(7):
            for name, products in layers.items():
                begin = time.perf_counter()
                for product in products:
                    product(x[:rows])
                times[name].append((time.perf_counter() - begin) / len(products))
        for name, products in layers.items():
            whole = products[-1](x)
            yield {
                "out": shape[0],
                "in": shape[1],
                "rows": rows,
                "product": name,
                "microseconds": round(1e6 * statistics.median(times[name]), 1),
                "error": float((whole - exact).abs().max() / exact.abs().max()),
                "same_bits": all(torch.equal(products[-1](x[:n]), whole[:n]) for n in range(1, len(x))),
            }


if __name__ == "__main__":
    with torch.inference_mode():
        write_csv(Path(sys.argv[1]), [row for shape in MATRICES for row in measure(shape)])
