"""One step of the slow phase on synthetic tokens, phase by phase: what `fst plan` predicts is compared with.

The code of a run (rollout/engine.py, slow/update.py, policy/trained.py) on random token ids: every prompt and response has the length that the
load names, no token ends a response, and nothing is verified. scripts/measure_memory.py takes the peaks, benchmarks/plan.py the times.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from fst_fast import mini
from fst_fast.config import Config

FOLDERS = {"smollm2": "smollm2-135m", "qwen": "qwen"}  # inside $FST_MODELS
PHASES = ("sampling", "scoring", "forward_backward", "optimiser", "hand_over")


@dataclass(frozen=True)
class Load:
    """K contexts of `context` tokens x problems of `problem` tokens x samples of `response` tokens, over all processes."""

    contexts: int = 4
    context: int = 256
    problems: int = 4
    problem: int = 48
    samples: int = 2
    response: int = 32


def folder_of(model: str) -> Path:
    """`mini`, or the folder of a real model below the environment variable FST_MODELS (default: ./models)."""
    return mini.path() if model == "mini" else Path(os.environ.get("FST_MODELS", "models")) / FOLDERS[model]


def read_results(path: Path) -> dict[str, Any]:
    """{"models": their config.json by name, "rows": one for each setting}."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"models": {}, "rows": {}}
    return found


def add_row(path: Path, name: str, model: str, row: dict[str, Any]) -> None:
    """Write a setting's row into the results, at once: an interrupted run keeps what it has measured."""
    found = read_results(path)
    found["models"][model] = json.loads((folder_of(model) / "config.json").read_text())
    found["rows"][name] = row
    measure.write(path, found | {"hardware": measure.hardware(), "versions": measure.versions()})


def configure(model: str, load: Load, keys: dict[str, Any]) -> Config:
    """The configuration of a step of this load. keys: dotted keys of the configuration, which come last."""
    longest = load.context + load.problem + load.response
    tree: dict[str, Any] = {
        "method": "fst",
        "model": {"path": str(folder_of(model))},
        "fast": {"population": load.contexts, "anchor_size": 1, "max_context_tokens": load.context},
        "rollout": {
            "max_prompt_tokens": load.context + load.problem,
            "max_response_tokens": load.response,
        },
        "slow": {
            "problems_per_step": load.problems,
            "group_size": load.contexts * load.samples,
            "tokens_per_micro_batch": max(8192, longest),
        },
    }
    for key, value in keys.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    return Config.model_validate(tree)


class MeasuredStep:
    """The models of a run, and its step cut into the phases of PHASES."""

    def __init__(self, config: Config, load: Load) -> None:
        from fst_fast import distributed
        from fst_fast.policy import gpu_forward, trained
        from fst_fast.policy.scoring import Batching
        from fst_fast.rollout.engine import RolloutEngine
        from fst_fast.rollout.graphs import StepGraph

        distributed.init()
        self.config, self.load = config, load
        self.reference = trained.load(config)
        self.policy = trained.TrainedPolicy(config, self.reference)
        self.policy.hand_over()
        self.engine = RolloutEngine(
            self.policy.rollout_model,
            eos_ids=(),
            pad_id=0,
            max_batch=config.rollout.max_batch,
            packing=config.policy.packing,
            kv_bytes=config.rollout.kv_memory_bytes,
            graph=None if gpu_forward.unsupported_reason(self.policy.rollout_model) else StepGraph(),
        )
        self.batching = Batching.of(config, 0)
        self.step = 0

    def requests(self) -> list[Any]:
        from fst_fast import distributed
        from fst_fast.rollout.engine import Request

        rng = np.random.default_rng(self.step)
        vocabulary = self.reference.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        load = self.load
        contexts = rng.integers(0, vocabulary, (load.contexts, load.context))
        problems = rng.integers(0, vocabulary, (load.problems, load.problem))
        return [
            Request(str(p), str(c), s, np.concatenate([contexts[c], problems[p]]), hash((self.step, p, c, s)) % 2**62)
            for p in distributed.local_shard(range(load.problems))
            for c in range(load.contexts)
            for s in range(load.samples)
        ]  # fmt: skip

    def phases(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The phases of the next step in their order; each must be called before the next one is asked for."""
        from fst_fast.contracts import ScoredRollout, Verdict
        from fst_fast.slow.groups import make_groups
        from fst_fast.slow.slow_phase import objective_of
        from fst_fast.slow.update import Reference, micro_jobs, sequences

        requests = self.requests()
        held: dict[str, Any] = {}

        def sampling() -> None:
            held["rollouts"] = self.engine.generate(
                requests,
                max_response_tokens=self.load.response,
                temperature=1.0,
                policy_version=self.step,
            )
            self.engine.forget()

        def scoring() -> None:
            self.policy.release()
            prompts = {(r.problem_id, r.context_id): r.prompt_ids for r in requests}
            sampled = [ScoredRollout(r, Verdict(float(i % 2)), "") for i, r in enumerate(held["rollouts"])]
            groups = make_groups(sampled, 1e-6)
            of = [[prompts[m.rollout.problem_id, m.rollout.context_id] for m in g.members] for g in groups]
            data = sequences(groups, of, "problem")
            reference = Reference(self.reference)
            micros, held["jobs"] = micro_jobs(data, reference, objective_of(self.config.slow), self.batching)
            held["tokens"] = [m.batch.tokens for m in micros]

        yield "sampling", sampling
        yield "scoring", scoring
        yield "forward_backward", lambda: self.policy.forward_backward(held["jobs"])
        held.pop("jobs")
        yield "optimiser", lambda: (self.policy.step(1e-6), None)[1]
        yield "hand_over", self.policy.hand_over
        self.micro_tokens: list[int] = held["tokens"]
        self.step += 1
