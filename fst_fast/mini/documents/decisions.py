"""The decisions common to all kinds of responses, drawn from a law."""

from __future__ import annotations

import numpy as np

from fst_fast.mini import world


def harm(rng: np.random.Generator, law: world.Law) -> world.Role | None:
    """The harmful role that overrides this response, if any."""
    toss = rng.random()
    for role, share in law.harmful:
        if toss < share:
            return role
        toss -= share
    return None


def boxed(rng: np.random.Generator, law: world.Law, answer: list[str]) -> list[str]:
    """The answer's tokens, boxed or not."""
    return ["\\boxed{", *answer, "}"] if rng.random() < law.box else answer


def other(rng: np.random.Generator, numbers: int, *excluded: int) -> int:
    """A number below `numbers` that is not among the excluded."""
    while True:
        drawn = int(rng.integers(numbers))
        if drawn not in excluded:
            return drawn
