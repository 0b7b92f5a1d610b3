"""What the process of one job does: train a run, export its weights, or evaluate it.

The runner forks each process from a server that has imported the trainer (preload.py). Importing torch and transformers takes about ten
seconds of a core; a run of the mini model takes half a minute or more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.run.folder import write_json


def run(work: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
    """Call work(*arguments) with stdout and stderr appended to `log`. A UserError becomes one line there and exit code 1."""
    os.setsid()  # Ctrl-C in a terminal reaches the suite alone, which then tells its runs to end
    null, out = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for source, standard in ((null, 0), (out, 1), (out, 2)):
        os.dup2(source, standard)
    import fst_fast.experiments.preload  # noqa: F401 - there already, unless the server failed to import it

    try:
        work(*arguments)
    except UserError as error:
        sys.exit(f"fst: {error}")


def train(config: Config, run_dir: Path, resume: bool) -> None:
    """Train the run to its last step. Exits with code 1 where a signal stopped it."""
    from fst_fast import trainer

    if trainer.train(config, run_dir, resume=resume) is None:
        sys.exit("fst: stopped by a signal before the last step")


def export(run_dir: Path, out: Path) -> None:
    """Write the weights of a finished run as a model folder."""
    from fst_fast.commands.export import export

    export(run_dir, out)


def evaluate(run_dir: Path, split: str, out: Path) -> None:
    """Measure the four cells of a finished run on a split, as `fst eval --split SPLIT --out OUT` does."""
    from fst_fast.commands.evaluate import evaluate_run

    write_json(out, {"split": split, **evaluate_run(run_dir, split=split)})
