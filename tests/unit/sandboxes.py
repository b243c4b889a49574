"""What the tests of the sandbox share: the cases, a policy that starts quickly, and what this machine sees of it."""

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest

from fourfold.sandbox.policy import FIRST_UID, Policy
from fourfold.sandbox.pool import PoolSettings
from fourfold.sandbox.selftest import SandboxUnavailable, require_isolation

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads(Path(__file__).with_name("sandbox_cases.json").read_text())
}
SETTINGS = PoolSettings(ready=1, max_sessions=8, max_running=2)


def bare_policy() -> Policy:
    """The product's policy, but nothing is imported ahead: a sandbox starts in 50 ms. Skips where it cannot be had."""
    try:
        policy = require_isolation()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    return dataclasses.replace(policy, program=policy.program[:-2])


def case_code(name: str, port: int = 9) -> str:
    """A case's code, told where this process and a listener of it are."""
    return CASES[name]["code"].replace("SVCPID", str(os.getpid())).replace("PORT", str(port))


def listener() -> socket.socket:
    """A service of this machine that no session may reach."""
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    return server


def was_reached(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return False
    return True


def sandbox_processes() -> set[str]:
    """Sandboxes on this machine: processes of their users, and children of this process that are bubblewrap or dead."""
    users = range(FIRST_UID, FIRST_UID + 100)
    found = set()
    for process in psutil.process_iter(["pid", "uids", "name", "status", "ppid"]):
        facts = process.info
        mine = facts["ppid"] == os.getpid() and (facts["name"] == "bwrap" or facts["status"] == psutil.STATUS_ZOMBIE)
        if mine or (facts["uids"] is not None and facts["uids"].real in users):
            found.add(f"{facts['pid']} {facts['name']}")
    return found
