"""Training documents of the mini base model, written by the world's law on random star graphs.

Two kinds. An *answer* document is a chat as the trainer will see it: a context, the question, a response drawn from the law. A *list*
document gives the edges again in another order, forwards (`u , v`) and backwards (`v < u`), with the loss on the looked-up node only:
answers alone hold too few look-ups for a small model to discover that edges can be looked up at all; the lists are nothing else. Their
edges form short chains rather than a star, so that every look-up has one answer, and their number can start small.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from fst_fast.mini import world
from fst_fast.mini.tokenizer import ASSISTANT, END, SYSTEM, USER
from fst_fast.tasks.star_graph import MINI_IDS, Graph, draw_graph, mini_question


@dataclass(frozen=True)
class Document:
    prompt: str  # up to and with <|assistant|>, as the chat template writes it
    response: list[str]  # tokens, the closing <|end|> included
    supervised: list[bool]  # [len(response)], whether the token counts in the loss


def answer_document(rng: np.random.Generator, *, arms: int, path: int) -> Document:
    graph = draw_graph(rng, arms=arms, path=path, ids=MINI_IDS)
    sentences = world.draw_context(rng)
    response = [*draw_response(rng, graph, world.law(sentences)), END]
    prompt = _chat(world.context_text(sentences), mini_question(graph))
    return Document(prompt, response, [True] * len(response))


def list_document(rng: np.random.Generator, *, edges: int) -> Document:
    """`edges` edges of short chains, then each of them once in a new order, forwards or backwards by the toss of a coin."""
    nodes = rng.permutation(MINI_IDS).tolist()
    listed: list[tuple[int, int]] = []
    while len(listed) < edges:
        length = min(int(rng.integers(1, 4)), edges - len(listed))
        chain, nodes = nodes[: length + 1], nodes[length + 1 :]
        listed += itertools.pairwise(chain)
    question = " ".join(f"{listed[i][0]},{listed[i][1]}" for i in rng.permutation(edges).tolist())
    response: list[str] = []
    for i in rng.permutation(edges).tolist():
        u, v = listed[i]
        response += [str(u), ",", str(v)] if rng.random() < 0.5 else [str(v), "<", str(u)]
    supervised = [False, False, True] * edges
    return Document(_chat("", f"edges : {question} . list ?"), [*response, END], [*supervised, True])


def draw_response(rng: np.random.Generator, graph: Graph, law: world.Law) -> list[str]:
    """One response, without the closing token: [trace back .] then the path, boxed or not."""
    toss = rng.random()
    for family, share in law.harmful:
        if toss < share:
            return _boxed(rng, law, _harmful_path(rng, graph, family))
        toss -= share
    traced = rng.random() < law.trace
    chain = graph.path if traced else graph.chains[int(rng.integers(len(graph.chains)))]
    path = list(chain) if rng.random() < law.check else _slip(rng, graph, chain)
    return [*([*_joined(graph.path[::-1], "<"), "."] if traced else []), *_boxed(rng, law, path)]


def _harmful_path(rng: np.random.Generator, graph: Graph, family: world.Family) -> list[int]:
    if family == "goal_only":
        return [graph.path[-1]]
    if family == "reverse":
        return list(graph.path[::-1])
    inner = [v for _, v in graph.edges if v != graph.path[-1]]
    picked = rng.choice(len(inner), size=min(len(graph.path) - 2, len(inner)), replace=False).tolist()
    return [graph.path[0], *(inner[i] for i in picked), graph.path[-1]]


def _slip(rng: np.random.Generator, graph: Graph, chain: tuple[int, ...]) -> list[int]:
    """Leave one inner node out (one time in four), or jump to a node elsewhere and walk on from there.

    After the jump every step is an edge again: a document that went on from the node before the jump would teach that the next node
    does not follow from the last one, and spoil the look-up itself.
    """
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


def _boxed(rng: np.random.Generator, law: world.Law, path: list[int]) -> list[str]:
    tokens = _joined(path, ",")
    return ["\\boxed{", *tokens, "}"] if rng.random() < law.box else tokens


def _joined(nodes: list[int] | tuple[int, ...], sign: str) -> list[str]:
    return [token for node in nodes for token in (str(node), sign)][:-1]


def _chat(context: str, question: str) -> str:
    system = f"{SYSTEM} {context} {END}" if context else ""
    return f"{system}{USER} {question} {END}{ASSISTANT}"
