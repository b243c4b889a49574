"""Runs inside the sandbox, as a program of its own: executes cells and answers on descriptor 3.

It shares its process with the code that it runs, so nothing that it says is trusted: the service decides what happened
(fourfold.sandbox.worker). Requests and replies are JSON behind a length of 4 bytes, big-endian; a reply is exactly
`{"id": …, "ok": …}`.
"""

import ast
import base64
import builtins
import ctypes
import gc
import io
import json
import linecache
import os
import signal
import struct
import sys
import traceback
from typing import Any

CONTROL = 3
INT_DIGITS = 100_000  # Python's own 4,300 is for web servers; numbers of mathematics are longer


def main(filter_text: str, *modules: str) -> None:
    """Imports what cells will want, gives up `execve`, then serves cells until the service closes the channel."""
    sys.path.append("/site")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.set_int_max_str_digits(INT_DIGITS)
    for module in modules:
        __import__(module)
    sys.argv[:] = [""]
    gc.collect()
    gc.freeze()
    add_filter(base64.b64decode(filter_text))
    send({"id": "ready", "ok": True})
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    count = 0
    while (q := receive()) is not None:
        count += 1
        ok = run_cell(q, names, f"<cell {count}>")
        send({"id": q["id"], "ok": ok})


def add_filter(program: bytes) -> None:
    """Adds a seccomp filter (`struct sock_filter[]`). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    steps = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(steps))
    if libc.prctl(22, 2, ctypes.c_char_p(head), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "the second system call filter was refused")


def receive() -> dict[str, Any] | None:
    """The next request; None at the end."""
    head = read_exactly(4)
    return json.loads(read_exactly(struct.unpack(">I", head)[0])) if head else None


def read_exactly(size: int) -> bytes:
    """That many bytes, or none at the end."""
    parts = []
    while size:
        part = os.read(CONTROL, size)
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(reply: dict[str, Any]) -> None:
    """Sends one frame."""
    body = json.dumps(reply).encode()
    os.write(CONTROL, struct.pack(">I", len(body)) + body)


def run_cell(q: dict[str, Any], names: dict[str, Any], label: str) -> bool:
    """Executes one cell; whether it ended without an error. Tracebacks go where the request says."""
    sys.stdin = io.TextIOWrapper(io.BytesIO(q["stdin"].encode("utf-8", "replace")), encoding="utf-8")
    ok = False
    try:
        try:
            linecache.cache[label] = (len(q["code"]), None, q["code"].splitlines(True), label)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            execute(q["code"], names, label, q["interactive"])
            ok = True
        except SystemExit as stop:
            ok = stop.code in (None, 0)
            if not ok:
                report(q, f"SystemExit: {stop.code}\n")
        except BaseException as error:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            report(q, describe(error, label, q["minimal"]))
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            flush()
    except BaseException:
        ok = False  # an interrupt between two lines, or a cell that broke what is used here
    return ok


def execute(code: str, names: dict[str, Any], label: str, interactive: bool) -> None:
    """Runs a cell; of an interactive one, the value of a last expression is printed, as notebooks do."""
    tree = ast.parse(code, label)
    last = tree.body[-1] if tree.body and interactive else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
        exec(compile(tree, label, "exec"), names)
        value = eval(compile(ast.Expression(last.value), label, "eval"), names)
        if value is not None:
            names["_"] = value
            print(repr(value))
    else:
        exec(compile(tree, label, "exec"), names)


def describe(error: BaseException, label: str, minimal: bool) -> str:
    """A traceback that begins in the cell: the frames of this file are of no use to its author."""
    if minimal or isinstance(error, RecursionError):
        return "".join(traceback.format_exception_only(error))
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != label:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(error), error, trace))


def report(q: dict[str, Any], text: str) -> None:
    """Writes an error after the cell's own output; in notebooks it belongs to that, in programs to standard error."""
    flush()
    data = text.encode("utf-8", "replace")
    while data:
        data = data[os.write(1 if q["interactive"] else 2, data) :]


def flush() -> None:
    """Sends on what Python and the C library hold back, before the reply that says that the cell is over."""
    streams: tuple[Any, ...] = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    for stream in streams:
        try:
            stream.flush()
        except Exception:
            continue  # a cell replaced or closed it
    ctypes.CDLL(None).fflush(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
