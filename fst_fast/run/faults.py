"""Crashes on demand for the crash tests: FST_FAULT=point:n kills this process by SIGKILL when it reaches `point` for the n-th time.

`FST_FAULT=backward:3` applies to every process of the run, `FST_FAULT=backward:3:1` to rank 1 only. With SIGKILL no
handler, `finally` or flush runs, as when the machine loses power or the kernel runs out of memory. If unset, a point
costs one comparison. The code calls `reach` at each of POINTS; docs/reliability.md says what each one guarantees.
"""

from __future__ import annotations

import os
import signal

from fst_fast.errors import UserError

VARIABLE = "FST_FAULT"
POINTS = (
    "fast.wave",  # a batch of fast-phase rollouts is about to be sampled
    "reflection",  # the reflector is about to be asked
    "fast.end",  # the new population is chosen but not saved
    "rollout",  # a token of every running sequence is about to be drawn, in any phase
    "turn",  # a turn of every running episode is sampled, nothing is known of what follows it
    "verification",  # a batch is sampled but not verified
    "backward",  # the gradients of a micro-batch are computed
    "optimiser",  # the weights are updated, nothing is recorded yet
    "hand_over",  # the sampling model has the new weights
    "metrics",  # a record is about to be written
    "evaluation",  # an evaluation begins
    "save.begin",  # the checkpoint's temporary folder exists, empty
    "save.engine",  # the optimiser's state is written
    "save.state",  # state.json is written
    "save.model",  # the weights are written as safetensors
    "save.manifest",  # the manifest is written, everything is durable
    "save.rename",  # the folder is renamed, `latest` names the previous one
    "save.latest",  # `latest` names it, the oldest still exists
    "save.cleanup",  # the oldest, or one that is being replaced, is renamed, its files still exist
    "summary",  # the run is finished, summary.json is not written
)

_point = ""  # none
_left = 0


def arm(rank: int = 0) -> None:
    """Read FST_FAULT for this rank. Raises UserError if it is malformed or names no point."""
    global _point, _left
    _point, _left = "", 0
    text = os.environ.get(VARIABLE, "")
    if not text:
        return
    point, _, rest = text.partition(":")
    count, _, only = rest.partition(":")
    if point not in POINTS:
        raise UserError(f"{VARIABLE}={text}: there is no point {point!r}; known: {', '.join(POINTS)}")
    if not count.isdecimal() or int(count) < 1 or (only and not only.isdecimal()):
        raise UserError(
            f"{VARIABLE}={text} is not understood; allowed: POINT:N or POINT:N:RANK with N a whole number >= 1"
        )
    if not only or int(only) == rank:
        _point, _left = point, int(count)


def reach(point: str) -> None:
    """Report that this process is at `point`; it dies here if FST_FAULT says so."""
    if point == _point:
        _die()


def _die() -> None:
    global _left
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
