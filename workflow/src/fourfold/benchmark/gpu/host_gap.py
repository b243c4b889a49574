"""How long the GPU waits for the host between captured steps, by PyTorch's profiler.

A step ends with the copy of its tokens to the host, after which the GPU has nothing to do until the next one starts.
"""

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fourfold.benchmark.rows import Row
from fourfold.engine import LLMEngine

TOKENS_COPY = "Memcpy DtoH"


def host_gap(engine: LLMEngine, steps: int) -> Row:
    """Shares of the time of some steps: `host_gap`, between one step's last copy and the next step's first kernel, and
    `idle`, all that no kernel or copy covers. None on a CPU.
    """
    if engine.target.device.type != "cuda":
        return {"host_gap": None, "idle": None}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            engine.step()
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    ]
    return gap_shares(spans)


def gap_shares(spans: list[tuple[str, float, float]]) -> Row:
    """The shares of `host_gap`, from name, start and end of whatever ran on the GPU; None without two steps."""
    spans = sorted(spans, key=lambda span: span[1])
    ends = [i for i, (name, _, _) in enumerate(spans) if name.startswith(TOKENS_COPY)]
    if len(ends) < 2:
        return {"host_gap": None, "idle": None}
    # From the end of the first step to the end of the last.
    start = covered = spans[ends[0]][2]
    idle = between = 0.0
    for i in range(ends[0] + 1, ends[-1] + 1):
        _, first, last = spans[i]
        gap = max(0.0, first - covered)
        idle += gap
        if spans[i - 1][0].startswith(TOKENS_COPY):
            between += gap
        covered = max(covered, last)
    return {"host_gap": between / (covered - start), "idle": idle / (covered - start)}
