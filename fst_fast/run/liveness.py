"""Name the process that died or hangs, and what it was doing, when another one waits for it in vain.

Every process holds a lock on its own file, RUN/processes/RANK, and writes its current activity there. The system
releases the lock when the process ends in any way, so a lock that can be acquired belongs to a process that has ended.
This works across machines if their shared file system supports locks. If all locks are held, some process hangs, and
the activity of each is listed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from fst_fast.run.folder import disk_errors

FOLDER = "processes"
_LOCK_WAIT_S = 2.0  # a socket may close before the lock of the same process is released


class Liveness:
    """This process's lock file; close it at the end."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        path = run_dir / FOLDER / str(rank)
        with disk_errors(f"{path} cannot be written"):
            path.parent.mkdir(exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            # without file locks a dead process cannot be named; nothing else breaks
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.report("starting")

    def report(self, doing: str) -> None:
        """Write what this process is doing now."""
        with contextlib.suppress(OSError):  # a failure here must not stop a run
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, doing.encode(), 0)

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def describe_missing(run_dir: Path, *, rank: int, world: int) -> str:
    """Which other processes have ended, as the start of a sentence; if none has, the activity of every process."""
    others = [other for other in range(world) if other != rank]
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        ended = [other for other in others if _has_ended(run_dir / FOLDER / str(other))]
        if ended or time.monotonic() > until:
            break
        time.sleep(0.05)
    if ended:
        return "; ".join(f"process {other} has ended ({_activity(run_dir, other)})" for other in ended)
    return "a process does not answer; " + "; ".join(
        f"process {other} is at: {_activity(run_dir, other)}" for other in range(world)
    )


def _has_ended(path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _activity(run_dir: Path, rank: int) -> str:
    try:
        return (run_dir / FOLDER / str(rank)).read_text() or "unknown"
    except (OSError, UnicodeDecodeError):
        return "unknown"
