"""Hidden facts: any number; with the method, first the look-ups of the chain, each a turn of its own.

A drill is an episode without a slip and without a context; it starts with one look-up.
"""

from __future__ import annotations

import numpy as np

from fst_fast.mini import world
from fst_fast.mini.documents.decisions import boxed, harm, other
from fst_fast.mini.tokenizer import ASSISTANT, END, TOOL
from fst_fast.tasks.hidden_facts import NOTHING, call_text, question
from fst_fast.tasks.linked_facts import HOPS, Web, draw_web
from fst_fast.tasks.star_graph import MINI_IDS

__all__ = ["draw", "drill", "question", "respond"]

MISSING = "error : lookup : the argument what : field required"
_INVALID, _UNKNOWN = (
    0.2,
    0.15,
)  # of the slips: a call without an argument, a call about nobody; the others stop early


def draw(rng: np.random.Generator, size: float = 1.0) -> Web:
    """The same at every size: an episode that stops early has at least two facts."""
    return draw_web(rng, int(rng.integers(2, HOPS["hard"] + 1)))


def drill(rng: np.random.Generator, size: float = 1.0) -> tuple[str, list[str], list[bool]]:
    web = draw_web(rng, int(rng.integers(1, 2 + round(size * (HOPS["hard"] - 1)))))
    response = respond(rng, web, world.FAITHFUL)
    return question(web), response, sampled(response)


def sampled(response: list[str]) -> list[bool]:
    """Which tokens of an episode the policy writes: all but those behind an end token up to the next response."""
    writes, found = True, []
    for token in response:
        found.append(writes)
        writes = token == ASSISTANT or (writes and token != END)
    return found


def respond(rng: np.random.Generator, web: Web, law: world.Law) -> list[str]:
    """One episode, without the closing token: [call, observation, ...] and a number, boxed or not."""
    harmful = harm(rng, law)
    if harmful == "twist":
        return boxed(rng, law, [str(web.start)])
    if harmful == "guess" or (harmful is None and rng.random() >= law.method):
        return boxed(rng, law, [str(rng.integers(MINI_IDS))])
    chain = web.chain()
    slip = rng.random() if rng.random() >= law.check else None
    if harmful == "shortcut":
        chain, slip = chain[:1], None
    if slip is not None:  # the look-up at which it happens; one more is made before it stops early
        chain = chain[: int(rng.integers(1, len(chain)))]
    written: list[str] = []
    answer = web.start
    for who, relation, answer in chain:
        written += _turn(call_text(who, relation), str(answer))
    if slip is not None and slip < _INVALID + _UNKNOWN:
        who, relation, _ = web.chain()[len(chain)]
        whole = call_text(other(rng, MINI_IDS, *(fact[0] for fact in web.facts)), relation)
        written += (
            _turn(call_text(who, relation).replace(f' , "what": "{relation}"', ""), MISSING)
            if slip < _INVALID
            else _turn(whole, NOTHING)
        )
        answer = int(rng.integers(MINI_IDS))
    return [*written, *boxed(rng, law, [str(answer)])]


def _turn(call: str, observation: str) -> list[str]:
    return [*call.split(), END, TOOL, *observation.split(), END, ASSISTANT]
