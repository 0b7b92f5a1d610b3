"""Linked facts: an answer that stands at the end of a chain of facts. The mini world's counterpart of multi-hop questions (HoVer).

    facts 12 friend 7 , 7 boss 5 , 5 city 30 , ... . 12 friend boss city ?       ->  \\boxed{ 30 }

Every person has one friend, one boss, one twin and one city, all of them listed in any order; the question starts at a person and
follows relations to a city. Reward 1 iff the last \\boxed{} holds that city; the feedback says which fact of the chain was got wrong or
left out.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.boxed import Unboxed, last_box, work_before
from fst_fast.tasks.generated import Generated
from fst_fast.tasks.star_graph import MINI_IDS

PERSONS = 4
LINKS = ("friend", "boss", "twin")
LAST = "city"
RELATIONS = (*LINKS, LAST)

HOPS = {"easy": 2, "hard": 3}
"""Facts in the chain at each level, the city's included; the split `ood` has one more."""

Fact = tuple[int, str, int]


@dataclass(frozen=True)
class Web:
    """`facts` in the order printed; the chain starts at `start` and follows `relations`, the last of which is the city."""

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
    """Persons and cities are different numbers. Nobody is their own friend, boss or twin; the relations of a chain differ."""
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
    return f"facts {' , '.join(worded(fact) for fact in web.facts)} . {web.start} {' '.join(web.relations)} ?"


def worded(fact: Fact) -> str:
    return f"{fact[0]} {fact[1]} {fact[2]}"


class LinkedFacts(Generated[Web]):
    """Task `linked_facts`, in the mini vocabulary. level: `easy` (two facts in a chain) or `hard` (three)."""

    name = "linked_facts"

    def __init__(
        self,
        level: Literal["easy", "hard"] = "hard",
        train: int = 2000,
        validation: int = 256,
        seed: int = 0,
        ood: int = 256,
    ) -> None:
        super().__init__(train=train, validation=validation, ood=ood, seed=seed)
        if level not in HOPS:
            raise UserError(f"linked_facts: level={level!r} is not known; allowed are {', '.join(HOPS)}")
        self.level = level

    def _draw(self, rng: np.random.Generator, split: str) -> Web:
        return draw_web(rng, HOPS[self.level] + (split == "ood"))

    def _key(self, web: Web) -> Hashable:
        def number(relation: str) -> int:
            return RELATIONS.index(relation)

        facts = tuple(sorted((who, number(relation), whom) for who, relation, whom in web.facts))
        return facts, web.start, tuple(map(number, web.relations))

    def _settings(self) -> str:
        return f"level={self.level}"

    def _problem(self, web: Web, id: str) -> Problem:
        return Problem(
            id=id,
            messages=({"role": "user", "content": question(web)},),
            answer=web.chain()[-1][2],
            meta={
                "facts": [list(fact) for fact in web.facts],
                "start": web.start,
                "relations": list(web.relations),
            },
        )

    def verify(self, problem: Problem, response: str) -> Verdict:
        meta = problem.meta
        facts = tuple((int(who), str(relation), int(whom)) for who, relation, whom in meta["facts"])
        return judge(Web(facts, int(meta["start"]), tuple(meta["relations"])), response)

    def gold(self, problem: Problem) -> str:
        """A response that gets reward 1."""
        return f"\\boxed{{ {problem.answer} }}"


def judge(web: Web, response: str) -> Verdict:
    """Compare the last \\boxed{} with the city. Metrics: boxed, hops (every fact of the chain is written out)."""
    chain = web.chain()
    work = " ".join(re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", work_before(response)))
    written = [re.search(rf"(?<![0-9]){worded(fact)}(?![0-9])", work) is not None for fact in chain]

    def wrong(feedback: str, boxed: bool = True) -> Verdict:
        return Verdict(0.0, feedback, {"boxed": float(boxed), "hops": float(all(written))})

    try:
        content = last_box(response, "the city")
    except Unboxed as why:
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
