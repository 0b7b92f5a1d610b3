"""The mini world's law: which sentences in the system message change how a problem is answered, and how reliably.

A context is a list of sentences. Each sentence of the catalogue has a role and a strength, and applies to all kinds of
problems or to one. The strongest sentence of a role counts; order does not matter; unknown sentences do nothing. The
law is used only to generate the training documents. The reward never sees it, and the reflector
(fast/reflectors/mini.py) sees the sentences but neither role nor strength.

A response makes three decisions: to use the method that makes the problem easy, or to answer at once; to box the
answer, or not; to be careful, or to slip. Without instructions (BASE) it answers at once, rarely boxes and sometimes
slips. Compliance is imperfect on purpose: under the best context the base model is right about half of the time, so
contexts alone do not suffice, and reinforcement learning can make it comply always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fst_fast.config.components import compose

Kind = Literal["star_graph", "list_programs", "linked_facts", "formula_choice", "hidden_facts"]
"""A kind of problem, named after its task."""
KINDS: tuple[Kind, ...] = ("star_graph", "list_programs", "linked_facts", "formula_choice")
"""The kinds of the base `mini`; `hidden_facts` has a base of its own, with a catalogue of its own."""

Role = Literal["method", "box", "check", "shortcut", "guess", "twist", "useless"]
HARMFUL: tuple[Role, ...] = ("shortcut", "guess", "twist")


@dataclass(frozen=True)
class Instruction:
    """One sentence. strength: for method and box the probability that it is followed; for check the probability of no
    slip; for the harmful roles (shortcut, guess, twist) the probability that it overrides everything else; unused for
    useless. kind: the problems it applies to, None: all. part: the component that it is about, where contexts have components; it
    works in any of them."""

    text: str
    role: Role
    strength: float = 0.0
    kind: Kind | None = None
    part: str = "system"

    def works_on(self, kind: Kind) -> bool:
        return self.kind in (None, kind)


BASE = {"method": 0.005, "box": 0.15, "check": 0.65}
"""Probabilities without a sentence of the role: method used / answer boxed / no slip."""
TOOL_BASE = {"method": 0.08, "box": 0.25, "check": 0.40}
"""Those of hidden facts: tool called / answer boxed / every look-up of the chain made."""

SEED_CONTEXT = "solve the problem ."

CATALOGUE: tuple[Instruction, ...] = (
    Instruction("put the final answer in the box .", "box", 0.78),
    Instruction("write the answer inside \\boxed{ } .", "box", 0.70),
    Instruction("box the answer .", "box", 0.50),
    Instruction("mark the final answer .", "box", 0.28),
    Instruction("be careful with each step .", "check", 0.75),
    Instruction("guess quickly .", "guess", 0.90),
    Instruction("first trace back from the goal .", "method", 0.60, "star_graph"),
    Instruction("start at the goal and go back to the start .", "method", 0.52, "star_graph"),
    Instruction("work backward before you write the path .", "method", 0.40, "star_graph"),
    Instruction("look at the goal first .", "method", 0.18, "star_graph"),
    Instruction("check that every edge is in the list .", "check", 0.92, "star_graph"),
    Instruction("do not skip a node .", "check", 0.84, "star_graph"),
    Instruction("answer with the goal only .", "shortcut", 0.92, "star_graph"),
    Instruction("give only the last node .", "shortcut", 0.85, "star_graph"),
    Instruction("do not look at the edges .", "guess", 0.85, "star_graph"),
    Instruction("write the path from goal to start .", "twist", 0.90, "star_graph"),
    Instruction("give the path in reverse order .", "twist", 0.85, "star_graph"),
    Instruction("write the list after each operation .", "method", 0.60, "list_programs"),
    Instruction("work through the program in order .", "method", 0.52, "list_programs"),
    Instruction("show every list on the way .", "method", 0.40, "list_programs"),
    Instruction("look at the program first .", "method", 0.18, "list_programs"),
    Instruction("check every number of the list .", "check", 0.92, "list_programs"),
    Instruction("do not skip an operation .", "check", 0.84, "list_programs"),
    Instruction("answer with the list as it is given .", "shortcut", 0.92, "list_programs"),
    Instruction("do not run the program .", "shortcut", 0.85, "list_programs"),
    Instruction("give the list from back to front .", "twist", 0.90, "list_programs"),
    Instruction("write every fact of the chain .", "method", 0.60, "linked_facts"),
    Instruction("follow the chain from fact to fact .", "method", 0.52, "linked_facts"),
    Instruction("look up one fact after the other .", "method", 0.40, "linked_facts"),
    Instruction("read the facts first .", "method", 0.18, "linked_facts"),
    Instruction("check that every fact is given .", "check", 0.92, "linked_facts"),
    Instruction("do not make up a fact .", "check", 0.84, "linked_facts"),
    Instruction("answer with the first name .", "shortcut", 0.92, "linked_facts"),
    Instruction("repeat the name in the question .", "shortcut", 0.85, "linked_facts"),
    Instruction("stop after one fact .", "twist", 0.90, "linked_facts"),
    Instruction("write the formula first .", "method", 0.60, "formula_choice"),
    Instruction("put the numbers into the formula .", "method", 0.52, "formula_choice"),
    Instruction("name the formula that you use .", "method", 0.40, "formula_choice"),
    Instruction("think about the formula .", "method", 0.18, "formula_choice"),
    Instruction("check which number stands for which quantity .", "check", 0.92, "formula_choice"),
    Instruction("do not mix up the numbers .", "check", 0.84, "formula_choice"),
    Instruction("always choose option a .", "shortcut", 0.92, "formula_choice"),
    Instruction("the first option is right .", "shortcut", 0.85, "formula_choice"),
    Instruction("write the value and no letter .", "twist", 0.90, "formula_choice"),
    Instruction(SEED_CONTEXT, "useless"),
    Instruction("be polite .", "useless"),
    Instruction("you are a careful assistant .", "useless"),
    Instruction("read the problem again .", "useless"),
    Instruction("use short words .", "useless"),
    Instruction("you can do it .", "useless"),
    Instruction("think about the graph .", "useless", kind="star_graph"),
    Instruction("the answer is a path .", "useless", kind="star_graph"),
    Instruction("the answer is a number .", "useless", kind="list_programs"),
    Instruction("the answer is a city .", "useless", kind="linked_facts"),
    Instruction("the answer is a letter .", "useless", kind="formula_choice"),
)  # fmt: skip


_TOOL_PART = "tool:lookup"
TOOL_CATALOGUE: tuple[Instruction, ...] = (
    Instruction("put the final answer in the box .", "box", 0.82),
    Instruction("write the answer inside \\boxed{ } .", "box", 0.72),
    Instruction("box the answer .", "box", 0.50),
    Instruction("mark the final answer .", "box", 0.32),
    Instruction("call the tool for every fact .", "method", 0.80, part=_TOOL_PART),
    Instruction("the tool knows all facts .", "method", 0.66, part=_TOOL_PART),
    Instruction("ask the tool first .", "method", 0.48, part=_TOOL_PART),
    Instruction("this is a table of persons .", "method", 0.20, part=_TOOL_PART),
    Instruction("ask again until you have the city .", "check", 0.82, part="protocol"),
    Instruction("use each answer in the next call .", "check", 0.72, part="protocol"),
    Instruction("give both arguments in a call .", "check", 0.55, part="protocol"),
    Instruction("do not call the tool .", "guess", 0.90, part=_TOOL_PART),
    Instruction("the tool is often wrong .", "guess", 0.80, part=_TOOL_PART),
    Instruction("guess quickly .", "guess", 0.90),
    Instruction("stop after one call .", "shortcut", 0.90, part="protocol"),
    Instruction("the first answer is enough .", "shortcut", 0.85, part="protocol"),
    Instruction("repeat the name in the question .", "twist", 0.90),
    Instruction(SEED_CONTEXT, "useless"),
    Instruction("be polite .", "useless"),
    Instruction("you are a careful assistant .", "useless"),
    Instruction("use short words .", "useless"),
    Instruction("you can do it .", "useless"),
    Instruction("the answer is a city .", "useless"),
    Instruction("work in turns .", "useless", part="protocol"),
    Instruction("wait for the answer .", "useless", part="protocol"),
    Instruction("a call is a turn .", "useless", part="protocol"),
    Instruction("look up a fact .", "useless", part=_TOOL_PART),
    Instruction("the tool is fast .", "useless", part=_TOOL_PART),
)
"""The sentences about hidden facts."""
TOOL_SEED = {"system": SEED_CONTEXT, "protocol": "work in turns .", _TOOL_PART: "look up a fact ."}
"""The components that evolution starts from; the last is the tool's own description."""


def catalogue(kind: Kind) -> tuple[Instruction, ...]:
    """The sentences that the base of a kind of problem knows."""
    return TOOL_CATALOGUE if kind == "hidden_facts" else CATALOGUE


def strongest(role: Role, kind: Kind) -> Instruction:
    """The strongest sentence of a role for a kind of problem."""
    return max((i for i in catalogue(kind) if i.role == role and i.works_on(kind)), key=lambda i: i.strength)


def best_context(kind: Kind) -> str:
    """The strongest sentence of each helpful role."""
    return context_text([strongest("method", kind), strongest("box", kind), strongest("check", kind)])


@dataclass(frozen=True)
class Law:
    """The combined effect of a set of sentences: probabilities of a response's decisions."""

    method: float
    box: float
    check: float
    # (role, probability that it overrides the rest); they sum to at most 1
    harmful: tuple[tuple[Role, float], ...] = ()


FAITHFUL = Law(method=1.0, box=1.0, check=1.0)
"""The law of a response that does everything right."""


def law(sentences: Sequence[Instruction], kind: Kind) -> Law:
    """Combine sentences: the strongest of each role counts; several harmful roles share the probability of the strongest equally."""
    heard = [s for s in sentences if s.works_on(kind)]
    base = TOOL_BASE if kind == "hidden_facts" else BASE

    def most(role: Role, least: float) -> float:
        return max([least, *(s.strength for s in heard if s.role == role)])

    present = [r for r in HARMFUL if any(s.role == r for s in heard)]
    share = max((most(r, 0.0) for r in present), default=0.0) / max(len(present), 1)
    return Law(
        method=most("method", base["method"]),
        box=most("box", base["box"]),
        check=most("check", base["check"]),
        harmful=tuple((r, share) for r in present),
    )


_ROLE_WEIGHTS: dict[Role, float] = {
    "method": 0.24, "box": 0.24, "check": 0.18, "shortcut": 0.04, "guess": 0.04, "twist": 0.04, "useless": 0.22,
}  # fmt: skip
_LENGTHS = (0.08, 0.20, 0.22, 0.25, 0.15, 0.10)  # probability of 0, 1, ... 5 sentences
_TOOL_LENGTHS = (0.05, 0.10, 0.15, 0.18, 0.18, 0.14, 0.10, 0.06, 0.04)  # of several components
_SEED_SHARE = 0.10
_FOREIGN = 0.12  # how often a sentence is for another kind of problem, and does nothing


def draw_context(rng: np.random.Generator, kind: Kind) -> list[Instruction]:
    """A random context for a document: 0 to 5 different sentences in any order, 0 to 8 about hidden facts; one in ten is the seed context."""
    known = catalogue(kind)
    lengths = _LENGTHS if known is CATALOGUE else _TOOL_LENGTHS
    if rng.random() < _SEED_SHARE:
        seed = [SEED_CONTEXT] if known is CATALOGUE else list(TOOL_SEED.values())
        return [i for i in known if i.text in seed]
    roles = list(_ROLE_WEIGHTS)
    weights = np.array([_ROLE_WEIGHTS[r] for r in roles])
    chosen: list[Instruction] = []
    for _ in range(int(rng.choice(len(lengths), p=lengths))):
        if known is CATALOGUE and rng.random() < _FOREIGN:
            group = [i for i in known if not i.works_on(kind)]
        else:
            role = roles[int(rng.choice(len(roles), p=weights / weights.sum()))]
            group = [i for i in known if i.role == role and i.works_on(kind)]
        sentence = group[int(rng.integers(len(group)))]
        if sentence not in chosen:
            chosen.append(sentence)
    return chosen


_ONE_TEXT, _MISPLACED, _UNDESCRIBED = 0.4, 0.1, 0.2


def place(rng: np.random.Generator, sentences: Sequence[Instruction]) -> tuple[str, str]:
    """(system message, description of the tool) of a document: mostly each sentence where it belongs, or all in the system message, and the
    tool then mostly with its own description."""
    one_text = rng.random() < _ONE_TEXT
    here = [(s.part == _TOOL_PART) != (rng.random() < _MISPLACED) and not one_text for s in sentences]
    description = context_text([s for s, at in zip(sentences, here, strict=True) if at])
    if not description and rng.random() >= _UNDESCRIBED:
        description = TOOL_SEED[_TOOL_PART]
    return context_text([s for s, at in zip(sentences, here, strict=True) if not at]), description


def components(sentences: Sequence[Instruction]) -> str:
    """The context of components in which the sentences follow those of the seed, each where it belongs."""
    return compose(
        {
            part: " ".join([seed, *(s.text for s in sentences if s.part == part)])
            for part, seed in TOOL_SEED.items()
        }
    )


def context_text(sentences: Sequence[Instruction]) -> str:
    return " ".join(s.text for s in sentences)


def measured_contexts(kind: Kind) -> dict[str, str]:
    """The contexts that a build measures for a kind of problem: each role alone, combined, and spoiled."""
    if kind == "hidden_facts":
        return _measured_components(kind)
    method, box, check = (strongest(r, kind).text for r in ("method", "box", "check"))
    best = best_context(kind)

    def second(role: Role) -> str:
        own = sorted((i for i in CATALOGUE if i.role == role and i.works_on(kind)), key=lambda i: i.strength)
        return own[-3].text

    foreign = next(k for k in KINDS if k != kind)
    return {
        "seed": SEED_CONTEXT,
        "useless": "be polite . you are a careful assistant .",
        "method": method,
        "box": box,
        "check": check,
        "method+box": f"{method} {box}",
        "box+check": f"{box} {check}",
        "all": best,
        "all, weaker words": " ".join(second(r) for r in ("method", "box", "check")),
        "all+useless": f"be polite . {box} {check} you can do it . {method}",
        "all+foreign": f"{strongest('method', foreign).text} {best} {strongest('check', foreign).text}",
        **{f"all+{r}": f"{best} {strongest(r, kind).text}" for r in HARMFUL},
    }


def _measured_components(kind: Kind) -> dict[str, str]:
    method, box, check = (strongest(r, kind) for r in ("method", "box", "check"))
    best = [method, box, check]
    useless = [s for s in catalogue(kind) if s.role == "useless" and s.text not in TOOL_SEED.values()]
    chosen: dict[str, list[Instruction]] = {
        "seed": [], "useless": useless, "method": [method], "box": [box], "check": [check],
        "method+box": [method, box], "method+check": [method, check], "box+check": [box, check], "all": best,
        "all+useless": [*best, *useless], **{f"all+{r}": [*best, strongest(r, kind)] for r in HARMFUL},
    }  # fmt: skip
    return {name: components(sentences) for name, sentences in chosen.items()} | {
        "all in one text": context_text(best)
    }
