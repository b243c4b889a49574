"""Each mechanism holds something: without it, named cases fail and the service's self-test refuses to start."""

import asyncio
import dataclasses
import re
import struct
from collections.abc import Callable

import pytest
from sandboxes import bare_policy, case_code, listener

from fourfold.errors import FourfoldError
from fourfold.sandbox import selftest
from fourfold.sandbox.policy import Policy
from fourfold.sandbox.seccomp import session_filter
from fourfold.sandbox.worker import CellResult, Worker

ALLOW_ALL = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
SEPARATE = ("--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-uts", "--unshare-cgroup")


def change(**changes: object) -> Callable[[Policy], Policy]:
    return lambda policy: dataclasses.replace(policy, **changes)  # type: ignore[arg-type]


def limit(name: str, value: int) -> Callable[[Policy], Policy]:
    return lambda policy: dataclasses.replace(policy, limits={**policy.limits, name: (value, value)})


def share_network(policy: Policy) -> Policy:
    options = [option for each in policy.namespaces for option in (SEPARATE if each == "--unshare-all" else (each,))]
    return dataclasses.replace(policy, namespaces=tuple(options), seccomp=ALLOW_ALL)


def show(source: str, *options: str) -> Callable[[Policy], Policy]:
    def apply(policy: Policy) -> Policy:
        bind = ("--ro-bind", f"/tmp/{len(policy.mounts)}", source)
        files = (*policy.files, *bind, *options)
        return dataclasses.replace(policy, mounts=(*policy.mounts, source), files=files)

    return apply


def with_proc(policy: Policy) -> Policy:
    return dataclasses.replace(policy, files=(*policy.files, "--proc", "/proc"))


def with_token(policy: Policy) -> Policy:
    return dataclasses.replace(policy, environment=(*policy.environment, "--setenv", "API_TOKEN", "canary"))


# The mechanism, what is done to it, the cases that it alone holds, and what the self-test says (None: nothing, since
# a number is only larger).
MUTATIONS: dict[str, tuple[Callable[[Policy], Policy], tuple[str, ...], str | None]] = {
    "system calls": (
        change(seccomp=ALLOW_ALL),
        ("net_loopback_service", "daemon_left_behind", "memory_sysv_shm", "dangerous_syscalls"),
        "sockets not held; processes not held; shared memory not held",
    ),
    "network": (share_network, ("net_loopback_service",), r"shared_namespaces is \['net'\]; network not held"),
    "read-only root": (change(seals=()), ("write_outside_tmp",), "root folder not held"),
    "no proc": (with_proc, ("proc_tricks",), "proc not held"),
    "no host files": (show("/etc"), ("read_shadow",), "host files not held"),
    "environment": (with_token, ("read_environment_tokens",), None),
    "size of files": (limit("FSIZE", 1 << 50), ("fsize_big_file",), "large files not held"),
    "memory": (limit("AS", 64 << 30), (), "memory not held"),
    "number of descriptors": (limit("NOFILE", 512), ("fd_exhaustion",), None),
    "size of tmp": (change(tmp_options="size=200m,mode=0700"), ("fill_tmpfs",), "full disk not held"),
}
LARGE = re.compile(r"^ESCAPED|too many open files (\d{3})", re.MULTILINE | re.IGNORECASE)


async def run_case(policy: Policy, name: str) -> CellResult:
    worker = await Worker.start(policy, slot=1)
    try:
        with listener() as server:
            return await worker.run(case_code(name, server.getsockname()[1]), timeout=5)
    finally:
        await worker.kill()


@pytest.mark.parametrize("mechanism", MUTATIONS)
def test_without_a_mechanism_its_cases_escape(mechanism: str) -> None:
    mutate, names, _ = MUTATIONS[mechanism]
    for name in names:
        result = asyncio.run(run_case(mutate(bare_policy()), name))
        assert LARGE.search(result.stdout), f"{name}: {result}"


@pytest.mark.parametrize("mechanism", [name for name, (_, _, said) in MUTATIONS.items() if said])
def test_without_a_mechanism_the_self_test_refuses(mechanism: str) -> None:
    mutate, _, said = MUTATIONS[mechanism]
    with pytest.raises(selftest.SandboxUnavailable, match=str(said)):
        asyncio.run(selftest.check_isolation(mutate(bare_policy())))


def test_bubblewrap_run_by_root_is_refused() -> None:
    policy = bare_policy()
    if not policy.drop_user:
        pytest.skip("needs root")
    with pytest.raises(selftest.SandboxUnavailable, match="root is True"):
        asyncio.run(selftest.check_isolation(dataclasses.replace(policy, drop_user=False)))


def test_memory_is_bounded_by_the_address_space_alone() -> None:
    code = "import mmap\nx = mmap.mmap(-1, 3 << 30)\nprint('ESCAPED')"  # untouched pages cost nothing

    async def run(policy: Policy) -> CellResult:
        worker = await Worker.start(policy, slot=1)
        try:
            return await worker.run(code, timeout=5)
        finally:
            await worker.kill()

    assert asyncio.run(run(bare_policy())).stdout.endswith("Cannot allocate memory\n")
    assert asyncio.run(run(limit("AS", 8 << 30)(bare_policy()))).stdout == "ESCAPED\n"


def test_files_are_bounded_in_number() -> None:
    code = "n = 0\nwhile n < 5000:\n    open(f'/tmp/{n}', 'w').close()\n    n += 1"

    async def run() -> list[str]:
        worker = await Worker.start(bare_policy(), slot=1)
        try:
            first = await worker.run(code, timeout=5)
            return [first.stdout, (await worker.run("print(n)", timeout=5)).stdout]
        finally:
            await worker.kill()

    error, count = asyncio.run(run())
    assert "No space left on device" in error
    assert 2000 < int(count) < 2048


def test_a_missing_bubblewrap_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(selftest.SandboxUnavailable, match="apt-get install bubblewrap") as refused:
        selftest.require_isolation()
    assert isinstance(refused.value, FourfoldError)
    assert refused.value.exit_code == 78


def test_another_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(selftest.SandboxUnavailable, match="needs Linux on x86_64, this is Linux on aarch64"):
        selftest.require_isolation()


def test_a_sandbox_that_cannot_start_says_why() -> None:
    policy = dataclasses.replace(bare_policy(), mounts=("/no/such/place",))
    with pytest.raises(selftest.SandboxUnavailable, match=r"cannot be isolated here: .*/no/such/place"):
        asyncio.run(selftest.check_isolation(policy))


def test_the_command_line_of_bubblewrap() -> None:
    """All that it is told, in order: a later mount would undo an earlier seal."""
    policy = bare_policy()
    command = policy.plan(3, 10, 11)["command"]
    binds = [command[i + 2] for i, option in enumerate(command) if option == "--ro-bind"]
    assert [place for place in binds if not place.startswith(("/py/", "/site/", "/usr/lib"))] == ["/drv.py"]
    assert command[1:15] == [
        *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
        *("--cap-drop", "ALL", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox", "--clearenv"),
    ]
    end = command.index("--remount-ro")
    assert command[end : end + 7] == ["--remount-ro", "/", "--json-status-fd", "5", "--seccomp", "4", "--"]
    assert [option for option in command[:end] if option in ("--bind", "--dev-bind")] == ["--dev-bind"] * 2 + ["--bind"]
    assert not {"--proc", "--dev", "--share-net", "--keep-unshare"} & set(command)
    assert policy.plan(3, 10, 11)["uid"] == (60_003 if policy.drop_user else None)


def test_the_filter_is_one_the_kernel_takes() -> None:
    program = session_filter()
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096
    assert struct.unpack("HBBI", program[-8:]) == (0x06, 0, 0, 0x00050001)
