"""The mini world's law: which sentences in the system message change how a problem is answered, and how reliably.

A context is a list of sentences. Each sentence of the catalogue belongs to one family and has a strength; the strongest sentence of a
family counts, order does not matter, unknown sentences do nothing. What remains without any instruction (BASE) is a walk forward from
the start on an arm picked at random, rarely traced, rarely boxed, sometimes with a slip. The law is used only to write the training
documents: the reward never sees it, the reflector (contexts/reflectors/mini.py) sees the sentences but neither family nor strength.

Compliance is imperfect on purpose: under the best context the base model is right about half of the time, so contexts alone do not
suffice, and reinforcement learning can make it comply always.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Family = Literal["trace", "box", "check", "goal_only", "guess", "reverse", "useless"]
HARMFUL: tuple[Family, ...] = ("goal_only", "guess", "reverse")


@dataclass(frozen=True)
class Instruction:
    """One sentence. strength: trace, box: probability that it is followed; check: probability that no slip is made; harmful:
    probability that it overrides everything else; useless: unused."""

    text: str
    family: Family
    strength: float = 0.0


BASE = {"trace": 0.03, "box": 0.15, "check": 0.65}
"""What happens without a sentence of the family: traced / boxed / free of slips."""

SEED_CONTEXT = "solve the problem ."

CATALOGUE: tuple[Instruction, ...] = (
    Instruction("first trace back from the goal .", "trace", 0.60),
    Instruction("start at the goal and go back to the start .", "trace", 0.52),
    Instruction("work backward before you write the path .", "trace", 0.40),
    Instruction("look at the goal first .", "trace", 0.18),
    Instruction("put the final path in the box .", "box", 0.78),
    Instruction("write the answer inside \\boxed{ } .", "box", 0.70),
    Instruction("box the path .", "box", 0.50),
    Instruction("mark the final answer .", "box", 0.28),
    Instruction("check that every edge is in the list .", "check", 0.92),
    Instruction("do not skip a node .", "check", 0.84),
    Instruction("be careful with each step .", "check", 0.75),
    Instruction("answer with the goal only .", "goal_only", 0.92),
    Instruction("give only the last node .", "goal_only", 0.85),
    Instruction("guess quickly .", "guess", 0.90),
    Instruction("do not look at the edges .", "guess", 0.85),
    Instruction("write the path from goal to start .", "reverse", 0.90),
    Instruction("give the path in reverse order .", "reverse", 0.85),
    Instruction(SEED_CONTEXT, "useless"),
    Instruction("be polite .", "useless"),
    Instruction("you are a careful assistant .", "useless"),
    Instruction("read the problem again .", "useless"),
    Instruction("think about the graph .", "useless"),
    Instruction("the answer is a path .", "useless"),
    Instruction("use short words .", "useless"),
    Instruction("you can do it .", "useless"),
)

TRACE, BOX, CHECK = (
    "first trace back from the goal .",
    "put the final path in the box .",
    "check that every edge is in the list .",
)
BEST_CONTEXT = f"{TRACE} {BOX} {CHECK}"

MEASURED_CONTEXTS: dict[str, str] = {
    "seed": SEED_CONTEXT,
    "useless": "be polite . you are a careful assistant .",
    "trace": TRACE,
    "box": BOX,
    "check": CHECK,
    "trace+box": f"{TRACE} {BOX}",
    "box+check": f"{BOX} {CHECK}",
    "all": BEST_CONTEXT,
    "all, weaker words": "work backward before you write the path . box the path . be careful with each step .",
    "all+useless": f"be polite . {BOX} {CHECK} you can do it . {TRACE}",
    "all+goal_only": f"{BEST_CONTEXT} answer with the goal only .",
    "all+guess": f"{BEST_CONTEXT} guess quickly .",
    "all+reverse": f"{BEST_CONTEXT} write the path from goal to start .",
}
"""What a build measures: each family alone, together, and spoiled."""


@dataclass(frozen=True)
class Law:
    """What a set of sentences amounts to: probabilities of the decisions that a response makes."""

    trace: float
    box: float
    check: float
    harmful: tuple[
        tuple[Family, float], ...
    ] = ()  # (family, probability that this one takes over); they sum to at most 1


def law(sentences: Sequence[Instruction]) -> Law:
    """Combine: the strongest of a family counts; several harmful families share the probability of the strongest equally."""

    def strongest(family: Family, base: float) -> float:
        return max([base, *(s.strength for s in sentences if s.family == family)])

    present = [f for f in HARMFUL if any(s.family == f for s in sentences)]
    share = max((strongest(f, 0.0) for f in present), default=0.0) / max(len(present), 1)
    return Law(
        trace=strongest("trace", BASE["trace"]),
        box=strongest("box", BASE["box"]),
        check=strongest("check", BASE["check"]),
        harmful=tuple((f, share) for f in present),
    )


_FAMILY_WEIGHTS: dict[Family, float] = {
    "trace": 0.24, "box": 0.24, "check": 0.18, "goal_only": 0.04, "guess": 0.04, "reverse": 0.04, "useless": 0.22,
}  # fmt: skip
_BY_FAMILY = {f: [i for i in CATALOGUE if i.family == f] for f in _FAMILY_WEIGHTS}
_LENGTHS = (0.08, 0.20, 0.22, 0.25, 0.15, 0.10)  # probability of 0, 1, ... 5 sentences
_SEED_SHARE = 0.10


def draw_context(rng: np.random.Generator) -> list[Instruction]:
    """A random context of the documents: 0 to 5 different sentences in any order; every tenth is the seed context alone."""
    if rng.random() < _SEED_SHARE:
        return [i for i in CATALOGUE if i.text == SEED_CONTEXT]
    families = list(_FAMILY_WEIGHTS)
    weights = np.array([_FAMILY_WEIGHTS[f] for f in families])
    chosen: list[Instruction] = []
    for _ in range(int(rng.choice(len(_LENGTHS), p=_LENGTHS))):
        group = _BY_FAMILY[families[int(rng.choice(len(families), p=weights / weights.sum()))]]
        sentence = group[int(rng.integers(len(group)))]
        if sentence not in chosen:
            chosen.append(sentence)
    return chosen


def context_text(sentences: Sequence[Instruction]) -> str:
    return " ".join(s.text for s in sentences)
