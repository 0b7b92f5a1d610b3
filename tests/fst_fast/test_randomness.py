"""The global generators depend only on what the process is about to do, not on what it did before."""

from __future__ import annotations

import random

import numpy as np
import torch

from fst_fast.run.randomness import seed_globals


def draws(*parts: object) -> tuple[float, float, float]:
    seed_globals(*parts)
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_every_generator_is_reseeded_for_each_phase_step_and_rank() -> None:
    first = draws(0, "update", 3, 1)
    draws(0, "update", 4, 1)
    random.random(), np.random.random(), torch.rand(5)
    assert draws(0, "update", 3, 1) == first
    others = [(1, "update", 3, 1), (0, "rollouts", 3, 1), (0, "update", 4, 1), (0, "update", 3, 0)]
    for generator in range(3):
        assert len({draws(*parts)[generator] for parts in others} | {first[generator]}) == 5
