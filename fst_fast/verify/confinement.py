"""Sandbox layers that a process applies to itself, irrevocably, before it runs an untrusted program. Linux, any user.

    seccomp    a filter of system calls (built by seccomp.py): no sockets, processes or threads, no file opened for writing
    Landlock   no file may be opened for reading except the interpreter's own library
    rlimits    address space, CPU seconds, open files; nothing written to files; no core dump

Uses few standard-library modules (importing typing and signal takes longer than all the others) and nothing of this
package: run_code starts a bare interpreter with this file as its program. It reads one frame on stdin (length, then a
marshalled dict), confines itself, reports on stderr which layers are unavailable, and runs the program, whose stdin is
the rest.
Sources: seccomp(2), landlock(7), kernel headers linux/seccomp.h and linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_SIGKILL = 9
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on every architecture
_RULESET_VERSION = 1
_PATH_BENEATH = 1
_EXECUTE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 2, 1 << 3
_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # bits of a ruleset, by version; 16 since version 5
_O_PATH = 0o10000000
HEADER = 4
# the first byte on stderr; then a line with the missing layers, then the program's own output
CONFINED = b"\0"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def prctl(option: int, value: int) -> None:
    """Call prctl(2). Raises OSError."""
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        raise _os_error()


def install_filter(program: bytes, seccomp: int, *, listener: bool = False) -> int:
    """Install a seccomp filter on this process and its future children. program: packed sock_filters. seccomp: the
    number of the seccomp system call. Returns the notification descriptor with `listener`, else 0. Raises OSError."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    code = _Filter(len(program) // 8, program)
    return _call(seccomp, _SET_MODE_FILTER, _NEW_LISTENER if listener else 0, ctypes.byref(code))


def restrict_files(readable: Sequence[str]) -> None:
    """Landlock: from now on this process can open only files beneath `readable`, for reading. Raises OSError."""
    version = _call(_CREATE_RULESET, None, 0, _RULESET_VERSION)
    handled = ctypes.c_uint64((1 << _FS_RIGHTS.get(version, 16)) - 1)
    ruleset = _call(_CREATE_RULESET, ctypes.byref(handled), 8, 0)
    for path in readable:
        try:
            descriptor = os.open(path, _O_PATH | os.O_CLOEXEC)
        except OSError:
            continue  # does not exist on this system
        rights = _EXECUTE | _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0)
        rule = _PathBeneath(rights, descriptor)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
        os.close(descriptor)
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _call(*arguments: Any) -> int:
    found = int(_libc.syscall(*arguments))
    if found < 0:
        raise _os_error()
    return found


def _os_error() -> OSError:
    return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _read(size: int) -> bytes:
    """Read exactly `size` bytes, unbuffered, because the rest of stdin belongs to the program."""
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            os._exit(1)
        data += more
    return data


def _confine(job: dict[str, Any]) -> list[str]:
    """Apply all layers; returns those that are unavailable, with the reasons."""
    missing = []
    for name, limit in (
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_CPU, job["cpu_s"]),
        (resource.RLIMIT_NOFILE, job["open_files"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(name, (limit, limit))
    try:
        restrict_files(job["readable"])
    except OSError as error:
        missing.append(f"Landlock: {error.strerror}")
    try:
        if job["filter"] is None:
            raise OSError(0, "no table of system calls for this architecture")
        install_filter(job["filter"], job["seccomp"])
    except OSError as error:
        missing.append(f"seccomp: {error.strerror}")
    return missing


def _main() -> None:
    job = marshal.loads(_read(int.from_bytes(_read(HEADER), "big")))
    prctl(PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != job["parent"]:  # the parent died before the prctl call
        os._exit(1)
    missing = _confine(job)
    os.write(2, CONFINED + ("; ".join(missing) + "\n").encode())
    if missing and job["required"]:
        os._exit(1)
    sys.argv = ["program"]
    try:
        exec(
            compile(job["source"], "program", "exec"), {"__name__": "__main__", "__builtins__": __builtins__}
        )
    except Exception as error:  # noqa: BLE001 - the program's own error, printed without this file's frames
        import traceback

        trace = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, trace)
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    _main()
