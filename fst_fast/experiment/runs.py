"""One training run as the experiments ask for it. Two experiments that ask for the same run share its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import fst_fast.mini
from fst_fast.config import Config
from fst_fast.config import load as config_load

FAMILIES = ("star_graph", "list_programs", "linked_facts", "formula_choice")
METHODS = ("rl", "gepa", "fst")
Changes = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Budget:
    """What every run of a suite has. eval_problems: of the evaluations on the way; final_problems: of the last one, and of the four cells."""

    steps: int
    eval_every: int
    eval_problems: int
    final_problems: int
    seeds: int

    def overrides(self) -> dict[str, object]:
        return {
            "slow.steps": self.steps,
            "eval.every": self.eval_every,
            "eval.problems": self.eval_problems,
            "eval.final_problems": self.final_problems,
            "eval.cells": "[both]",  # all four at the end
            "checkpoint.every": self.steps // 4,
            "track.rollouts_per_step": 0,
        }


FULL = Budget(steps=120, eval_every=6, eval_problems=64, final_problems=256, seeds=5)
QUICK = Budget(steps=60, eval_every=6, eval_problems=64, final_problems=128, seeds=2)


@dataclass(frozen=True)
class Run:
    """family: whose configuration; changes: dotted keys that differ from it; label: their name, where they are too long to be one; after:
    the run whose weights it begins with."""

    family: str
    method: str
    seed: int
    changes: Changes = ()
    label: str = ""
    after: Run | None = None

    @property
    def name(self) -> str:
        """The folder: readable, and different for different runs of one suite."""
        parts = [self.family, self.method]
        named = [f"{key.rpartition('.')[2]}={value}" for key, value in sorted(self.changes)]
        parts += [self.label] if self.label else named
        if self.after:
            parts.append(f"after-{self.after.name}")
        else:
            parts.append(f"seed={self.seed}")
        return "-".join(parts).replace("/", "_")

    def overrides(self, budget: Budget, model: Path | None) -> list[str]:
        """As arguments of `fst train`."""
        keys = {**budget.overrides(), **dict(self.changes), "method": self.method, "seed": self.seed}
        if model:
            keys["model.path"] = model
        return [f"--{key}={value}" for key, value in keys.items()]

    def config_file(self) -> Path:
        return fst_fast.mini.path().parent / f"{self.family}.yaml"

    def config(self, budget: Budget, model: Path | None) -> Config:
        return config_load.load(self.config_file(), self.overrides(budget, model))
