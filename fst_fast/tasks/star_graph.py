"""Star graph: find the one arm that ends at the goal. The paper's planning task (arXiv 2605.12484, star-graph experiment).

A start node has `arms` chains of equal length; one of them, the gold path of `path` nodes, ends at the goal. All edges
are shuffled and printed as `u,v u,v ...`. From the start all arms look alike, so a walk that looks only one edge ahead
is right once in `arms` times; walking back from the goal is unambiguous. Reward 1 iff the last \\boxed{} of the
response holds the whole path, else 0. The feedback says where the submitted path is wrong.

There are two forms: `paper` (25 arms, 20 nodes, ids below 500) for real models, `mini` for the vocabulary of the mini
base model. In the split `ood` paths are one node longer than in training. With `order: backward` the box must hold the path
from the goal to the start, which the mini question does not say: the feedback does.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.boxed import NoBoxedAnswer, last_box
from fst_fast.tasks.generated import GeneratedTask

MINI_IDS = 40
"""The mini vocabulary has the numbers 0..39."""

_NODE = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Graph:
    """One star graph: `chains[0]` is the gold path, every chain begins with the start node; `edges` are in printed order."""

    chains: tuple[tuple[int, ...], ...]
    edges: tuple[tuple[int, int], ...]

    @property
    def path(self) -> tuple[int, ...]:
        return self.chains[0]


def draw_graph(rng: np.random.Generator, *, arms: int, path: int, ids: int) -> Graph:
    """Draw distinct nodes from 0..ids-1 for one start and `arms` chains of `path` nodes (start included); shuffle the edges."""
    nodes = rng.permutation(ids)[: 1 + arms * (path - 1)].tolist()
    start, rest = nodes[0], nodes[1:]
    chains = tuple((start, *rest[a * (path - 1) : (a + 1) * (path - 1)]) for a in range(arms))
    edges = [(u, v) for chain in chains for u, v in itertools.pairwise(chain)]
    return Graph(chains, tuple(edges[i] for i in rng.permutation(len(edges)).tolist()))


def edge_list(graph: Graph) -> str:
    return " ".join(f"{u},{v}" for u, v in graph.edges)


def mini_question(graph: Graph) -> str:
    """The user message of the mini form, in the mini vocabulary."""
    return f"edges : {edge_list(graph)} . path from {graph.path[0]} to {graph.path[-1]} ?"


def paper_question(graph: Graph) -> str:
    start, goal = graph.path[0], graph.path[-1]
    return (
        "The pairs below are the directed edges of a graph; a pair u,v is an edge from node u to node v.\n\n"
        f"{edge_list(graph)}\n\n"
        f"Find the path from node {start} to node {goal}. Give every node on it in order, separated by commas, "
        f"from {start} to {goal}, inside \\boxed{{}}."
    )


class StarGraph(GeneratedTask[Graph]):
    """Task `star_graph`. Raises UserError if the settings do not allow a graph."""

    name = "star_graph"

    def __init__(
        self,
        form: Literal["paper", "mini"] = "paper",
        arms: int = 25,
        path: int = 20,
        ids: int = 500,
        train: int = 2000,
        validation: int = 256,
        seed: int = 0,
        ood: int = 256,
        order: Literal["forward", "backward"] = "forward",
    ) -> None:
        super().__init__(train=train, validation=validation, ood=ood, seed=seed)
        if form not in ("paper", "mini"):
            raise UserError(f"star_graph: form={form!r} is not known; allowed are paper and mini")
        if order not in ("forward", "backward"):
            raise UserError(f"star_graph: order={order!r} is not known; allowed are forward and backward")
        if order == "backward" and form == "paper":
            raise UserError(
                "star_graph: order=backward needs form=mini; the paper's question asks for the path forward"
            )
        self._check("arms", arms, 2)
        self._check("path", path, 2)
        needed = 1 + arms * (path - 1)
        if not isinstance(ids, int) or ids < needed:
            raise UserError(
                f"star_graph: ids={ids!r} is too small for arms={arms}, path={path}, which need 1 + {arms} x {path - 1} "
                f"= {needed} different nodes; set ids to at least {needed}"
            )
        if form == "mini" and ids > MINI_IDS:
            raise UserError(
                f"star_graph: ids={ids} with form=mini, but the mini vocabulary has the numbers below {MINI_IDS}; "
                f"set ids to at most {MINI_IDS}, arms and path so that 1 + arms x (path - 1) fits"
            )
        self.form, self.arms, self.path, self.ids, self.order = form, arms, path, ids, order

    def verify(self, problem: Problem, response: str) -> Verdict:
        edges = {(int(u), int(v)) for u, v in problem.meta["edges"]}
        return judge(tuple(problem.answer), edges, response, backward=self.order == "backward")

    def gold(self, problem: Problem) -> str:
        """A response that gets reward 1."""
        return "\\boxed{" + ",".join(map(str, problem.answer)) + "}"

    def _draw(self, rng: np.random.Generator, split: str) -> Graph:
        arms, path = self.arms, self.path
        # paths one node longer than in training; one arm fewer keeps the question about as long
        if split == "ood":
            arms, path = max(2, arms - 1), path + 1
            if 1 + arms * (path - 1) > self.ids:
                raise UserError(
                    f"star_graph: ids={self.ids} is too small for the ood split; at least {1 + arms * (path - 1)}"
                )
        return draw_graph(rng, arms=arms, path=path, ids=self.ids)

    def _key(self, graph: Graph) -> Hashable:
        return graph.path, tuple(sorted(graph.chains[1:]))

    def _settings(self) -> str:
        return f"arms={self.arms}, path={self.path}, ids={self.ids}"

    def _problem(self, graph: Graph, id: str) -> Problem:
        question = mini_question if self.form == "mini" else paper_question
        return Problem(
            id=id,
            messages=({"role": "user", "content": question(graph)},),
            answer=list(graph.path if self.order == "forward" else graph.path[::-1]),
            meta={
                "edges": [list(edge) for edge in graph.edges],
                "start": graph.path[0],
                "goal": graph.path[-1],
            },
        )


def judge(
    gold: tuple[int, ...], edges: set[tuple[int, int]], response: str, *, backward: bool = False
) -> Verdict:
    """Compare the last \\boxed{} with the gold path, which runs from the goal to the start if backward. Metrics, of the path as it runs
    forward: boxed, walk (a walk over existing edges from the start), goal (it ends there)."""

    def wrong(feedback: str, *, walk: bool = False, reached: bool = False) -> Verdict:
        return Verdict(0.0, feedback, {"boxed": float(boxed), "walk": float(walk), "goal": float(reached)})

    path = gold[::-1] if backward else gold
    start, goal = path[0], path[-1]
    boxed = True
    try:
        content = last_box(response, "the path")
    except NoBoxedAnswer as why:
        boxed = "\\boxed" in response
        return wrong(str(why))
    items = [item for part in content.split(",") for item in (part.split() or [""])]
    strange = next((item for item in items if not _NODE.fullmatch(item)), None)
    if strange is not None:
        return wrong(f"the box must hold numbers separated by commas, but it holds {strange[:40]!r}.")
    nodes = tuple(int(item) for item in items)
    if nodes == gold:
        return Verdict(1.0, "right.", {"boxed": 1.0, "walk": 1.0, "goal": 1.0})
    if backward and nodes[0] == start:
        return wrong(f"the path is reversed: it must go from the goal {goal} to the start {start}.")
    if not backward and nodes == gold[::-1]:
        return wrong(f"the path is reversed: it must go from the start {start} to the goal {goal}.")
    nodes = nodes[::-1] if backward else nodes
    if nodes == (goal,):
        return wrong(f"the box holds the goal {goal} only: the whole path from {start} must stand there.")
    if nodes[0] != start:
        return wrong(
            f"the path {'ends' if backward else 'begins'} at {nodes[0]}, which is not the start {start}."
        )
    for a, b in itertools.pairwise(nodes):
        if (a, b) in edges:
            continue
        between = _between(a, b, edges)
        if between:
            skipped = ", ".join(map(str, between))
            return wrong(
                f"the edge {a},{b} does not exist: the path skips {skipped}, which lies between {a} and {b}."
            )
        return wrong(f"the edge {a},{b} does not exist.")
    # A walk over existing edges that is not the gold path: it stops too early or took another arm.
    end = nodes[-1]
    if nodes == path[: len(nodes)]:
        return wrong(
            f"every edge is right, but the path stops at {end} before it reaches the goal {goal}.", walk=True
        )
    return wrong(
        f"every edge exists, but the path ends at {end}, which is not the goal {goal}: the wrong arm was taken at the first step, "
        f"from {start} to {nodes[1]}.",
        walk=True,
    )


def _between(a: int, b: int, edges: set[tuple[int, int]]) -> list[int]:
    """The nodes strictly between a and b on the way from a to b; empty if b is not reachable. Every node but the start has one parent."""
    parent = {v: u for u, v in edges}
    nodes: list[int] = []
    at = parent.get(b)
    while at is not None and at != a:
        nodes.append(at)
        at = parent.get(at)
    return nodes[::-1] if at == a else []
