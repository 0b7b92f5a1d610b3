"""What a run is at a given step, besides the weights: everything that a resumed run needs, as JSON.

Random numbers, minibatches and anchor sets derive from (seed, step, cycle), so no generator state is kept (run/randomness.py) and the step number
is the data cursor. Nothing here belongs to one process: with another number of them the problems of a step are dealt out anew, whole groups
each, and every rollout is still the same one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fst_fast.contracts import Context, Rollout, Sampled, Verdict
from fst_fast.errors import UserError
from fst_fast.fast.population import FastState

FORMAT = 2


@dataclass
class Counters:
    """What the training has cost so far, over all processes; evaluation is not counted."""

    rollouts: int = 0  # sampled, the fast phase's included
    fast_rollouts: int = 0
    reused_rollouts: int = 0  # fast-phase rollouts that RL groups claimed
    tokens_computed: int = 0  # tokens through a forward pass: rollouts, reference scoring, training
    tokens_unshared: int = 0  # the same work with no prefix shared
    skipped_steps: int = 0  # on_nonfinite=skip


@dataclass
class State:
    """step: optimiser steps done (method=gepa: position in the data stream); cycle: cycles begun."""

    fast: FastState
    population: list[Context]
    step: int = 0
    cycle: int = 0
    counters: Counters = field(default_factory=Counters)
    reusable: list[Sampled] = field(default_factory=list)  # this cycle's fast-phase rollouts, not yet claimed
    base_rewards: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # see evaluate.evaluate; of the contexts last evaluated

    def save(self, path: Path) -> None:
        """Write the whole state as one JSON file."""
        tree = {
            "format": FORMAT,
            "step": self.step,
            "cycle": self.cycle,
            "counters": asdict(self.counters),
            "population": [asdict(c) for c in self.population],
            "fast": self.fast.to_json(),
            "reusable": [sampled_to_json(s) for s in self.reusable],
            "base_rewards": self.base_rewards,
        }
        path.write_text(json.dumps(tree))

    @classmethod
    def load(cls, path: Path) -> State:
        """Read what `save` wrote. Raises UserError where another version of the program, or another program, wrote it."""
        try:
            tree = json.loads(path.read_text())
            if tree["format"] != FORMAT:
                raise UserError(f"{path} has format {tree['format']!r}; this version reads {FORMAT}")
            return cls(
                fast=FastState.from_json(tree["fast"]),
                population=[Context(**c) for c in tree["population"]],
                step=tree["step"],
                cycle=tree["cycle"],
                counters=Counters(**tree["counters"]),
                reusable=[sampled_from_json(s) for s in tree["reusable"]],
                base_rewards=tree["base_rewards"],
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is not the state of a run: {type(error).__name__}: {str(error)[:200]}"
            ) from error


def sampled_to_json(sampled: Sampled) -> dict[str, Any]:
    """A judged rollout as JSON; float32 log-probs survive the round trip exactly."""
    rollout = dict(vars(sampled.rollout))
    rollout["response_ids"] = sampled.rollout.response_ids.tolist()
    rollout["logprobs"] = [float(x) for x in sampled.rollout.logprobs]
    verdict = {**vars(sampled.verdict), "metrics": dict(sampled.verdict.metrics)}
    return {"rollout": rollout, "verdict": verdict, "response": sampled.response}


def sampled_from_json(tree: dict[str, Any]) -> Sampled:
    """Undo `sampled_to_json`."""
    rollout = dict(tree["rollout"])
    rollout["response_ids"] = np.array(rollout["response_ids"], dtype=np.int64)
    rollout["logprobs"] = np.array(rollout["logprobs"], dtype=np.float32)
    return Sampled(Rollout(**rollout), Verdict(**tree["verdict"]), tree["response"])
