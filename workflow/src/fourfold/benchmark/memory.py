"""Peak memory of a server's processes: on a GPU what it says that it allocated, on a CPU the resident sets."""

from pathlib import Path

import psutil

from fourfold.client.api import ApiClient
from fourfold.server.metrics import PEAK_MEMORY


def processes(root: int) -> list[int]:
    """A process and all that it has started; none if it has ended."""
    try:
        process = psutil.Process(root)
        return [process.pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def reset_peak(root: int) -> None:
    """Starts a new peak where the system allows it; else the peak is since the server's start, as on a GPU."""
    for process in processes(root):
        try:
            Path(f"/proc/{process}/clear_refs").write_text("5")  # proc(5): resets VmHWM
        except OSError:
            continue


async def peak_bytes(root: int, client: ApiClient) -> int:
    """Peak memory since the last reset, in bytes; 0 if the server has ended."""
    if allocated := await client.metric(PEAK_MEMORY):
        return int(allocated)
    return sum(map(_resident_peak, processes(root)))


def _resident_peak(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
