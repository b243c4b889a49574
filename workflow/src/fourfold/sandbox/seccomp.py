"""The system calls that a session may make, as a program for the kernel's filter (classic BPF, x86-64).

An allowlist: whatever is not named fails with EPERM, also what kernels to come will add. The machine's other call
tables (32-bit, x32) kill the process. No library is needed: the program is a row of comparisons.
"""

import struct

MACHINES = ("x86_64",)

CALLS = {
    "read": 0,
    "write": 1,
    "open": 2,
    "close": 3,
    "stat": 4,
    "fstat": 5,
    "lstat": 6,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "ioctl": 16,
    "pread64": 17,
    "pwrite64": 18,
    "readv": 19,
    "writev": 20,
    "access": 21,
    "pipe": 22,
    "select": 23,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "dup": 32,
    "dup2": 33,
    "pause": 34,
    "nanosleep": 35,
    "getitimer": 36,
    "alarm": 37,
    "setitimer": 38,
    "getpid": 39,
    "clone": 56,
    "execve": 59,
    "exit": 60,
    "wait4": 61,
    "kill": 62,
    "uname": 63,
    "fcntl": 72,
    "flock": 73,
    "fsync": 74,
    "fdatasync": 75,
    "truncate": 76,
    "ftruncate": 77,
    "getdents": 78,
    "getcwd": 79,
    "chdir": 80,
    "fchdir": 81,
    "rename": 82,
    "mkdir": 83,
    "rmdir": 84,
    "creat": 85,
    "link": 86,
    "unlink": 87,
    "symlink": 88,
    "readlink": 89,
    "chmod": 90,
    "fchmod": 91,
    "umask": 95,
    "gettimeofday": 96,
    "getrlimit": 97,
    "getrusage": 98,
    "sysinfo": 99,
    "times": 100,
    "getuid": 102,
    "getgid": 104,
    "geteuid": 107,
    "getegid": 108,
    "getppid": 110,
    "getpgrp": 111,
    "getgroups": 115,
    "getresuid": 118,
    "getresgid": 120,
    "getpgid": 121,
    "getsid": 124,
    "rt_sigpending": 127,
    "rt_sigtimedwait": 128,
    "rt_sigsuspend": 130,
    "sigaltstack": 131,
    "statfs": 137,
    "fstatfs": 138,
    "getpriority": 140,
    "sched_getparam": 143,
    "sched_getscheduler": 145,
    "sched_get_priority_max": 146,
    "sched_get_priority_min": 147,
    "sched_rr_get_interval": 148,
    "prctl": 157,
    "arch_prctl": 158,
    "gettid": 186,
    "time": 201,
    "tkill": 200,
    "futex": 202,
    "sched_getaffinity": 204,
    "epoll_create": 213,
    "getdents64": 217,
    "set_tid_address": 218,
    "restart_syscall": 219,
    "fadvise64": 221,
    "clock_gettime": 228,
    "clock_getres": 229,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "epoll_wait": 232,
    "epoll_ctl": 233,
    "tgkill": 234,
    "waitid": 247,
    "openat": 257,
    "mkdirat": 258,
    "newfstatat": 262,
    "unlinkat": 263,
    "renameat": 264,
    "linkat": 265,
    "symlinkat": 266,
    "readlinkat": 267,
    "fchmodat": 268,
    "faccessat": 269,
    "pselect6": 270,
    "ppoll": 271,
    "set_robust_list": 273,
    "get_robust_list": 274,
    "utimensat": 280,
    "epoll_pwait": 281,
    "timerfd_create": 283,
    "eventfd": 284,
    "fallocate": 285,
    "timerfd_settime": 286,
    "timerfd_gettime": 287,
    "eventfd2": 290,
    "epoll_create1": 291,
    "dup3": 292,
    "pipe2": 293,
    "preadv": 295,
    "pwritev": 296,
    "prlimit64": 302,
    "getcpu": 309,
    "renameat2": 316,
    "getrandom": 318,
    "membarrier": 324,
    "preadv2": 327,
    "pwritev2": 328,
    "statx": 332,
    "rseq": 334,
    "close_range": 436,
    "faccessat2": 439,
    "epoll_pwait2": 441,
}
"""What Python, numpy and sympy use, by the numbers of x86-64. Not here, so refused: sockets, memfd_create and shared
memory (which RLIMIT_AS does not count), mount and namespace calls, ptrace, keys, bpf, io_uring, timers that outlive a
process, priorities, limits, owners, and every call that makes a process."""

_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_CLONE3 = 435
_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38
_NAME_CALLS = (15, 16)  # PR_SET_NAME, PR_GET_NAME
_SET_SECCOMP = 22  # PR_SET_SECCOMP: the driver adds the second filter with it
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what isatty() and the io module ask.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes each, low half first

_Instruction = tuple[int, int, int, int]


def session_filter() -> bytes:
    """The filter that bubblewrap sets before it starts Python: `struct sock_filter[]`, 8 bytes an instruction.

    Of `clone` it allows threads only; `clone3`, whose arguments a filter cannot see, does not exist (ENOSYS: the C
    library then uses `clone`). `execve` is allowed, since Python itself is started after it: see `cell_filter`.
    """
    rules = [
        *_only("clone", 0, _ANY_BIT, (_CLONE_THREAD,)),
        *_only("prctl", 0, _EQUAL, (*_NAME_CALLS, _SET_SECCOMP)),
        *_only("ioctl", 1, _EQUAL, _IOCTLS),
        *_reads_limits_only(),
    ]
    special = ("clone", "prctl", "ioctl", "prlimit64")
    for name, number in CALLS.items():
        if name not in special:
            rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    return _program(rules, _ERRNO | _EPERM)


def cell_filter() -> bytes:
    """The filter that the driver adds before any foreign code runs: no other program, and no more filters."""
    rules: list[_Instruction] = [(_EQUAL, 0, 1, CALLS["execve"]), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    return _program([*rules, *_only("prctl", 0, _EQUAL, _NAME_CALLS)], _ALLOW)


def _only(name: str, argument: int, test: int, values: tuple[int, ...]) -> list[_Instruction]:
    """Allows a call if the low half of an argument passes the test with one of the values, else EPERM."""
    checks: list[_Instruction] = [(_LOAD, 0, 0, _ARGUMENT + 8 * argument)]
    for value in values:
        checks += [(test, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    checks.append((_RETURN, 0, 0, _ERRNO | _EPERM))
    return [(_EQUAL, 0, len(checks), CALLS[name]), *checks]


def _reads_limits_only() -> list[_Instruction]:
    """Allows prlimit64 if it sets nothing: its third argument, a pointer, is null in both halves."""
    checks: list[_Instruction] = []
    for half in (0, 4):
        checks += [(_LOAD, 0, 0, _ARGUMENT + 16 + half), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    checks.append((_RETURN, 0, 0, _ALLOW))
    return [(_EQUAL, 0, len(checks), CALLS["prlimit64"]), *checks]


def _program(rules: list[_Instruction], otherwise: int) -> bytes:
    head: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _ARCH_X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NR),
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL),
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in [*head, *rules, (_RETURN, 0, 0, otherwise)])
