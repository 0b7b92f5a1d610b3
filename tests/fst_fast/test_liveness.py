"""Running and dead processes are told apart by their locks."""

import subprocess
import sys

from fst_fast.run.liveness import Liveness, describe_missing

CHILD = """
import os, signal, sys
from pathlib import Path
from fst_fast.run.liveness import Liveness
mine = Liveness(Path(sys.argv[1]), 1)
mine.report("step 3, update")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_was_killed_is_named_with_what_it_was_doing(tmp_path):
    here, third = Liveness(tmp_path, 0), Liveness(tmp_path, 2)
    assert subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], check=False).returncode == -9
    assert describe_missing(tmp_path, rank=0, world=3) == "process 1 has ended (step 3, update)"
    here.close(), third.close()


def test_if_no_process_has_ended_the_activity_of_each_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr("fst_fast.run.liveness._LOCK_WAIT_S", 0.0)
    processes = [Liveness(tmp_path, rank) for rank in (0, 1)]
    processes[0].report("step 12, rollouts in progress")
    processes[0].report("step 3, update")
    assert describe_missing(tmp_path, rank=0, world=2) == (
        "a process does not answer; process 0 is at: step 3, update; process 1 is at: starting"
    )
    for process in processes:
        process.close()
        process.close()
