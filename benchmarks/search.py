"""How soon a fast phase finds a good context, over many seeds: `python benchmarks/search.py [VARIANT ...] --seeds 40`.

The responses are drawn from the mini world's law, as its training documents are (fst_fast/mini/documents), not from the model: the figures compare
variants, and say little of the level on the model. What RELIABLE says is left out: the model does less well than the law, most of all on
star graphs. Verdicts, reflector and evolution are the real ones; the weights never move. A context is good from half of the best context's
gain over the seed context on. Prints a line for each variant and family; --out writes them as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fst_fast.config import FastConfig
from fst_fast.contracts import Problem, Rollout, ScoredRollout, Verdict
from fst_fast.data.stream import anchor_set
from fst_fast.fast import evolution, plain_gepa
from fst_fast.fast.outcome import FastResult
from fst_fast.fast.population import FastState
from fst_fast.fast.reflectors import make_reflector
from fst_fast.fast.reflectors.mini import split_sentences
from fst_fast.mini import world
from fst_fast.mini.documents import KINDS
from fst_fast.tasks.registry import load_task

FRONT: dict[str, Any] = {"parents": "front", "children": 4, "first_generations": 4, "generations": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "front": FRONT,
    "front, no margin": {**FRONT, "admit_z": 0.0},
    "front, race 16/4, 12 waves": {
        **FRONT,
        "children": 16,
        "rungs": 4,
        "first_generations": 12,
        "generations": 12,
    },
    "plain gepa": {"evolver": "gepa", "samples": 1},
    "no margin": {"admit_z": 0.0},
    "crossover": {"crossover": 0.25},
    "8 children": {"children": 8, "first_generations": 24, "generations": 6},
    "4 waves later": {"generations": 4},
    "search budget 1440": {"search_budget": 1440},
    "search budget 1920": {"search_budget": 1920},
}
RELIABLE = {"star_graph": 0.5, "list_programs": 0.85, "linked_facts": 0.85, "formula_choice": 0.9}
"""The share of responses that do not slip for the model's own reasons; so set that the best context has about the reward that it has on the model."""
DRAWN = 300
"""Responses drawn under each law; rollouts are taken from these."""


class Bench:
    """A family's problems, and the responses under any context."""

    def __init__(self, kind: world.Kind) -> None:
        self.kind, self.module = kind, KINDS[kind]
        self.task = load_task(
            kind, {"form": "mini", "arms": 5, "path": 4, "ids": 40} if kind == "star_graph" else {}
        )
        draws = [self.module.draw(np.random.default_rng([999, i])) for i in range(150)]
        self.problems: list[tuple[Any, Problem]] = [
            (raw, self.task._problem(raw, f"problem {i}"))
            for i, raw in enumerate(draws)  # type: ignore[attr-defined]
        ]
        self.by_law: dict[world.Law, list[tuple[str, Verdict]]] = {}
        self.by_text: dict[str, list[tuple[str, Verdict]]] = {}

    def responses(self, text: str) -> list[tuple[str, Verdict]]:
        """DRAWN judged responses under a context."""
        if text not in self.by_text:
            known = {s.text: s for s in world.CATALOGUE}
            law = world.law([known[s] for s in split_sentences(text) if s in known], self.kind)
            if law not in self.by_law:
                rng = np.random.default_rng([len(self.by_law), DRAWN])
                self.by_law[law] = [self._respond(rng, law, i) for i in range(DRAWN)]
            self.by_text[text] = self.by_law[law]
        return self.by_text[text]

    def _respond(self, rng: np.random.Generator, law: world.Law, i: int) -> tuple[str, Verdict]:
        raw, problem = self.problems[i % len(self.problems)]
        if rng.random() > RELIABLE[self.kind]:
            law = dataclasses.replace(law, check=0.0)
        response = " ".join(self.module.respond(rng, raw, law))
        return response, self.task.verify(problem, response)

    def reward(self, text: str) -> float:
        return float(np.mean([verdict.reward for _, verdict in self.responses(text)]))


def cycles(bench: Bench, config: FastConfig, seed: int, count: int) -> list[FastResult]:
    """So many fast phases in a row."""
    evolve = plain_gepa.evolve if config.evolver == "gepa" else evolution.evolve
    state, found = FastState.initial(world.SEED_CONTEXT), []
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.float32))
    for cycle in range(count):
        rng = np.random.default_rng([seed, cycle])

        def score(requests: Any, cycle: int = cycle, rng: Any = rng) -> list[ScoredRollout]:
            drawn = rng.integers(DRAWN, size=len(requests))
            answers = [
                bench.responses(context.text)[i] for (context, _, _), i in zip(requests, drawn, strict=True)
            ]
            return [
                ScoredRollout(Rollout(p.id, c.id, k, *nothing, "stop", cycle, 1.0), verdict, response)
                for (c, p, k), (response, verdict) in zip(requests, answers, strict=True)
            ]

        ahead = [problem for _, problem in bench.problems[:96]]
        result = evolve(
            state, anchor=anchor_set(ahead, config.anchor_size, cycle, seed), score=score, reflect=make_reflector("mini", {}, generate=None),
            config=config, count_tokens=lambda text: len(text.split()), cycle=cycle, policy_version=cycle, seed=seed, log=lambda line: None,
        )  # fmt: skip
        state = result.state
        found.append(result)
    return found


def measure(bench: Bench, config: FastConfig, seeds: int, count: int) -> dict[str, Any]:
    """Over the seeds: shares of runs and of children, by cycle."""
    low, high = (bench.reward(text) for text in (world.SEED_CONTEXT, world.best_context(bench.kind)))
    good = (low + high) / 2
    runs = [cycles(bench, config, seed, count) for seed in range(seeds)]

    def by_cycle(of: Any) -> list[float]:
        return [round(float(np.mean([of(run[i]) for run in runs])), 3) for i in range(count)]

    def children(result: FastResult) -> list[tuple[float, float, bool]]:
        """(reward, the parent's, admitted) of each."""
        lines, texts = result.record["contexts"], result.state.contexts
        known = [(line, texts[line["parent"]].context.text) for line in lines if line["parent"]]
        return [
            (bench.reward(line["text"]), bench.reward(parent), line["admitted"]) for line, parent in known
        ]

    first = [child for run in runs for child in children(run[0])]
    better = [admitted for reward, parent, admitted in first if reward > parent + 0.03]
    same = [admitted for reward, parent, admitted in first if abs(reward - parent) <= 0.005]
    return {
        "seed": round(low, 3),
        "best": round(high, 3),
        "good_kept": by_cycle(lambda r: max(bench.reward(c.text) for c in r.population) >= good),
        "good_proposed": by_cycle(lambda r: any(reward >= good for reward, _, _ in children(r))),
        "mean_of_population": by_cycle(lambda r: np.mean([bench.reward(c.text) for c in r.population])),
        "rollouts": by_cycle(lambda r: r.record["fast_rollouts"]),
        "reflections": by_cycle(lambda r: r.record["proposed"]),
        "children": len(first),
        "better_by_0.03": len(better),
        "of_these_admitted": round(float(np.mean(better)), 3) if better else None,
        "without_effect": len(same),
        "of_them_admitted": round(float(np.mean(same)), 3) if same else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), help=", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--cycles", type=int, default=2)
    parser.add_argument("--families", default=",".join(world.KINDS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"seeds": args.seeds, "families": {}}
    for kind in args.families.split(","):
        bench, rows = Bench(kind), found["families"].setdefault(kind, {})
        for name in args.variants:
            rows[name] = measure(bench, FastConfig(**VARIANTS[name]), args.seeds, args.cycles)
            print(kind, name, json.dumps(rows[name]), flush=True)
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
