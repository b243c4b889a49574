"""Runs a program many times for the price of one import: each run is a fork of a process that has imported it.

    python fork_server.py MODULE:FUNCTION [MODULE…]

reads one JSON object a line (the arguments of `ForkServer.run`), forks a child that runs the program as its own command
would, and writes its return code. A step of a program is what changes a file below its folder and Python announces
before it does it (https://docs.python.org/3/library/audit_events.html): opening for writing, renaming, deleting and the
like. A child that ends writes how many there were to `OUTPUT.steps`.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate", "os.link"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class ForkServer:
    """The server as seen by a test."""

    def __init__(self, program: str, *preload: str) -> None:
        command = [sys.executable, __file__, program, *preload]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        output: Path,
        environment: dict[str, str] | None = None,
        kill_at: int | None = None,
        kill_after: float | None = None,
    ) -> int:
        """Runs the program in a folder, its output going to a file, and returns its return code.

        The code is negative, minus the signal's number, if a signal ended it: SIGKILL just before step `kill_at`, or
        `kill_after` so many seconds.
        """
        request = {
            "arguments": list(arguments),
            "folder": str(folder),
            "output": str(output),
            "environment": environment or dict(os.environ),
            "kill_at": kill_at,
            "kill_after": kill_after,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()


@dataclass
class Steps:
    """Counts steps that change files below a folder, and kills the process just before one of them."""

    folder: str
    kill_at: int | None
    count: int = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The audit hook."""
        relevant = arguments[2] & WRITING if event == "open" else event in CHANGES
        if not relevant or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        # shutil.rmtree names files relative to an open folder.
        if os.path.abspath(path).startswith(self.folder) and "/logs/" not in path:
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def run(program: str, request: dict[str, Any]) -> int:
    """Runs the program in this process; returns its exit code."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    with open(request["output"], "wb") as output, open(os.devnull, "rb") as nothing:
        for source, descriptor in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source.fileno(), descriptor)
    module, _, function = program.partition(":")
    sys.argv = [module.partition(".")[0], *request["arguments"]]
    steps = Steps(request["folder"], request["kill_at"])
    sys.addaudithook(steps)
    try:
        code = getattr(importlib.import_module(module), function)()
    except SystemExit as stop:
        code = stop.code
    sys.stdout.flush()
    sys.stderr.flush()
    Path(request["output"] + ".steps").write_text(str(steps.count))
    return code if isinstance(code, int) else int(code is not None)


def serve(program: str, *preload: str) -> None:
    """Answers requests until there are no more."""
    for module in (program.partition(":")[0], *preload):
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run(program, request)
            finally:
                os._exit(code)
        if request["kill_after"] is not None:
            time.sleep(request["kill_after"])
            # If it has ended already, this does nothing: its number is its own until it is waited for.
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers)


if __name__ == "__main__":
    serve(*sys.argv[1:])
