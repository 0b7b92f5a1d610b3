"""System call filters: small programs in classic BPF that the kernel runs before each system call of a process (seccomp(2)).

There are two. `program_filter`, for untrusted programs, allows what an interpreter needs to compute and refuses
everything else; a deny list would be out of date with the next kernel. `grader_filter`, for graders, allows everything
but two kinds of accident: it asks a supervisor (supervisor.py) before a process starts, which counts them, and refuses
to signal the processes above it.
System call numbers: Linux, arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import errno
import platform
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence

_ALLOW, _NOTIFY, _KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_X32 = 0x40000000  # system calls of the x32 ABI on x86_64
_NEW = 424  # a kernel may lack calls from this number on, and C libraries work without them
_CLONE_THREAD = 0x00010000
_OPEN_WRITES = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND
_FCNTL = (0, 1, 2, 3, 4, 1030)  # duplicate, flags; not F_SETOWN, which directs signals at other processes

# name: (x86_64, aarch64); None: the architecture does not have it
_PLAIN = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "newfstatat": (262, 79), "statx": (332, 291), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137), "sigaltstack": (131, 132),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "faccessat": (269, 48),
    "faccessat2": (439, 439), "pipe": (22, None), "pipe2": (293, 59), "select": (23, None), "pselect6": (270, 72), "poll": (7, None),
    "ppoll": (271, 73), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "sched_yield": (24, 124), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "getcwd": (79, 17),
    "getdents64": (217, 61), "readlink": (89, None), "readlinkat": (267, 78), "gettimeofday": (96, 169), "time": (201, None),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98), "sched_getaffinity": (204, 123), "set_tid_address": (218, 96),
    "set_robust_list": (273, 99), "getrandom": (318, 278), "rseq": (334, 293), "membarrier": (324, 283),
    "restart_syscall": (219, 128), "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None), "pause": (34, None),
    "arch_prctl": (158, None), "getrlimit": (97, 163), "getcpu": (309, 168), "umask": (95, 166),
}  # fmt: skip
_OTHER = {
    "open": (2, None), "openat": (257, 56), "fcntl": (72, 25), "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
    "clone": (56, 220), "clone3": (435, 435), "fork": (57, None), "vfork": (58, None), "seccomp": (317, 277),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column in the tables, AUDIT_ARCH

_Instruction = tuple[int, int, int, int]
_Test = tuple[int, int, int, bool]  # argument word, kind of comparison, value, expected result


def supported() -> bool:
    """Whether the table of system calls covers this machine."""
    return sys.platform == "linux" and sys.maxsize > 2**32 and platform.machine() in _MACHINES


def number(name: str) -> int | None:
    """The number of a system call on this architecture, None if it has none."""
    column, _ = _MACHINES[platform.machine()]
    return (_PLAIN.get(name) or _OTHER[name])[column]


def program_filter(pid: int) -> bytes:
    """For the process `pid`, which may compute, read files, write to descriptors it already has, and signal itself."""
    own: _Test = (_argument(0), _EQUAL, pid, True)
    only_get: list[_Test] = [(_argument(2) + half, _EQUAL, 0, True) for half in (0, 4)]
    body = [
        *_rule("open", [(_argument(1), _ANY_BIT, _OPEN_WRITES, False)], _ALLOW, _refuse(errno.EACCES)),
        *_rule("openat", [(_argument(2), _ANY_BIT, _OPEN_WRITES, False)], _ALLOW, _refuse(errno.EACCES)),
        *_rule("kill", [own], _ALLOW, _refuse(errno.EPERM)),
        *_rule("tgkill", [own], _ALLOW, _refuse(errno.EPERM)),
        *_rule("prlimit64", only_get, _ALLOW, _refuse(errno.EPERM)),
        *_one_of("fcntl", _argument(1), _FCNTL),
    ]
    for name in _PLAIN:
        body += _rule(name, [], _ALLOW, _ALLOW)
    body += [
        (_AT_LEAST, 0, 1, _NEW),
        (_RETURN, 0, 0, _refuse(errno.ENOSYS)),
        (_RETURN, 0, 0, _refuse(errno.EPERM)),
    ]
    return _assemble(body, other_architecture=_KILL)


def grader_filter(protected: Iterable[int]) -> bytes:
    """Starting a process notifies the listener; a signal to a process id or group in `protected`, or to all, is refused."""
    thread: list[_Test] = [(_argument(0), _ANY_BIT, _CLONE_THREAD, True)]
    body = [
        *_rule("clone", thread, _ALLOW, _NOTIFY),
        # a filter cannot read its flags; libraries fall back to clone
        *_rule("clone3", [], _refuse(errno.ENOSYS), 0),
        *_rule("fork", [], _NOTIFY, 0),
        *_rule("vfork", [], _NOTIFY, 0),
    ]
    targets = {-1, *protected, *(-pid for pid in protected)}
    spared: list[_Test] = [(_argument(0), _EQUAL, target & 0xFFFFFFFF, False) for target in sorted(targets)]
    body += _rule("kill", spared, _ALLOW, _refuse(errno.EPERM))
    return _assemble([*body, (_RETURN, 0, 0, _ALLOW)], other_architecture=_ALLOW)


def _argument(index: int) -> int:
    """Offset of the lower half of an argument (both architectures are little-endian)."""
    return 16 + 8 * index


def _refuse(error: int) -> int:
    return 0x00050000 | error


def _rule(name: str, tests: Sequence[_Test], then: int, otherwise: int) -> list[_Instruction]:
    """For this call: `then` if all tests hold, else `otherwise`. Other calls fall through."""
    nr = number(name)
    if nr is None:
        return []
    body: list[_Instruction] = []
    for place, (word, kind, value, holds) in enumerate(tests):
        skip = 2 * (len(tests) - place - 1) + 1  # to the last instruction
        body += [(_LOAD, 0, 0, word), (kind, 0, skip, value) if holds else (kind, skip, 0, value)]
    body.append((_RETURN, 0, 0, then))
    if tests:
        body.append((_RETURN, 0, 0, otherwise))
    return [(_EQUAL, 0, len(body), nr), *body]


def _one_of(name: str, word: int, values: Sequence[int]) -> Iterator[_Instruction]:
    """Allow the call if the argument is one of `values`."""
    nr = number(name)
    assert nr is not None
    yield (_EQUAL, 0, len(values) + 3, nr)
    yield (_LOAD, 0, 0, word)
    for place, value in enumerate(values):
        yield (_EQUAL, len(values) - place, 0, value)
    yield (_RETURN, 0, 0, _refuse(errno.EPERM))
    yield (_RETURN, 0, 0, _ALLOW)


def _assemble(body: Sequence[_Instruction], *, other_architecture: int) -> bytes:
    _, architecture = _MACHINES[platform.machine()]
    head: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, other_architecture),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if platform.machine() == "x86_64":
        head += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, other_architecture)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in [*head, *body])
