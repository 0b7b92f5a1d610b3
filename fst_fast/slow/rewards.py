"""Rewards as the advantages see them: the verdict's or a user's function of the group, less a penalty for length, clipped, in this order.

The user's function (slow.reward_shaping) runs in the process that holds the group, after the graders, on judged rollouts only. It must be
pure: a resumed run calls it again and must get the same numbers. It is trusted code without a time limit; what reads a model's output as
code belongs into a grader. The length penalty is the soft overlong punishment of DAPO (arXiv 2503.14476, Eq. 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fst_fast.config import SlowConfig
from fst_fast.contracts import Problem, Rollout, ScoredRollout
from fst_fast.errors import UserError
from fst_fast.tasks.user import call_user, load_object
from fst_fast.tasks.verdicts import plain_number

Rewards = Callable[[Sequence[ScoredRollout]], list[float]]
"""The rewards of the judged rollouts of one problem."""


def load_shaping(spec: str) -> Callable[[Problem, Sequence[ScoredRollout]], Any]:
    """The function that slow.reward_shaping names. Raises UserError."""
    function = load_object(spec, "slow.reward_shaping")
    if not callable(function) or isinstance(function, type):
        raise UserError(f"slow.reward_shaping={spec} is no function; it must be one of (problem, rollouts)")
    return function  # type: ignore[no-any-return]


def training_rewards(slow: SlowConfig, longest: int, problems: Sequence[Problem]) -> Rewards | None:
    """None where rewards are the verdicts'. longest: rollout.max_response_tokens; problems: of the groups. The result raises UserError where
    the user's function fails."""
    if slow.reward_shaping is None and slow.reward_clip is None and not slow.overlong_buffer:
        return None
    shape = None if slow.reward_shaping is None else load_shaping(slow.reward_shaping)
    by_id = {problem.id: problem for problem in problems}

    def rewards(members: Sequence[ScoredRollout]) -> list[float]:
        found = [float(m.verdict.reward) for m in members if m.verdict.reward is not None]
        if shape is not None and members:
            found = _shaped(shape, by_id[members[0].rollout.problem_id], members, slow.reward_shaping)
        if slow.overlong_buffer:
            lengths = [longest_response(m.rollout) for m in members]
            found = [
                r + slow.overlong_penalty * length_penalty(n, longest, slow.overlong_buffer)
                for r, n in zip(found, lengths, strict=True)
            ]
        if slow.reward_clip is not None:
            low, high = slow.reward_clip
            found = [min(max(r, low), high) for r in found]
        return found

    return rewards


def longest_response(rollout: Rollout) -> int:
    """Tokens of the response, of an episode those of its longest one."""
    return max((turn.length for turn in rollout.turns), default=len(rollout.response_ids))


def length_penalty(tokens: int, longest: int, buffer: int) -> float:
    """0 up to longest - buffer tokens, then falling in proportion to -1 at `longest`."""
    return -min(max(tokens - (longest - buffer), 0) / buffer, 1.0)


def _shaped(
    shape: Callable[[Problem, Sequence[ScoredRollout]], Any],
    problem: Problem,
    members: Sequence[ScoredRollout],
    spec: str | None,
) -> list[float]:
    what = f"slow.reward_shaping={spec}, problem {problem.id}"
    given = call_user(lambda: list(shape(problem, members)), f"{what}: the function failed")
    found = [plain_number(value) for value in given]
    if len(found) != len(members):
        raise UserError(f"{what}: {len(found)} rewards for {len(members)} rollouts; allowed: one for each")
    for value, number in zip(given, found, strict=True):
        if number is None or not math.isfinite(number):
            raise UserError(f"{what}: the reward {str(value)[:100]!r}; allowed: a finite number")
    return [number for number in found if number is not None]
