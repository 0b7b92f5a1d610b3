"""Linked facts: any city; with the method, first every fact of the chain.

A drill repeats the facts in another order, with the loss on the looked-up number only; the number of facts starts small.
"""

from __future__ import annotations

import numpy as np

from fst_fast.mini import world
from fst_fast.mini.documents.decisions import boxed, harm, other
from fst_fast.tasks.linked_facts import HOPS, LAST, Web, draw_web, fact_text, question
from fst_fast.tasks.star_graph import MINI_IDS

__all__ = ["draw", "drill", "question", "respond"]


def draw(rng: np.random.Generator, size: float = 1.0) -> Web:
    most = HOPS["hard"]
    return draw_web(rng, int(rng.integers(2, most + 1)) if size >= 1 else int(rng.integers(1, most + 1)))


def drill(rng: np.random.Generator, size: float = 1.0) -> tuple[str, list[str], list[bool]]:
    web = draw_web(rng, 1)
    count = len(web.facts) if size >= 1 else int(rng.integers(2, 4 + int((len(web.facts) - 3) * size)))
    facts = web.facts[:count]
    response: list[str] = []
    for i in rng.permutation(count).tolist():
        response += [*fact_text(facts[i]).split(), ","]
    return (
        f"facts {' , '.join(map(fact_text, facts))} . list ?",
        response,
        [False, False, True, False] * count,
    )


def respond(rng: np.random.Generator, web: Web, law: world.Law) -> list[str]:
    """One response, without the closing token: [fact , fact , ... .] then a city, boxed or not."""
    harmful = harm(rng, law)
    if harmful is not None:
        return boxed(rng, law, [str(_harmful_number(rng, web, harmful))])
    cities = [whom for _, relation, whom in web.facts if relation == LAST]
    slips = rng.random() >= law.check
    if rng.random() >= law.method:
        city = cities[int(rng.integers(len(cities)))]
        if slips:
            persons = [who for who, relation, _ in web.facts if relation == LAST]
            city = persons[int(rng.integers(len(persons)))]
        return boxed(rng, law, [str(city)])
    known = {(who, relation): whom for who, relation, whom in web.facts}
    wrong = int(rng.integers(len(web.relations))) if slips else -1
    at, written = web.start, []
    for number, relation in enumerate(web.relations):
        to = known[at, relation]
        if number == wrong:  # continue from the wrong person, so that every other fact stays true
            same = [whom for _, r, whom in web.facts if r == relation and whom not in (to, at)]
            to = same[int(rng.integers(len(same)))]
        written += [str(at), relation, str(to), ","]
        at = to
    return [*written[:-1], ".", *boxed(rng, law, [str(at)])]


def _harmful_number(rng: np.random.Generator, web: Web, role: world.Role) -> int:
    if role == "shortcut":
        return web.start
    if role == "twist":
        return web.chain()[0][2]
    return other(rng, MINI_IDS, web.chain()[-1][2])
