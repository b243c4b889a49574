"""How the kernels of a decoding step follow each other on a GPU.

A step has some five hundred launches of a few microseconds each. On GPUs that can do so (compute capability 9.0), a
kernel is launched before the one in front of it has ended (programmatic dependent launch): it prepares itself, reads
what never changes, and waits only where it needs what the others wrote. Every kernel of a step begins alike: what
depends on no kernel in front, `wait_for_previous`, `let_next_start`. A kernel has waited for all before it once it has
waited for the last one, since that one has waited too. The next one may start only then. So when a kernel starts, all
but the one in front have ended, and what they wrote can be read before waiting: positions and masks, say, which are
made before the first layer. More than one ahead is too many: kernels that are started two or three ahead take room from
those that work (on an H200 an FP8 step of 12 sequences took 5.1 ms so, and 4.9 with one ahead).

Triton compiles a variant of a kernel for numbers that are 1, one for multiples of 16 and one for others, and one for
pointers that are no multiple of 16, each of which takes 0.2 to 0.6 s. Numbers that go with how many sequences run, how
much they draft and how far a draft is are left out of that (`do_not_specialize`) wherever the machine's code comes out
alike: a new number of sequences should not have to wait for the compiler.
"""

from typing import Any

import torch
import triton
import triton.language as tl

EARLY = tl.constexpr(torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0))
"""Whether kernels start before the previous one has ended."""
OPTIONS: dict[str, Any] = {"launch_pdl": True} if EARLY.value else {}
"""Options of every kernel's launch."""


@triton.jit
def let_next_start() -> None:
    """Lets the next kernel of the stream start."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous() -> None:
    """Waits until all kernels in front have ended and what they wrote can be read."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
