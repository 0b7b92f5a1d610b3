"""A command whose whole tree of processes ends with the process that started it: `python -m fst_fast.verify.attached PID COMMAND ...`.

For a server that a run starts. Killing the server's process is not enough: its own children would go on, and nobody would kill it at all
after a kill -9 of the run. This process stands between the two. It is a subreaper, so it finds every descendant, and it ends them all when PID dies or
closes this process's standard input, when the command exits, and on SIGTERM. It exits with the command's status.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import fst_fast
from fst_fast.verify import confinement
from fst_fast.verify.supervisor import kill_descendants

GRACE_S = 5.0  # between SIGTERM to the command and SIGKILL to all
_LINUX = sys.platform == "linux"


def start(command: Sequence[str], *, log: int, changes: Mapping[str, str | None]) -> subprocess.Popen[bytes]:
    """Start `command` attached to this process. log: the descriptor that gets its output. changes: of its environment; None: not set.

    The standard input of what is returned must stay open."""
    return subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid()), json.dumps(changes), *command],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": str(Path(fst_fast.__file__).parents[1])},
        start_new_session=True,  # an interrupt of the terminal is for the run, which still needs its server
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End what `start` started, and wait until all of it is gone."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait()


def main(parent: int, changes: Mapping[str, str | None], command: Sequence[str]) -> int:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    if _LINUX:
        confinement.prctl(confinement.PR_SET_CHILD_SUBREAPER, 1)
        confinement.prctl(confinement.PR_SET_PDEATHSIG, signal.SIGTERM)
    env = {key: value for key, value in {**os.environ, **changes}.items() if value is not None}
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=env, preexec_fn=_die_with_parent)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    closed = select.poll()
    closed.register(0, select.POLLIN)
    while os.getppid() == parent and not stopped and child.poll() is None and not closed.poll(200):
        pass
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    kill_descendants(child.pid, 0)
    return child.returncode or 0


def _die_with_parent() -> None:
    if _LINUX:
        confinement.prctl(confinement.PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]))
