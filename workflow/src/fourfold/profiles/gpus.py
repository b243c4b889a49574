"""The GPUs of this machine, each for one process at a time.

Who computes on a GPU holds a lock of the kernel's on a file named after it, and sees no other GPU. A lock ends with its
process, however that ends, so nothing is left to clean up. Snakemake's jobs, commands by hand and the runs of several
users all respect it.
"""

import fcntl
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from fourfold.errors import FourfoldError
from fourfold.progress import logger

LOCKS = Path("/tmp/fourfold-gpus")
"""The same for all users, and whatever TMPDIR says."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
TAKEN = "FOURFOLD_GPUS"
"""Set to the same value as VISIBLE by who holds the locks, for its child processes."""

RETRY_SECONDS = 0.5
_held: list[int] = []
"""Descriptors of this process's locks; closing one would end it."""


def list_gpus() -> list[str]:
    """UUIDs of all GPUs, in the PCI bus's order; of a GPU that is divided (MIG), those of its parts.

    Empty where there is no NVIDIA driver. Raises FourfoldError when the driver's command fails.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    done = subprocess.run([command, "-L"], capture_output=True, text=True)
    if done.returncode:
        text = " ".join((done.stderr or done.stdout).split())
        raise FourfoldError(f"nvidia-smi -L: {text}; repair the driver, or set {VISIBLE}= to do without a GPU")
    gpus: list[list[str]] = []
    for kind, rest in re.findall(r"UUID: (GPU|MIG)(-[^)\s]+)", done.stdout):
        if kind == "GPU":
            gpus.append([])
        gpus[-1].append(kind + rest)
    return [uuid for gpu in gpus for uuid in (gpu[1:] or gpu)]


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process may use: those that CUDA_VISIBLE_DEVICES names, or all if it is not set.

    Raises FourfoldError when it names one that is not there.
    """
    named = _named()
    if named == []:
        return []
    gpus = list_gpus()
    return gpus if named is None or not gpus else [_find(name, gpus) for name in named]


def _named() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names; None if it is not set."""
    value = os.environ.get(VISIBLE)
    if value is None:
        return None
    # Slurm writes NoDevFiles for a job without a GPU.
    names = [name.strip() for name in value.split(",")]
    return [name for name in names if name not in ("", "-1", "NoDevFiles")]


def _find(name: str, gpus: Sequence[str]) -> str:
    """The GPU of an index, or of a UUID or its beginning."""
    if name.isdecimal() and int(name) < len(gpus):
        return gpus[int(name)]
    found = [gpu for gpu in gpus if not name.isdecimal() and gpu.startswith(name)]
    if len(found) != 1:
        raise FourfoldError(f"{VISIBLE}: no GPU {name} here; nvidia-smi -L lists {', '.join(gpus)}")
    return found[0]


def take_gpus(count: int = 1, *, keep_in_exec: bool = False) -> None:
    """Waits until so many GPUs are free, and takes them for this process and its children, until it ends.

    Of several GPUs, CUDA_VISIBLE_DEVICES says among which to choose; afterwards it names, by UUID, those that were
    taken. Does nothing where there is no GPU, or where a parent process has taken some. Call it before CUDA starts.

    Args:
        count: GPUs to take.
        keep_in_exec: keep the locks when this process becomes another program.
    Raises FourfoldError when there are fewer, and when this process was given a GPU that PyTorch cannot use.
    """
    if os.environ.get(TAKEN) and os.environ[TAKEN] == os.environ.get(VISIBLE):
        return
    gpus = visible_gpus()
    if not gpus:
        _refuse_missing()
        return
    if count > len(gpus):
        raise FourfoldError(f"{count} GPUs are needed, {len(gpus)} can be used here; use fewer processes")
    waits = False
    while not (locks := _try_locks(gpus, count)):
        if not waits:
            logger.info("waiting for a GPU: others compute on %s (fuser -v %s/* names them)", ", ".join(gpus), LOCKS)
            waits = True
        # Not all at the same moments: who needs several gives back what it could take of them.
        time.sleep(RETRY_SECONDS * random.uniform(0.5, 1.5))
    _held.extend(locks.values())
    for descriptor in locks.values():
        os.set_inheritable(descriptor, keep_in_exec)
    os.environ[VISIBLE] = os.environ[TAKEN] = ",".join(locks)
    if len(gpus) > 1:
        logger.info("took %s", os.environ[VISIBLE])


def _refuse_missing() -> None:
    """Stops a process that was given a GPU, by Slurm or by hand, and would compute on the CPU for hours instead."""
    if not _named():
        return
    import torch

    if not torch.cuda.is_available():
        raise FourfoldError(
            f"{VISIBLE}={os.environ[VISIBLE]} gives this process a GPU, but PyTorch sees none: check nvidia-smi here, "
            "and that torch is a CUDA build; or compute on the CPU with --device cpu (FOURFOLD_DEVICE=cpu)"
        )


def _try_locks(gpus: Sequence[str], count: int) -> dict[str, int]:
    """Locks so many GPUs, or none; descriptors by UUID."""
    taken: dict[str, int] = {}
    for gpu in gpus:
        descriptor = _open(gpu)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        taken[gpu] = descriptor
        if len(taken) == count:
            return taken
    for descriptor in taken.values():
        os.close(descriptor)
    return {}


def _open(gpu: str) -> int:
    """A GPU's file, made if need be; opened for reading, which is enough for a lock, on another user's file too."""
    try:
        LOCKS.mkdir(exist_ok=True)
        if LOCKS.stat().st_uid == os.getuid():
            LOCKS.chmod(0o1777)
        # Older drivers name a part MIG-GPU-…/1/0.
        path = LOCKS / gpu.replace("/", "_")
        if not path.exists():
            path.touch(0o644)
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise FourfoldError(f"{LOCKS / gpu}: {error.strerror}; remove {LOCKS}, or ask its owner to") from None
