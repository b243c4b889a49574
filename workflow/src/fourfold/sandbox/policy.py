"""What a session may see and use: the one place that says so. Everything else only carries it out."""

import base64
import importlib.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.errors import FourfoldError
from fourfold.sandbox.seccomp import cell_filter, session_filter

MIB = 1 << 20
MEMORY_BYTES = 2048 * MIB
TMP_BYTES = 64 * MIB
TMP_FILES = 2048
FIRST_UID = 60_000  # one user for each slot, above the system's and people's accounts
INSIDE_UID = 65_534
WARM = ("numpy", "sympy")
PACKAGES = (*WARM, "mpmath", "scipy")
_DRIVER = Path(__file__).with_name("driver.py")
_ENVIRONMENT = {"PATH": "/nowhere", "HOME": "/tmp", "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"}
_DEVICES = ("/dev/null", "/dev/urandom")


@dataclass(frozen=True)
class Policy:
    """How a session is started; made by `make_policy`.

    Attributes:
        bwrap: path of bubblewrap.
        mounts: files and folders of this machine that the session sees, read-only; the launcher puts the first at
            /tmp/0, and so on.
        namespaces: bubblewrap's options for namespaces and privileges.
        environment: bubblewrap's options for the environment.
        files: bubblewrap's options that build the file system out of `mounts`.
        seals: bubblewrap's options that make that read-only, the last that change it.
        program: the command to run inside.
        seccomp: the first filter (the second is an argument of `program`).
        limits: resource limits by name, soft and hard.
        tmp_options: mount options of the session's /tmp without its owner.
        drop_user: run as the slot's own user; false where the service is not root and cannot.
    """

    bwrap: str
    mounts: tuple[str, ...]
    namespaces: tuple[str, ...]
    environment: tuple[str, ...]
    files: tuple[str, ...]
    seals: tuple[str, ...]
    program: tuple[str, ...]
    seccomp: bytes
    limits: dict[str, tuple[int, int]]
    tmp_options: str
    drop_user: bool

    def plan(self, slot: int, control: int, status: int) -> dict[str, Any]:
        """The launcher's argument for one session; `control` and `status` are descriptors that it inherits."""
        uid = FIRST_UID + slot if self.drop_user else None
        owner = f",uid={uid},gid={uid}" if uid is not None else ""
        return {
            "mounts": self.mounts,
            "tmp": self.tmp_options + owner,
            "uid": uid,
            "limits": self.limits,
            "filter": base64.b64encode(self.seccomp).decode(),
            "control": control,
            "status": status,
            "command": [
                self.bwrap,
                *self.namespaces,
                *self.environment,
                *self.files,
                *self.seals,
                *("--json-status-fd", "5", "--seccomp", "4", "--"),
                *self.program,
            ],
        }


def make_policy(bwrap: str) -> Policy:
    """The policy for this machine's Python, with the packages that cells may import.

    Raises FourfoldError where a package is missing.
    """
    places = {**_python_files(), **_package_files(), str(_DRIVER): "/drv.py"}
    files: list[str] = []
    for index, target in enumerate(places.values()):
        files += ["--ro-bind", f"/tmp/{index}", target]
    for name in ("lib", "lib64"):
        files += ["--symlink", f"usr/{name}", f"/{name}"]
    for device in _DEVICES:
        files += ["--dev-bind", device, device]
    files += ["--bind", "/tmp/tmp", "/tmp", "--chdir", "/tmp"]
    environment = ["--clearenv"]
    for name, value in _ENVIRONMENT.items():
        environment += ["--setenv", name, value]
    root = os.geteuid() == 0
    limits = {
        "AS": (MEMORY_BYTES, MEMORY_BYTES),
        "CPU": (120, 125),
        "NOFILE": (64, 64),
        "FSIZE": (TMP_BYTES, TMP_BYTES),
        "CORE": (0, 0),
        "STACK": (16 * MIB, 16 * MIB),  # every thread reserves as much
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
        # Counts all processes of a user: only where the session's user is its own.
        **({"NPROC": (64, 64)} if root else {}),
    }
    return Policy(
        bwrap=bwrap,
        mounts=tuple(places),
        namespaces=(
            *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
            *("--cap-drop", "ALL", "--uid", str(INSIDE_UID), "--gid", str(INSIDE_UID), "--hostname", "sandbox"),
        ),
        environment=tuple(environment),
        files=tuple(files),
        # bubblewrap's own root is a writable tmpfs as large as half of the memory.
        seals=("--remount-ro", "/"),
        program=(
            *(f"/py/bin/python{_version()}", "-I", "-S", "-B", "-X", "utf8", "/drv.py"),
            *(base64.b64encode(cell_filter()).decode(), *WARM),
        ),
        seccomp=session_filter(),
        limits=limits,
        tmp_options=f"size={TMP_BYTES},nr_inodes={TMP_FILES},mode=0700",
        drop_user=root,
    )


def _version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _python_files() -> dict[str, str]:
    """Python itself, its library, and the system's shared libraries: paths here to paths inside.

    Named one by one, so that a Python in /usr does not bring a shell along.
    """
    version = _version()
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    places = {str(executable): f"/py/bin/python{version}", sysconfig.get_path("stdlib"): f"/py/lib/python{version}"}
    shared = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
    if shared.suffix != ".a" and shared.is_file():
        places[str(shared)] = f"/py/lib/{shared.name}"
    multiarch = sysconfig.get_config_var("MULTIARCH")
    for library in (f"/usr/lib/{multiarch}", "/usr/lib64"):
        if Path(library).is_dir():
            places[library] = library
    return places


def _package_files() -> dict[str, str]:
    places = {}
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            raise FourfoldError(f"the sandbox needs the package {name}, which is not installed; run `make setup`")
        folder = Path(found.submodule_search_locations[0])
        places[str(folder)] = f"/site/{name}"
        libraries = folder.with_name(f"{name}.libs")  # where wheels keep their shared libraries
        if libraries.is_dir():
            places[str(libraries)] = f"/site/{name}.libs"
    return places
