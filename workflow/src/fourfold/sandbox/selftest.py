"""Whether the isolation can be had here, and whether it holds: asked before the service listens.

The second is tried in a real sandbox: what the kernel says of the process inside, read from outside, and what a cell
can and cannot do. There is no way to go on without.
"""

import os
import platform
import re
import shutil
import socket
from pathlib import Path

from fourfold.errors import FourfoldError
from fourfold.sandbox.policy import Policy, make_policy
from fourfold.sandbox.seccomp import MACHINES
from fourfold.sandbox.worker import StartError, Worker

_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_APPARMOR = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
_USERNS = Path("/proc/sys/user/max_user_namespaces")
_CLONE = Path("/proc/sys/kernel/unprivileged_userns_clone")

_PROBE = """
import mmap, os, socket

def held(name, action):
    try:
        action()
    except OSError:
        print("held", name)

def write(path):
    with open(path, "w") as file:
        file.write("x")

held("network", lambda: socket.create_connection(("127.0.0.1", {port}), 1))
held("sockets", socket.socket)
held("processes", lambda: os._exit(0) if os.fork() == 0 else None)
held("programs", lambda: os.execv("/py/bin/{python}", ["python", "-c", "1"]))
held("shared memory", lambda: os.memfd_create("x"))
held("host files", lambda: open("/etc/passwd"))
held("proc", lambda: os.listdir("/proc"))
held("root folder", lambda: write("/x"))
held("large files", lambda: open("/tmp/large", "wb").truncate(1 << 40))
held("full disk", lambda: [open("/tmp/%d" % i, "wb").write(bytes(8 << 20)) for i in range(16)])
held("memory", lambda: mmap.mmap(-1, 4 << 30))
"""
_HELD = (
    *("network", "sockets", "processes", "programs", "shared memory", "host files", "proc", "root folder"),
    *("large files", "full disk", "memory"),
)


class SandboxUnavailable(FourfoldError):
    """The isolation cannot be had, or does not hold: nothing is run."""

    exit_code = 78  # EX_CONFIG: the machine has to be changed, not the call


def require_isolation() -> Policy:
    """The policy, if this machine has what it is made of. Raises SandboxUnavailable saying what is missing."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        machine = f"{platform.system()} on {platform.machine()}"
        raise SandboxUnavailable(f"sandbox: needs Linux on {' or '.join(MACHINES)}, this is {machine}")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxUnavailable("sandbox: bubblewrap is missing; install it: apt-get install bubblewrap")
    return make_policy(bwrap)


async def check_isolation(policy: Policy) -> dict[str, object]:
    """Starts a sandbox and tries it. Returns what the kernel says of it, for people to read.

    Raises SandboxUnavailable naming what does not hold.
    """
    try:
        worker = await Worker.start(policy, slot=0)
    except (StartError, OSError) as error:
        raise SandboxUnavailable(f"sandbox: cannot be isolated here: {error}; {_remedy()}") from None
    try:
        facts = _kernel_facts(worker.python)
        failed = [f"{name} is {facts[name]}" for name, wanted in _wanted().items() if facts[name] != wanted]
        with socket.create_server(("127.0.0.1", 0)) as canary:
            python = Path(policy.program[0]).name
            code = _PROBE.format(port=canary.getsockname()[1], python=python)
            result = await worker.run(code, timeout=30)
        held = re.findall(r"^held (.+)$", result.stdout, re.MULTILINE)
        failed += [f"{name} not held" for name in _HELD if name not in held]
        if result.status != "completed":
            failed.append(f"the probe ended as {result.status}: {result.stdout[-200:]}{result.stderr[-200:]}")
    finally:
        await worker.kill()
    if failed:
        raise SandboxUnavailable(f"sandbox: the self-test failed, nothing is run: {'; '.join(failed)}; {_remedy()}")
    return {**facts, "held": list(_HELD)}


def _wanted() -> dict[str, object]:
    return {
        "root": False,
        "no_new_privileges": True,
        "seccomp_filters": 2,
        "capabilities": 0,
        "shared_namespaces": [],
        "descriptors": [0, 1, 2, 3],
    }


def _kernel_facts(pid: int) -> dict[str, object]:
    """What the kernel says of a process, as its /proc entries on this machine tell it."""
    lines = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    shared = [
        name for name in _NAMESPACES if os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}")
    ]
    return {
        "root": "0" in lines["Uid"].split(),
        "no_new_privileges": lines["NoNewPrivs"] == "1",
        "seccomp_filters": int(lines.get("Seccomp_filters", 0)) if lines["Seccomp"] == "2" else 0,
        "capabilities": sum(int(lines[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb")),
        "shared_namespaces": shared,
        "descriptors": sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd")),
    }


def _remedy() -> str:
    """What most likely keeps user namespaces from working here."""
    for path, bad, remedy in (
        (_APPARMOR, "1", "AppArmor forbids user namespaces: sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
        (_CLONE, "0", "user namespaces are off: sysctl kernel.unprivileged_userns_clone=1"),
        (_USERNS, "0", "user namespaces are off: sysctl user.max_user_namespaces=10000"),
    ):
        if path.is_file() and path.read_text().strip() == bad:
            return remedy
    return (
        "it needs user namespaces, mounts and seccomp; in a container allow them (--security-opt seccomp=PROFILE), not "
        "--privileged"
    )
