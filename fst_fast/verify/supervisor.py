"""The process between the trainer and a verifying child: when the child exits, it kills everything that the child started.

A process group is not enough. A grandchild that started its own session, or whose parent has exited, escapes the group
and may live for days. The supervisor is a subreaper (prctl(2)): orphans below it become its children, so it finds all
of them, and it finishes only when the kernel reports that none is left. Through seccomp notifications it also decides
whether another process may start. That limit is exact and binds root too, unlike RLIMIT_NPROC. It needs no cgroup and
no namespace, which an ordinary user in a container does not have.

It kills everything when the trainer shuts down its end of the control socket (also by dying), when the child exits, and
on SIGTERM. Then it sends the child's wait status and exits. On systems other than Linux it is a plain parent that kills
the child's process group.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

from fst_fast.verify import confinement, seccomp

STATUS = struct.Struct("!i")
MAX_PROCESSES = 64  # per supervisor; up to twice as many if all of them start one at the same moment
_LINUX = sys.platform == "linux"
_NOTIFICATION = struct.Struct("=QII64s")  # struct seccomp_notif: id, pid, flags, data
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_CONTINUE = 1


class _Stop(BaseException):
    """The first SIGTERM while `_watching`. A later one is ignored: it would interrupt the shutdown itself."""


_watching = True


def fork_supervised(control: socket.socket, trainer: int) -> None:
    """Fork. Returns in the child; this process becomes its supervisor and never returns. control: one end of a socket
    pair whose other end the parent process `trainer` holds."""
    if _LINUX:
        confinement.prctl(confinement.PR_SET_CHILD_SUBREAPER, 1)
        confinement.prctl(confinement.PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGTERM, _stop)
    if os.getppid() != trainer:  # the trainer died before the lines above
        os._exit(1)
    supervisor = os.getpid()
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child:
        theirs.close()
        _supervise(control, child, ours)
    ours.close()
    control.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    if _LINUX:
        confinement.prctl(confinement.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
    with theirs:
        listener = _limit_processes([trainer, os.getpgid(trainer), supervisor])
        socket.send_fds(theirs, [b"."], [] if listener is None else [listener])
        if listener is not None:
            os.close(listener)


def unlimited_reason() -> str:
    """Why this system cannot limit the number of a grader's processes; "" if it can. Tested in a child process."""
    if not seccomp.supported():
        return f"no limit: there is no table of system calls for {platform.machine()} on {sys.platform}"
    child = os.fork()
    if child == 0:
        refused = True
        try:
            refused = _limit_processes([]) is None
        finally:
            os._exit(refused)
    _, status = os.waitpid(child, 0)
    return "no limit: seccomp notifications (Linux 5.5) are refused here" if status else ""


def _kernel() -> tuple[int, int]:
    major, minor, *_ = os.uname().release.split("-")[0].split(".")
    return int(major), int(minor)


def _limit_processes(protected: list[int]) -> int | None:
    """Install the grader filter; returns the notification descriptor, or None if this system has no such notification
    (`fst doctor` reports it)."""
    if not seccomp.supported() or _kernel() < (5, 5):  # the first that can let a call continue
        return None
    call = seccomp.number("seccomp")
    assert call is not None
    try:
        return confinement.install_filter(seccomp.grader_filter(protected), call, listener=True)
    except OSError:
        return None


def _stop(*_: object) -> None:
    global _watching
    if _watching:
        _watching = False
        raise _Stop


def _supervise(control: socket.socket, child: int, channel: socket.socket) -> NoReturn:
    """Run until the child or the trainer exits, kill all descendants, and report the child's wait status."""
    global _watching
    status = 0
    try:
        try:
            for descriptor in (0, 1):  # the trainer's pipes: they must close when the child closes them
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, descriptor)
                os.close(null)
            status = _watch(control, child, channel)
        finally:
            _watching = False
    except (_Stop, OSError):
        pass
    finally:
        status = kill_descendants(child, status)
        with contextlib.suppress(OSError):
            control.sendall(STATUS.pack(status))
        os._exit(0)


def _watch(control: socket.socket, child: int, channel: socket.socket) -> int:
    """Answer notifications and reap processes until the child exits (its wait status) or the trainer asks to stop (-1)."""
    wake, woken = os.pipe()
    for descriptor in (wake, woken):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with channel:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(control, select.POLLIN)
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    while True:
        for pid, status in _reap():
            if pid == child:
                return status
        for descriptor, event in poll.poll():
            if descriptor == control.fileno():
                return -1
            if descriptor == wake:
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 4096)
            elif event & select.POLLIN:
                _answer_notification(descriptor)
            else:  # no process is left under the filter
                poll.unregister(descriptor)


def _answer_notification(listener: int) -> None:
    """Allow a process to start, or fail the call with EAGAIN, the error of the system's own limit."""
    request = bytearray(_NOTIFICATION.size)
    try:
        fcntl.ioctl(listener, _RECEIVE, request)
        identity, *_ = _NOTIFICATION.unpack(request)
        room = sum(1 for _ in _descendants()) < MAX_PROCESSES
        answer = (identity, 0, 0, _CONTINUE) if room else (identity, 0, -errno.EAGAIN, 0)
        fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(*answer)))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINTR):  # the requesting process is gone
            raise


def kill_descendants(child: int, status: int) -> int:
    """Kill and reap until no descendant is left; returns the child's wait status.

    Notifications are no longer answered, so with the filter no new process can start meanwhile."""
    while True:
        if _LINUX:
            for pid in list(_descendants()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == child:
            status = ended
        if pid == 0:
            time.sleep(0.001)


def _reap() -> Iterator[tuple[int, int]]:
    """Reap every child that has exited, orphans included, so that none stays a zombie."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def _descendants() -> Iterator[int]:
    """Process ids below this one, as far as visible while processes come and go."""
    parents: dict[int, list[int]] = {}
    waiting = children(os.getpid())
    if waiting is None:  # a kernel without CONFIG_PROC_CHILDREN
        for name in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/stat") as file:
                parents.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(name))
        waiting = parents.get(os.getpid(), [])
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += parents.get(pid, []) if parents else children(pid) or []


def children(pid: int) -> list[int] | None:
    """Process ids of a process's children. None if the kernel does not list them or the process is gone."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return None
    found: list[int] = []
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/children") as file:
                found += map(int, file.read().split())
        except FileNotFoundError:
            if thread == str(os.getpid()):
                return None
        except OSError:
            continue
    return found
