"""Becomes bubblewrap: a program of its own, which prepares what bubblewrap cannot do and then executes it.

Bubblewrap is never run by root: as root this drops to a user of the session's own first, after it has mounted the
files (Python may live in root's home) and a /tmp with a limit on its size and on its number of files, for which
bubblewrap has no option. Another user does the same in a user namespace. It uses the standard library alone, and
starts in milliseconds.

Its one argument is JSON: `mounts` (paths on this machine, which appear as /tmp/0, /tmp/1, …), `tmp` (mount options of
the session's /tmp, which appears as /tmp/tmp), `uid` (or null: stay who you are), `limits` (name: [soft, hard]),
`filter` (base64), `control` and `status` (open descriptors) and `command`.
"""

import base64
import ctypes
import fcntl
import json
import os
import resource
import stat
import sys
from typing import Any

_NEWNS, _NEWUSER = 0x00020000, 0x10000000
_NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_CONTROL, _FILTER, _STATUS = 3, 4, 5  # where the command line of bubblewrap expects them
_FIRST_FREE = 20
_libc = ctypes.CDLL(None, use_errno=True)


def main(plan: dict[str, Any]) -> None:
    """Prepares and executes. Raises OSError, which Python prints to standard error: the service reads it there."""
    control, status = (fcntl.fcntl(plan[name], fcntl.F_DUPFD, _FIRST_FREE) for name in ("control", "status"))
    enter_namespace(plan["uid"] is None)
    mount_files(plan["mounts"], plan["tmp"])
    if plan["uid"] is not None:
        os.setgroups([])
        os.setresgid(plan["uid"], plan["uid"], plan["uid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])
    filter_file = fcntl.fcntl(os.memfd_create("filter"), fcntl.F_DUPFD, _FIRST_FREE)
    os.write(filter_file, base64.b64decode(plan["filter"]))
    os.lseek(filter_file, 0, os.SEEK_SET)
    for source, target in ((control, _CONTROL), (filter_file, _FILTER), (status, _STATUS)):
        os.dup2(source, target)
    os.closerange(_STATUS + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    os.nice(10)
    for name, values in plan["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), tuple(values))
    os.execve(plan["command"][0], plan["command"], {})


def enter_namespace(unprivileged: bool) -> None:
    """A mount namespace of its own, from which nothing spreads; without root, in a user namespace of its own."""
    uid, gid = os.getuid(), os.getgid()
    check(_libc.unshare(_NEWNS | (_NEWUSER if unprivileged else 0)), "unshare")
    if unprivileged:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    mount("none", "/", "", _REC | _PRIVATE)


def mount_files(sources: list[str], options: str) -> None:
    """Mounts the files and folders, and the session's /tmp, below this namespace's /tmp."""
    # Opened first, since what is below /tmp disappears under the mount.
    opened = [os.open(source, os.O_PATH) for source in sources]
    mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=64k,nr_inodes=256,mode=0755")
    for index, source in enumerate(opened):
        place = f"/tmp/{index}"
        if stat.S_ISDIR(os.fstat(source).st_mode):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
        mount(f"/proc/self/fd/{source}", place, "", _BIND | _REC)
        os.close(source)
    os.mkdir("/tmp/tmp")
    mount("tmpfs", "/tmp/tmp", "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2). Raises OSError naming the place."""
    done = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    check(done, f"mount on {target}")


def check(result: int, what: str) -> None:
    """Raises OSError for a system call that failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
