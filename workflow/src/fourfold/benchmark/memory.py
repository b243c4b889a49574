"""Peak memory of what runs between two points: on a GPU what PyTorch allocated, on a CPU the resident set."""

import resource
from pathlib import Path

import torch


def reset_peak(device: str) -> None:
    """Starts a new peak where the system allows it; else the peak is that of the whole process."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return


def peak_bytes(device: str) -> int:
    """Peak memory since the last reset, in bytes."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
