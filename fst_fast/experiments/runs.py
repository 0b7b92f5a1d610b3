"""One training run as the experiments ask for it. Two experiments that ask for the same run share its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fst_fast.mini
from fst_fast.config import Config
from fst_fast.config import load as config_load

FAMILIES = ("star_graph", "list_programs", "linked_facts", "formula_choice")
METHODS = ("rl", "gepa", "fst")
Changes = Mapping[str, Any]
"""Dotted key of the configuration -> value."""


@dataclass(frozen=True)
class Budget:
    """What every run of a suite gets. eval_problems: problems of each evaluation on the way; final_problems: of the last one. rival_families:
    on how many families the rivals run, which are the most runs of all."""

    steps: int
    eval_every: int
    eval_problems: int
    final_problems: int
    seeds: int
    rival_families: int = len(FAMILIES)

    def changes(self) -> Changes:
        return {
            "slow.steps": self.steps,
            "eval.every": self.eval_every,
            "eval.problems": self.eval_problems,
            "eval.final_problems": self.final_problems,
            "eval.cells": ["both"],  # all four at the end
            "checkpoint.every": self.steps // 4,
            "track.rollouts_per_step": 0,
        }


FULL = Budget(steps=120, eval_every=6, eval_problems=64, final_problems=256, seeds=5)
QUICK = Budget(steps=60, eval_every=6, eval_problems=64, final_problems=128, seeds=2, rival_families=1)


@dataclass(frozen=True)
class Run:
    """family: names the configuration; changes: where it differs from that; label: replaces them in the run's name;
    after: the run whose trained weights it starts from."""

    family: str
    method: str
    seed: int
    changes: Changes = field(default_factory=dict, hash=False)
    label: str = ""
    after: Run | None = None

    @property
    def name(self) -> str:
        """The folder's name: readable, and different for different runs of one suite."""
        changes = [
            f"{key.rpartition('.')[2]}={_as_written(value)}" for key, value in sorted(self.changes.items())
        ]
        origin = f"after-{self.after.name}" if self.after else f"seed={self.seed}"
        parts = [self.family, self.method, *([self.label] if self.label else changes), origin]
        return "-".join(parts).replace("/", "_")

    def config(self, budget: Budget, weights: Path | None) -> Config:
        """weights: the model folder that the run starts from; None: that of the family's configuration."""
        source = fst_fast.mini.path().parent / f"{self.family}.yaml"
        changes = {**budget.changes(), **self.changes, "method": self.method, "seed": self.seed}
        if weights:
            changes["model.path"] = str(weights)
        tree = config_load.read_file(source)
        for key, value in changes.items():
            config_load.assign(tree, key, value)
        return config_load.check(tree, f"{source}: ")


def _as_written(value: object) -> str:
    """A value as a person writes it in YAML: `1e-3`, `true`."""
    if isinstance(value, float) and 0 < abs(value) < 0.1:
        return np.format_float_scientific(value, trim="-", exp_digits=1)
    return str(value).lower() if isinstance(value, bool) else str(value)
