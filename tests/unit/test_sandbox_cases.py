"""Every hostile case is held, and this machine does not notice it."""

import asyncio
import json
import re
import time
from pathlib import Path

import pytest
from sandboxes import CASES, SETTINGS, bare_policy, case_code, listener, sandbox_processes, was_reached

from fourfold.sandbox.pool import Pool
from fourfold.sandbox.worker import GRACE_SECONDS, KEEP_BYTES, CellResult

SECONDS = 1.0
SLOW = {"memory_bomb_list": 10.0}  # touches 2 GiB
# How each case may end, and what its output must show; those that are not named complete and print HELD.
EXPECTED: dict[str, tuple[str, str]] = {
    "fork_bomb": ("error", "PermissionError"),
    "subprocess_shell": ("error", "PermissionError|FileNotFoundError"),
    "memory_bomb_list": ("error", "MemoryError"),
    "memory_bomb_single": ("error", "MemoryError"),
    "memory_bomb_numpy": ("error", "Unable to allocate"),
    "infinite_loop": ("timeout", "^before"),
    "infinite_loop_ignore_signals": ("timeout", ""),
    "sleep_forever": ("timeout", "KeyboardInterrupt"),
    "regex_backtrack": ("timeout", ""),
    "huge_stdout": ("output_limit", "^x+$"),
    "dns_http": ("error", "urlopen error"),
    "close_all_fds": ("died", ""),
    "sys_exit": ("completed", "^$"),
    "os_exit": ("died", ""),
    "segfault": ("died", ""),
    "deep_recursion": ("error", "RecursionError"),
    "deep_recursion_c_stack": ("error|died|timeout", ""),
    "long_int_str": ("completed|error", "^10+$|ValueError"),
    "bigint_memory": ("error", "MemoryError|OverflowError"),
    "input_stdin": ("error", "EOFError"),
    "forge_with_stolen_nonce": ("completed|protocol", ""),  # as the two frames arrive
    "forge_stdout_marker": ("error", "ZeroDivisionError"),
    "giant_control_frame": ("protocol", ""),
    "monkeypatch_driver": ("protocol", ""),
    "sigstop_self": ("timeout", ""),
    "syntax_nul_source": ("error", "null bytes"),
    "session_state_leak": ("completed", "^$"),
    "write_outside_tmp": ("completed", "(HELD .*\n){8}tmp ok"),
    "fill_tmpfs": ("completed", "HELD No space left on device 6[0-4] MB\nbounded"),
    "fsize_big_file": ("completed", "HELD File too large"),
    "fd_exhaustion": ("completed", "HELD Too many open files [23]"),
    "setuid_caps": ("completed", "(HELD errno 1\n){5}65534 65534"),
    "dangerous_syscalls": ("completed", "(HELD .*\n){24}"),
}
# What the next cell of the same session says; None: it is a new session. Cases that are not named keep theirs.
NEXT: dict[str, str | None] = {
    **dict.fromkeys(("infinite_loop_ignore_signals", "regex_backtrack", "huge_stdout", "close_all_fds", "os_exit")),
    **dict.fromkeys(("segfault", "giant_control_frame", "monkeypatch_driver", "sigstop_self")),
}
EITHER = ("deep_recursion_c_stack", "regex_backtrack")


async def hold(name: str, port: int) -> None:
    pool = Pool(bare_policy(), SETTINGS)
    await pool.open()

    async def run(session: str, code: str) -> tuple[CellResult, bool]:
        return await pool.run(session, code, timeout=SLOW.get(name, SECONDS), stdin="", minimal=False)

    try:
        await run("bystander", "secret = 'kept'")
        await run("case", "x = 1")
        begin = time.monotonic()
        result, _ = await run("case", case_code(name, port))
        seconds = time.monotonic() - begin
        follower, new = await run("case", "print(globals().get('y'))")
        bystander, replaced = await run("bystander", "print(secret, 'x_secret' in globals(), 'canary' in secret)")
        leaked, _ = await run("other", "import os, math; print(os.listdir('/tmp'), round(math.pi, 2))")
    finally:
        await pool.close()

    statuses, pattern = EXPECTED.get(name, ("completed", "HELD"))
    assert re.fullmatch(statuses, result.status), result
    assert re.search(pattern, result.stdout), result
    assert not re.search("^ESCAPED", result.stdout, re.MULTILINE)  # tracebacks quote the source
    assert len(result.stdout) <= KEEP_BYTES
    json.dumps([result.stdout, result.stderr]).encode()
    assert seconds < SLOW.get(name, SECONDS) + GRACE_SECONDS + 2
    if name == "forge_with_stolen_nonce":
        assert "protocol" in (result.status, follower.status)
    elif name not in EITHER:
        assert new == (name in NEXT and NEXT[name] is None), follower
        if not new:
            assert follower.status == NEXT.get(name, "completed")
    if name == "sys_exit":
        assert follower.stdout == "41\n"
    assert (bystander.stdout, replaced) == ("kept False False\n", False)
    assert leaked.stdout == "[] 3.14\n"


@pytest.mark.parametrize("name", CASES)
def test_a_case_is_held(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", "canary")
    before = sandbox_processes()
    canary = tmp_path / "canary"
    canary.write_text("alive")
    with listener() as server:
        asyncio.run(hold(name, server.getsockname()[1]))
        assert not was_reached(server)
    assert canary.read_text() == "alive"
    assert sandbox_processes() <= before
