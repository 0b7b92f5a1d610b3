"""Make runs, several at a time, each in a process of its own; what is already made is not made again.

A run is an ordinary run folder under OUT/runs, trained by `fst train` with one thread. One that was interrupted goes on from its
checkpoint; one whose configuration is another than asked for is refused by name. Where runs fail the others go on, and the error at the
end names the log of each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fst_fast import config_load
from fst_fast.errors import UserError
from fst_fast.experiment.runs import Budget, Run
from fst_fast.run.folder import MARKER

_POLL_S = 0.2
_COST = {"fst": 3.0, "rl": 1.0, "gepa": 1.0}
"""Of a step, relative, for the estimate of the time left; measured roughly (docs/experiments.md)."""


@dataclass
class Lab:
    """out: the suite's folder. workers: runs at a time. dry: say what would be run, run nothing."""

    out: Path
    budget: Budget
    families: Sequence[str]
    workers: int
    dry: bool = False
    say: Callable[[str], None] = print
    fst: Sequence[str] = (sys.executable, "-m", "fst_fast.cli")  # the command line that trains and exports
    planned: list[Run] = field(default_factory=list)
    _spent: float = 0.0  # seconds of finished runs
    _units: float = 0.0  # their cost

    @property
    def seeds(self) -> range:
        return range(self.budget.seeds)

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    def model(self, run: Run) -> Path | None:
        """The weights that the run begins with, None: those of its configuration."""
        return self.out / "models" / run.after.name if run.after else None

    def make(self, runs: Sequence[Run]) -> None:
        """Make all of them. Raises UserError where some failed, or where a folder holds another run."""
        wanted = list(
            dict.fromkeys(runs)
        )  # the runs that others start from must be made before, by an earlier call
        self.planned += [run for run in wanted if run not in self.planned]
        if self.dry:
            return
        missing = [run for run in wanted if not self._is_made(run)]
        missing.sort(
            key=lambda run: -self._cost(run)
        )  # the longest first, so that the last ones end together
        waiting, failed = list(missing), []
        working: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
        try:
            while waiting or working:
                while waiting and len(working) < self.workers:
                    run = waiting.pop(0)
                    working[run] = (self._start(run), time.monotonic())
                time.sleep(_POLL_S)
                for run, (child, began) in list(working.items()):
                    if child.poll() is None:
                        continue
                    del working[run]
                    seconds = time.monotonic() - began
                    self._spent += seconds
                    self._units += self._cost(run)
                    if child.returncode:
                        failed.append(run)
                    left = (
                        sum(map(self._cost, [*waiting, *working])) * self._spent / self._units / self.workers
                    )
                    done = len(missing) - len(waiting) - len(working)
                    self.say(
                        f"[{done}/{len(missing)}] {run.name} {'failed' if child.returncode else 'done'} in {seconds:.0f} s, "
                        f"about {left / 60:.0f} min left"
                    )
        finally:
            for child, _ in working.values():
                child.send_signal(signal.SIGTERM)  # ends after its step, with a checkpoint
            for child, _ in working.values():
                child.wait()
        if failed:
            logs = ", ".join(str(self._log(run)) for run in failed)
            raise UserError(f"{len(failed)} of {len(missing)} runs failed; what they said is in {logs}")

    def _cost(self, run: Run) -> float:
        return _COST[run.method] * float(str(dict(run.changes).get("slow.steps", self.budget.steps)))

    def _is_made(self, run: Run) -> bool:
        folder = self.folder(run)
        if not (folder / MARKER).is_file():
            return False
        asked = config_load.dump(run.config(self.budget, self.model(run)))
        if (folder / "config.yaml").read_text() != asked:
            raise UserError(
                f"{folder} was made with another configuration than this suite asks for; give another --out, or remove the folder"
            )
        return (folder / "summary.json").is_file()

    def _start(self, run: Run) -> subprocess.Popen[bytes]:
        folder, log, model = self.folder(run), self._log(run), self.model(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        if model and not model.is_dir():
            assert run.after
            self._fst("export", str(self.folder(run.after)), str(model), log=log)
        resume = ["--resume"] if (folder / MARKER).is_file() else []
        words = ["train", str(run.config_file()), "--run-dir", str(folder), *resume]
        with log.open("ab") as said:
            return subprocess.Popen(
                [*self.fst, *words, *run.overrides(self.budget, model)],
                stdout=said, stderr=subprocess.STDOUT, env=_one_thread(), start_new_session=True,
            )  # fmt: skip

    def _fst(self, *words: str, log: Path) -> None:
        with log.open("ab") as said:
            done = subprocess.run(
                [*self.fst, *words],
                stdout=said, stderr=subprocess.STDOUT, env=_one_thread(), check=False,
            )  # fmt: skip
        if done.returncode:
            raise UserError(f"fst {' '.join(words)} failed; what it said is in {log}")

    def _log(self, run: Run) -> Path:
        return self.out / "logs" / f"{run.name}.log"


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
