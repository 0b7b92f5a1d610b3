"""Linked facts: the answer is at the end of a chain of facts. The mini world's counterpart of multi-hop questions (HoVer).

    facts 12 friend 7 , 7 boss 5 , 5 city 30 , ... . 12 friend boss city ?       ->  \\boxed{ 30 }

Every person has one friend, one boss, one twin and one city, all listed in random order; the question starts at a
person and follows relations to a city. Reward 1 iff the last \\boxed{} holds that city; the feedback says which fact of
the chain is wrong or missing.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from fst_fast.contracts import Verdict
from fst_fast.tasks.boxed import NoBoxedAnswer, last_box, work_before
from fst_fast.tasks.generated import MiniTask
from fst_fast.tasks.star_graph import MINI_IDS

PERSONS = 4
LINKS = ("friend", "boss", "twin")
LAST = "city"
RELATIONS = (*LINKS, LAST)

HOPS = {"easy": 2, "hard": 3}
"""Facts in the chain at each level, including the city's; the split `ood` has one more."""

Fact = tuple[int, str, int]


@dataclass(frozen=True)
class Web:
    """`facts` in printed order; the chain starts at `start` and follows `relations`, the last of which is the city."""

    facts: tuple[Fact, ...]
    start: int
    relations: tuple[str, ...]

    def chain(self) -> list[Fact]:
        """The facts that lead from the start to the answer, in order."""
        known = {(who, relation): whom for who, relation, whom in self.facts}
        chain, at = [], self.start
        for relation in self.relations:
            chain.append((at, relation, known[at, relation]))
            at = known[at, relation]
        return chain


def draw_web(rng: np.random.Generator, hops: int) -> Web:
    """Persons and cities are different numbers. No person is their own friend, boss or twin; the relations of a chain differ."""
    ids = rng.permutation(MINI_IDS).tolist()
    persons, cities = ids[:PERSONS], ids[PERSONS : 2 * PERSONS]
    facts: list[Fact] = [(p, LAST, c) for p, c in zip(persons, cities, strict=True)]
    for relation in LINKS:
        others = rng.permutation(PERSONS)
        while (others == np.arange(PERSONS)).any():
            others = rng.permutation(PERSONS)
        facts += [(persons[i], relation, persons[int(j)]) for i, j in enumerate(others)]
    links = [LINKS[int(i)] for i in rng.permutation(len(LINKS))[: hops - 1]]
    order = rng.permutation(len(facts)).tolist()
    return Web(tuple(facts[i] for i in order), persons[int(rng.integers(PERSONS))], (*links, LAST))


def question(web: Web) -> str:
    return (
        f"facts {' , '.join(fact_text(fact) for fact in web.facts)} . {web.start} {' '.join(web.relations)} ?"
    )


def fact_text(fact: Fact) -> str:
    return f"{fact[0]} {fact[1]} {fact[2]}"


def judge(web: Web, response: str) -> Verdict:
    """Compare the last \\boxed{} with the city. Metrics: boxed, hops (every fact of the chain is written out)."""
    chain = web.chain()
    work = " ".join(re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", work_before(response)))
    written = [re.search(rf"(?<![0-9]){fact_text(fact)}(?![0-9])", work) is not None for fact in chain]

    def wrong(feedback: str, boxed: bool = True) -> Verdict:
        return Verdict(0.0, feedback, {"boxed": float(boxed), "hops": float(all(written))})

    try:
        content = last_box(response, "the city")
    except NoBoxedAnswer as why:
        return wrong(str(why), "\\boxed" in response)
    if not re.fullmatch(r"[0-9]{1,9}", content):
        return wrong(f"the box must hold one number, the city, but it holds {content[:40]!r}.")
    answer = int(content)
    if answer == chain[-1][2]:
        return Verdict(1.0, "right.", {"boxed": 1.0, "hops": float(all(written))})
    if answer == web.start:
        return wrong(
            f"the box holds the first name {answer}: the question asks where its chain of facts ends."
        )
    if answer in [whom for _, relation, whom in chain if relation != LAST]:
        return wrong(
            f"the chain stops too early: {answer} is a person on the way, and the city is asked for."
        )
    for (who, relation, whom), there in zip(chain, written, strict=True):
        if there:
            continue
        said = re.search(rf"(?<![0-9]){who} {relation} ([0-9]+)", work)
        if said:
            return wrong(f"the fact {who} {relation} {said[1]} does not exist: {who} {relation} is {whom}.")
        return wrong(
            f"{answer} is the wrong city: the fact {who} {relation} {whom} of the chain was not looked up."
        )
    return wrong(
        f"every fact of the chain is right, but the box does not hold {chain[-1][2]}, where it ends."
    )


class LinkedFacts(MiniTask[Web]):
    """Task `linked_facts`, in the mini vocabulary. level: `easy` (two facts in a chain) or `hard` (three)."""

    name, instance_type, sizes_by_level = "linked_facts", Web, HOPS
    _sample, _question, _judge = staticmethod(draw_web), staticmethod(question), staticmethod(judge)

    def _answer(self, web: Web) -> int:
        return web.chain()[-1][2]

    def _key(self, web: Web) -> Hashable:
        def number(relation: str) -> int:
            return RELATIONS.index(relation)

        facts = tuple(sorted((who, number(relation), whom) for who, relation, whom in web.facts))
        return facts, web.start, tuple(map(number, web.relations))
