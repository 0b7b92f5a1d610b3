"""What a resumed run needs besides the weights, as JSON.

Random numbers, minibatches and anchor sets derive from (seed, step, cycle), so no generator state is kept (run/randomness.py) and the step
number is the data cursor. Nothing here belongs to one process: with another number of processes the problems of a step are divided anew,
whole groups each, and every rollout is still the same one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fst_fast.contracts import Context, Rollout, ScoredRollout, Turn, Verdict
from fst_fast.data.fingerprint import Fingerprint
from fst_fast.errors import UserError
from fst_fast.fast.population import FastState, Scores
from fst_fast.rollout.lengths import ResponseLengths
from fst_fast.rollout.reuse import ReusePool
from fst_fast.run.counters import Counters
from fst_fast.slow.batch import Batch

FORMAT = 2


@dataclass
class State:
    """step: optimiser steps done (method=gepa: position in the data stream); cycle: cycles begun."""

    fast: FastState
    population: list[Context]
    step: int = 0
    cycle: int = 0
    counters: Counters = field(default_factory=Counters)
    reusable: ReusePool = field(default_factory=ReusePool)
    ahead: list[Batch] = field(default_factory=list)  # rollout.ahead: sampled and not trained yet
    base_rewards: dict[str, dict[str, float]] = field(default_factory=dict)  # see evaluate.evaluate
    date: str = ""  # when the run began (ISO 8601): a chat template's today
    base_weights: str = ""  # see policy/base_weights.py. Both are "" in a state of an earlier version
    lengths: ResponseLengths = field(default_factory=ResponseLengths)  # see rollout/lengths.py
    data: Fingerprint | None = None  # of what the task gave; None in a checkpoint of an earlier version

    @property
    def current_cycle(self) -> int:
        """The number, from 0, of the cycle that the steps belong to; 0 before any has begun."""
        return max(self.cycle - 1, 0)

    def forget_data(self) -> None:
        """Drop what was measured on problems that are no longer the task's: rewards of the base model, rollouts to reuse or to train, scores."""
        self.base_rewards.clear()
        self.lengths.known.clear()
        self.ahead = []
        self.reusable = ReusePool()
        self.fast = replace(self.fast, scores=Scores(policy_version=-1))

    def save(self, path: Path) -> None:
        """Write the whole state as one JSON file."""
        tree = {
            "format": FORMAT,
            "date": self.date,
            "base_weights": self.base_weights,
            "step": self.step,
            "cycle": self.cycle,
            "counters": asdict(self.counters),
            "population": [asdict(c) for c in self.population],
            "fast": self.fast.to_json(),
            "reusable": [scored_to_json(s) for s in self.reusable.rollouts],
            **({"ahead": [batch_to_json(b) for b in self.ahead]} if self.ahead else {}),
            "base_rewards": self.base_rewards,
            "lengths": self.lengths.known,
            "data": self.data,
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
                base_weights=str(tree.get("base_weights", "")),
                fast=FastState.from_json(tree["fast"]),
                population=[Context(**c) for c in tree["population"]],
                step=tree["step"],
                cycle=tree["cycle"],
                counters=Counters(**tree["counters"]),
                reusable=ReusePool([scored_from_json(s) for s in tree["reusable"]]),
                ahead=[batch_from_json(b) for b in tree.get("ahead", ())],
                base_rewards=tree["base_rewards"],
                lengths=ResponseLengths({str(k): float(v) for k, v in tree.get("lengths", {}).items()}),
                date=datetime.fromisoformat(tree["date"]).isoformat() if tree.get("date") else "",
                data=_checked_fingerprint(tree.get("data")),
            )
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} is not the state of a run: {type(error).__name__}: {str(error)[:200]}"
            ) from error


def _checked_fingerprint(tree: Any) -> Fingerprint | None:
    """Raises ValueError where it is none."""
    if tree is None:
        return None
    keys = {"problems", "hashed", "sha256"}
    if not all(set(split) >= keys for stage in tree for split in stage.values()):
        raise ValueError("data is not a fingerprint")
    return list(tree)


def batch_to_json(batch: Batch) -> dict[str, Any]:
    """A batch as JSON; the seconds that it took are not of the resumed run."""
    return {**vars(batch), "rollouts": [scored_to_json(s) for s in batch.rollouts], "seconds": {}}


def batch_from_json(tree: dict[str, Any]) -> Batch:
    """Undo `batch_to_json`."""
    rollouts = [scored_from_json(s) for s in tree["rollouts"]]
    return Batch(**{**tree, "rollouts": rollouts, "tokens": tuple(tree["tokens"])})


def scored_to_json(scored: ScoredRollout) -> dict[str, Any]:
    """A judged rollout as JSON; float32 log-probs survive the round trip exactly. Only an episode has `turns`."""
    rollout = dict(vars(scored.rollout))
    turns = [[turn.kept, turn.added.tolist(), turn.length] for turn in rollout.pop("turns")]
    if turns:
        rollout["turns"] = turns
    rollout["response_ids"] = scored.rollout.response_ids.tolist()
    rollout["logprobs"] = [float(x) for x in scored.rollout.logprobs]
    verdict = {**vars(scored.verdict), "metrics": dict(scored.verdict.metrics)}
    return {"rollout": rollout, "verdict": verdict, "response": scored.response}


def scored_from_json(tree: dict[str, Any]) -> ScoredRollout:
    """Undo `scored_to_json`."""
    rollout = dict(tree["rollout"])
    rollout["response_ids"] = np.array(rollout["response_ids"], dtype=np.int64)
    rollout["logprobs"] = np.array(rollout["logprobs"], dtype=np.float32)
    turns = [Turn(kept, np.array(added, np.int64), n) for kept, added, n in rollout.pop("turns", ())]
    rollout["turns"] = tuple(turns)
    return ScoredRollout(Rollout(**rollout), Verdict(**tree["verdict"]), tree["response"])
