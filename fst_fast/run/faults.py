"""Crashes on demand, for the tests that kill a run everywhere: FST_FAULT=point:n ends this process by SIGKILL when it is there the n-th time.

`FST_FAULT=backward:3` meets every process of the run, `FST_FAULT=backward:3:1` rank 1 alone. SIGKILL and nothing milder: no handler, no
`finally`, no flush runs, as when the machine loses its power or the kernel its memory. Unset, a point costs one comparison.
The points stand where they are reached; docs/reliability.md says what each promises.
"""

from __future__ import annotations

import os
import signal

from fst_fast.errors import UserError

VARIABLE = "FST_FAULT"
POINTS = (
    "fast.wave",  # a fast-phase wave is about to be sampled
    "reflection",  # the reflector is about to be asked
    "fast.end",  # the new population is known and not written
    "rollout",  # a token of every running sequence is about to be drawn, in any phase
    "verification",  # a wave is sampled and not judged
    "backward",  # the gradients of a micro-batch are there
    "optimiser",  # the weights have taken the gradients, nobody knows yet
    "hand_over",  # the rollouts have the new weights
    "metrics",  # a record is about to be written
    "evaluation",  # an evaluation begins
    "save.begin",  # the folder of a checkpoint is there, empty
    "save.engine",  # the optimiser's state is in it
    "save.state",  # state.json too
    "save.model",  # the weights as safetensors too
    "save.manifest",  # the manifest too, all of it durable
    "save.rename",  # the folder has its name, `latest` names the one before
    "save.latest",  # `latest` names it, the oldest is still there
    "save.cleanup",  # the oldest has lost its name, its files are there
    "summary",  # the run has ended, summary.json is not written
)

_point = ""  # none
_left = 0


def arm(rank: int = 0) -> None:
    """Read FST_FAULT. Raises UserError where it names no point."""
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
    """This process is at `point` now."""
    if point == _point:
        _die()


def _die() -> None:
    global _left
    _left -= 1
    if _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
