"""A run on a managed vLLM server, as a process: `python vllm_run.py RUN_DIR CONFIG_JSON RESUME KILL_AFTER`; the server is killed after step KILL_AFTER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil

import fst_fast
from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.run.callbacks import Step
from fst_fast.trainer import train


class KillsServer(fst_fast.Callback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step(self, event: Step) -> None:
        if event.step == self.after:
            below = psutil.Process().children(recursive=True)
            (server,) = [
                p
                for p in below
                if any("--uds" in a for a in p.cmdline()) and "fst_fast.verify.attached" not in p.cmdline()
            ]
            server.kill()


if __name__ == "__main__":
    run_dir, config, resume, after = (
        Path(sys.argv[1]),
        json.loads(sys.argv[2]),
        sys.argv[3] == "resume",
        int(sys.argv[4]),
    )
    try:
        train(Config.model_validate(config), run_dir, resume=resume, callbacks=[KillsServer(after)])
    except UserError as error:
        sys.exit(f"refused: {error}")
