"""A large shape's decoding on one GPU: steps, real text, speed over acceptance, and the recipe's workload."""

from fourfold.benchmark.gpu.run import GpuBenchmark, benchmark_gpu

__all__ = ["GpuBenchmark", "benchmark_gpu"]
