"""What stands in for worker.train and its like in test_experiments.py: quick, and by its seed a run that fails in some way."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from fst_fast.config import Config
from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.run.folder import MARKER

FAILS_ONCE, KILLED, RAISES, WAITS, KILLS_THE_SERVER = 1, 2, 3, 4, 5


def train(config: Config, run_dir: Path, resume: bool) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "asked", "a") as asked:
        asked.write("resume " if resume else "new ")
    first = not (run_dir / MARKER).exists()
    (run_dir / MARKER).write_text("{}")
    (run_dir / "config.yaml").write_text(config_load.dump(config))
    if config.seed == FAILS_ONCE and first:
        raise UserError("no luck")
    if config.seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.seed == RAISES:
        raise RuntimeError("an unforeseen error")
    if config.seed == WAITS:
        signal.signal(signal.SIGTERM, lambda *_: (run_dir / "told to stop").touch() or sys.exit(1))
        signal.alarm(120)
        (run_dir.parents[1] / "waiting").write_text("")  # a pipe: the test reads until this is closed
        signal.pause()
    if config.seed == KILLS_THE_SERVER:
        os.kill(os.getppid(), signal.SIGKILL)
    (run_dir / "summary.json").write_text("{}")


def export(run_dir: Path, out: Path) -> None:
    assert (run_dir / "summary.json").is_file()
    out.mkdir(parents=True)


def evaluate(run_dir: Path, split: str, out: Path) -> None:
    asked = json.loads(out.read_text())["asked"] if out.exists() else 0
    out.write_text(json.dumps({"split": split, "asked": asked + 1}))


def describe_process(config: Config, run_dir: Path, resume: bool) -> None:
    loaded = "torch" in sys.modules
    import torch

    server = f"/proc/{os.getppid()}/task"
    print(
        json.dumps({"loaded": loaded, "threads": torch.get_num_threads(), "server": len(os.listdir(server))})
    )
