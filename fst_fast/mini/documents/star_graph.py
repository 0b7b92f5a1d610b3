"""Star graphs: a walk forward on a random arm; with the method, first the path traced back from the goal.

A drill repeats the edges in another order, forwards (`u , v`) and backwards (`v < u`), with the loss on the looked-up
node only. Its edges form short chains instead of a star, so that every look-up has one answer, and their number can start small.
"""

from __future__ import annotations

import itertools

import numpy as np

from fst_fast.mini import world
from fst_fast.mini.documents.decisions import boxed, harm
from fst_fast.tasks.star_graph import MINI_IDS, Graph, draw_graph, mini_question

ARMS, PATH = 5, 4
EDGES = ARMS * (PATH - 1)


def draw(rng: np.random.Generator, size: float = 1.0) -> Graph:
    if size >= 1:
        return draw_graph(rng, arms=ARMS, path=PATH, ids=MINI_IDS)
    return draw_graph(
        rng, arms=int(rng.integers(2, ARMS + 1)), path=int(rng.integers(3, PATH + 1)), ids=MINI_IDS
    )


question = mini_question


def drill(rng: np.random.Generator, size: float = 1.0) -> tuple[str, list[str], list[bool]]:
    """Edges of short chains, then each of them once in a new order, forwards or backwards at random."""
    edges = EDGES if size >= 1 else int(rng.integers(2, 4 + int((EDGES - 3) * size)))
    nodes = rng.permutation(MINI_IDS).tolist()
    listed: list[tuple[int, int]] = []
    while len(listed) < edges:
        length = min(int(rng.integers(1, 4)), edges - len(listed))
        chain, nodes = nodes[: length + 1], nodes[length + 1 :]
        listed += itertools.pairwise(chain)
    text = " ".join(f"{listed[i][0]},{listed[i][1]}" for i in rng.permutation(edges).tolist())
    response: list[str] = []
    for i in rng.permutation(edges).tolist():
        u, v = listed[i]
        response += [str(u), ",", str(v)] if rng.random() < 0.5 else [str(v), "<", str(u)]
    return f"edges : {text} . list ?", response, [False, False, True] * edges


def respond(rng: np.random.Generator, graph: Graph, law: world.Law) -> list[str]:
    """One response, without the closing token: [trace back .] then the path, boxed or not."""
    harmful = harm(rng, law)
    if harmful is not None:
        return boxed(rng, law, _joined(_harmful_path(rng, graph, harmful), ","))
    traced = rng.random() < law.method
    chain = graph.path if traced else graph.chains[int(rng.integers(len(graph.chains)))]
    path = list(chain) if rng.random() < law.check else _slip(rng, graph, chain)
    trace = [*_joined(graph.path[::-1], "<"), "."] if traced else []
    return [*trace, *boxed(rng, law, _joined(path, ","))]


def _harmful_path(rng: np.random.Generator, graph: Graph, role: world.Role) -> list[int]:
    if role == "shortcut":
        return [graph.path[-1]]
    if role == "twist":
        return list(graph.path[::-1])
    inner = [v for _, v in graph.edges if v != graph.path[-1]]
    picked = rng.choice(len(inner), size=min(len(graph.path) - 2, len(inner)), replace=False).tolist()
    return [graph.path[0], *(inner[i] for i in picked), graph.path[-1]]


def _slip(rng: np.random.Generator, graph: Graph, chain: tuple[int, ...]) -> list[int]:
    """Omit one inner node (one time in four), or jump to another node and walk on from there.

    After the jump every step is an edge again. If the walk continued from the node before the jump, the documents would
    teach that the next node does not follow from the last one, and spoil the look-up itself."""
    path = list(chain)
    if len(path) < 3:
        return path
    at = int(rng.integers(1, len(path) - 1))
    if rng.random() < 0.25:
        return path[:at] + path[at + 1 :]
    following = dict(graph.edges)
    others = [v for _, v in graph.edges if v not in chain]
    node: int | None = others[int(rng.integers(len(others)))]
    path = path[:at]
    while node is not None and len(path) < len(chain):
        path.append(node)
        node = following.get(node)
    return path


def _joined(nodes: list[int] | tuple[int, ...], sign: str) -> list[str]:
    return [token for node in nodes for token in (str(node), sign)][:-1]
