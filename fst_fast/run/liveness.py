"""Who is still there, when a process of the run waits for another in vain: it is named, and what it was doing.

Every process holds a lock on a file of its own, RUN/processes/RANK, and writes there what it is at. The system drops the lock when the
process ends, however it ends, so a lock that can be had belongs to a process that has ended; this works between machines as far as their
common file system has locks. Where all locks are held, some process is stuck: what they are at is listed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

from fst_fast.run.folder import disk_errors

FOLDER = "processes"
_PATIENCE_S = 2.0  # a socket may be seen to close before the lock of the same process is dropped


class Liveness:
    """This process's sign of life; close it in the end."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        path = run_dir / FOLDER / str(rank)
        with disk_errors(f"{path} cannot be written"):
            path.parent.mkdir(exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            with contextlib.suppress(OSError):  # a file system without locks: nobody is named, nothing else
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.report("starting")

    def report(self, doing: str) -> None:
        """What this process does from now on."""
        with contextlib.suppress(OSError):  # never a reason to stop a run
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, doing.encode(), 0)

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def describe_missing(run_dir: Path, *, rank: int, world: int) -> str:
    """Which of the other processes has ended, as the beginning of a sentence; where none has, what each is at."""
    others = [other for other in range(world) if other != rank]
    until = time.monotonic() + _PATIENCE_S
    while True:
        ended = [other for other in others if _has_ended(run_dir / FOLDER / str(other))]
        if ended or time.monotonic() > until:
            break
        time.sleep(0.05)
    if ended:
        return "; ".join(f"process {other} has ended ({_doing(run_dir, other)})" for other in ended)
    return "a process does not answer; " + "; ".join(
        f"process {other} is at: {_doing(run_dir, other)}" for other in range(world)
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


def _doing(run_dir: Path, rank: int) -> str:
    try:
        return (run_dir / FOLDER / str(rank)).read_text() or "unknown"
    except (OSError, UnicodeDecodeError):
        return "unknown"
