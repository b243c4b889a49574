"""Data-parallel processes: one alone, or those that torchrun started (gloo on CPUs, NCCL on GPUs)."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.modeling.checkpoint import resolve_device
from fourfold.progress import logger


@dataclass(frozen=True)
class Processes:
    """This process among all: rank 0 writes, logs and reports."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Adds up a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Joins the processes that torchrun started, if it did; each takes the GPU of its local rank.

    Raises FourfoldError when the device is not there.
    """
    count, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = resolve_device(device)
    if place.type == "cuda" and place.index is None:
        # Started by hand, each process may see a GPU of its own only.
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(place)
    if count == 1:
        yield Processes(0, 1, place)
        return
    if rank > 0:
        logger.setLevel(logging.WARNING)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, place)
    finally:
        dist.destroy_process_group()
