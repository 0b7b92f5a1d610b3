"""The order in which a run meets its problems: minibatches, the lookahead of a cycle, its anchor set.

Each is a function of (seed, step or cycle), so the step number is the only cursor and nothing needs saving.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fst_fast.contracts import Problem
from fst_fast.errors import UserError


def minibatch(problems: Sequence[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The problems of step `step`: a fresh permutation each epoch, whole batches only, so no problem stands twice in a batch."""
    per_epoch = len(problems) // size
    if per_epoch == 0:
        raise UserError(
            f"slow.problems_per_step={size} is more than the {len(problems)} problems of the training split; at most {len(problems)}"
        )
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(problems))
    return [problems[i] for i in order[place * size : (place + 1) * size]]


def spare_problems(
    problems: Sequence[Problem], step: int, batch: Sequence[Problem], seed: int
) -> Iterator[Problem]:
    """The problems that are not in the minibatch of step `step`, in an order of the step's own: for slow.dynamic_sampling."""
    taken = {p.id for p in batch}
    for i in np.random.default_rng([seed, 3, step]).permutation(len(problems)):
        if problems[i].id not in taken:
            yield problems[i]


def lookahead(problems: Sequence[Problem], step: int, steps: int, size: int, seed: int) -> list[Problem]:
    """The union of the next `steps` minibatches, each problem once, in order."""
    batches = (minibatch(problems, step + t, size, seed) for t in range(steps))
    return list({p.id: p for batch in batches for p in batch}.values())


def anchor_set(ahead: Sequence[Problem], size: int, cycle: int, seed: int) -> list[Problem]:
    """`size` problems of the lookahead, drawn anew each cycle, in stream order."""
    if len(ahead) <= size:
        return list(ahead)
    chosen = np.random.default_rng([seed, 2, cycle]).choice(len(ahead), size=size, replace=False)
    return [ahead[i] for i in sorted(chosen)]
