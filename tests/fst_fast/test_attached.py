"""A server that a run starts ends with it, whatever else it has started and however the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fst_fast.verify import attached

# Starts a child in a session of its own and an orphan, says their process ids, and stays.
SERVER = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
orphan = subprocess.run(["sh", "-c", "sleep 1000 >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True).stdout
print(os.getpid(), child.pid, orphan.strip(), os.environ.get("ADDED"), os.environ.get("TAKEN"), flush=True)
time.sleep(1000)
"""
RUN = """
import os, sys, time
from fst_fast.verify import attached
os.environ["TAKEN"] = "here"
server = attached.start([sys.executable, "-c", sys.argv[1]], log=1, changes={"ADDED": "yes", "TAKEN": None})
if sys.argv[2] == "end":
    sys.stdin.readline()
    attached.end(server)
time.sleep(1000)
"""


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int]) -> bool:
    """Whether all have ended, within ten seconds."""
    until = time.monotonic() + 10
    while any(map(runs, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("how", ["end", "kill -9", "server dies"])
def test_nothing_of_a_server_outlives_its_run(how: str) -> None:
    root = str(Path(attached.__file__).parents[2])
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, SERVER, "end" if how == "end" else "wait"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    try:
        assert run.stdout is not None
        assert run.stdin is not None
        *pids, added, taken = run.stdout.readline().split()
        assert (added, taken) == ("yes", "None")
        server, *others = map(int, pids)
        if how == "kill -9":
            run.send_signal(signal.SIGKILL)
            run.wait()
        elif how == "server dies":
            os.kill(server, signal.SIGKILL)
        else:
            run.stdin.write("\n")
            run.stdin.flush()
        assert gone([server, *others])
    finally:
        run.kill()
        run.communicate()


def test_a_program_that_is_not_there_is_said_in_the_log(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as log:
        process = attached.start([str(tmp_path / "no-such")], log=log.fileno(), changes={})
        assert process.wait() == 127
    assert "no-such: No such file or directory" in (tmp_path / "log").read_text()
