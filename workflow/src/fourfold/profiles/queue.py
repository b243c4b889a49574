"""Says why jobs wait in Slurm's queue, where they may wait for long: Snakemake itself waits in silence."""

import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

PASSING = {"None", "Priority", "Resources", "Dependency", "BeginTime", "Prolog"}
"""Reasons that pass by themselves as other jobs end."""


def watch_queue(say: Callable[[str], None], seconds: float) -> None:
    """Says once of each of this folder's jobs that it waits, and why; asks Slurm every so many seconds, until the end.

    Does nothing where Slurm is not installed.
    """
    if shutil.which("squeue"):
        threading.Thread(target=_watch, args=(say, seconds), name="watch_queue", daemon=True).start()


def _watch(say: Callable[[str], None], seconds: float) -> None:
    said: set[tuple[str, str]] = set()
    pause = threading.Event()
    while not pause.wait(seconds):
        for number, reason, comment in waiting_jobs(Path.cwd()):
            if (number, reason) not in said:
                said.add((number, reason))
                say(
                    f"Slurm job {number} ({comment}) waits: {reason}. `scontrol show job {number}` and "
                    "`sinfo --list-reasons` say more. Wait until Slurm starts it, or end this run with Ctrl-C: the "
                    "next one makes what is missing."
                )


def waiting_jobs(folder: Path) -> list[tuple[str, str, str]]:
    """Number, reason and comment of a folder's jobs that do not wait for other jobs alone; empty if Slurm is silent.

    Slurm's plugin for Snakemake writes the rule and its wildcards into the comment.
    """
    command = ["squeue", "--me", "--states=PENDING", "--noheader", "--format=%i|%r|%k|%Z"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    jobs = (line.split("|", 3) for line in done.stdout.splitlines() if line.count("|") >= 3)
    return [(job[0], job[1], job[2]) for job in jobs if job[3] == str(folder) and job[1] not in PASSING]
