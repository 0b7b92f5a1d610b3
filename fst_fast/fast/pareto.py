"""Compare contexts on the same problems: the per-problem front, who may be a parent, who is admitted, who is kept.

Everything here is a pure function of a score matrix, so all processes with the same scores decide the same. Rows are
contexts (oldest first), columns are problems; NaN means "no judged sample".

A context *wins* a problem if none scores higher there. A problem on which all known contexts tie does not distinguish
them and is ignored: it cannot change who is dominated, since all share its front, but would pull the choice of parents
towards uniform. *Dominated* is GEPA's term (arXiv 2507.19457): every problem that the context wins is also won by a
context that is not dominated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from fst_fast.contracts import REWARD_ROUNDING

Matrix = NDArray[np.float64]
UNKNOWN_GAIN = 0.1
"""The deviation of what an edit gains in mean reward, before two have been scored."""
Mask = NDArray[np.bool_]

TIE = REWARD_ROUNDING
"""Scores, in [0, 1], closer than this are equal: sums of the same rewards in another order differ in the last bits."""

CLEARLY_WORSE_Z = 2.0
"""A context further below the best than this, in standard errors of the paired difference, is kept only for problems it alone wins."""

CERTAIN_GAIN = 2
"""How many problems a context must add to those that the kept ones win: a single one may be luck."""


def wins(scores: Matrix) -> Mask:
    """[C, N] -> [C, N]: which contexts win each problem; all False for problems that do not distinguish contexts."""
    known = ~np.isnan(scores)
    best = np.where(known, scores, -np.inf).max(axis=0, initial=-np.inf)  # [N]
    worst = np.where(known, scores, np.inf).min(axis=0, initial=np.inf)  # [N]
    distinguishes = np.zeros(scores.shape[1], dtype=np.bool_)
    finite = known.any(axis=0)
    distinguishes[finite] = best[finite] - worst[finite] > TIE
    front: Mask = (
        known & distinguishes & (np.where(known, scores, -np.inf) >= np.where(finite, best, np.inf) - TIE)
    )
    return front


def row_means(scores: Matrix) -> NDArray[np.float64]:
    """[C, N] -> [C]: mean over the problems with a score; NaN if there is none."""
    known = ~np.isnan(scores)
    count = known.sum(axis=1)
    total = np.where(known, scores, 0.0).sum(axis=1)
    means: NDArray[np.float64] = np.divide(total, count, out=np.full(len(scores), np.nan), where=count > 0)
    return means


def undominated(scores: Matrix) -> Mask:
    """[C, N] -> [C]: contexts left after removing dominated ones, worst mean first (of equals the younger first).

    One pass suffices: a context that is needed for a problem stays needed when others are removed."""
    front = wins(scores)
    standing = np.ones(len(scores), dtype=np.bool_)
    for row in _by_mean(scores)[::-1]:
        others = standing.copy()
        others[row] = False
        if not (front[row] & ~front[others].any(axis=0)).any():
            standing[row] = False
    if not standing.any():  # no problem distinguishes contexts, so none is dominated
        standing[:] = True
    return standing


def parent_weights(scores: Matrix) -> NDArray[np.float64]:
    """[C, N] -> [C], summing to 1: proportional to the problems that each undominated context wins; uniform if no
    problem distinguishes contexts."""
    weights = (wins(scores) & undominated(scores)[:, None]).sum(axis=1).astype(np.float64)
    if weights.sum() == 0:
        weights = np.ones(len(scores))
    share: NDArray[np.float64] = weights / weights.sum()
    return share


def expected_improvement(rewards: Matrix, gains: Sequence[float]) -> NDArray[np.float64]:
    """[C, N, S] -> [C], summing to 1: proportional to how much a child of each context is expected to exceed the best mean.

    gains: what earlier edits gained over their parents. A child's mean is taken as normal, around its parent's, with the variance of the
    parent's estimate (over problems) plus that of the gains. Uniform where no child is expected to improve."""
    known = ~np.isnan(rewards)
    count = known.sum(axis=2)
    total = np.where(known, rewards, 0.0).sum(axis=2)
    values = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)  # [C, N]
    means, n = row_means(values), (count > 0).sum(axis=1)
    squares = np.nansum((values - means[:, None]) ** 2, axis=1) / np.maximum(n - 1, 1) / np.maximum(n, 1)
    spread = float(np.mean(np.square(gains))) if len(gains) > 1 else UNKNOWN_GAIN**2
    deviation = np.sqrt(squares + max(spread, TIE))
    below = np.nan_to_num(means) - np.nanmax(means, initial=0.0)
    z = below / deviation
    gain = below * ndtr(z) + deviation * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    share: NDArray[np.float64] = gain / gain.sum() if gain.sum() > 0 else np.full(len(gain), 1 / len(gain))
    return share


def lower_bound(child: Matrix, parent: Matrix, z: float) -> NDArray[np.float64]:
    """[..., N, S] rewards of child and parent on the same (problem, sample) pairs -> [...]: mean paired difference
    minus z standard errors, over problems.

    A pair counts if both are judged. A problem's difference is the mean over its pairs. The standard error is that of
    the mean over problems (n - 1 in the variance). With fewer than two problems there is none: the bound is -inf, or
    the plain difference for z = 0. Without any pair: -inf."""
    pairs = ~(np.isnan(child) | np.isnan(parent))
    per_problem = pairs.sum(axis=-1)  # [..., N]
    summed = np.where(pairs, child - parent, 0.0).sum(axis=-1)
    difference = np.divide(summed, per_problem, out=np.zeros_like(summed), where=per_problem > 0)
    used = per_problem > 0
    n = used.sum(axis=-1)  # [...]
    mean = difference.sum(axis=-1) / np.maximum(n, 1)
    squares = (np.where(used, difference - mean[..., None], 0.0) ** 2).sum(axis=-1)
    error = np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1))
    bound: NDArray[np.float64] = np.where(n >= (2 if z > 0 else 1), mean - z * error, -np.inf)
    return bound


def admits(child: Matrix, parent: Matrix, z: float) -> bool:
    """Whether a child, [N, S], is better than its parent by more than z standard errors. z = 0 is GEPA's strict improvement.

    One success versus none among n problems is exactly one standard error, so it is not enough at z = 1."""
    return bool(lower_bound(child, parent, z) > TIE)


def select(scores: Matrix, rewards: Matrix, k: int, *, seed: int | None) -> list[int]:
    """The k rows to keep, in order of preference; rows repeat only if there are not enough distinct ones.

    scores: [C, N], for means and front. rewards: [C, N, S], this cycle's samples, for paired comparison with the best.

    1. The best mean. 2. The seed (row `seed`), if it alone wins some problem and is not clearly worse than the best
    (CLEARLY_WORSE_Z standard errors). 3. Greedily the context that wins most problems not yet won by a kept one, at
    least CERTAIN_GAIN of them (ties: better mean, then older). 4. By mean, contexts that win something and are not
    clearly worse, and contexts without any score, as nothing speaks against them. 5. The best again.

    Why not cover every last problem: with a few 0/1 samples every context wins some problem by luck. Simulated with 32
    problems, 2 samples, K = 4 (docs/fast_phase.md), these two thresholds raise the mean of the kept by up to 0.09 and
    cost at most 0.002 of their coverage."""
    assert k >= 1
    assert len(scores) >= 1
    front = wins(scores)
    order = _by_mean(scores)
    kept = [order[0]]
    clearly_worse: Mask = np.asarray(lower_bound(rewards[order[0]], rewards, CLEARLY_WORSE_Z) > TIE)
    if seed is not None and seed not in kept and k > 1 and not clearly_worse[seed]:
        others = np.delete(front, seed, axis=0)
        if (front[seed] & ~others.any(axis=0)).any():
            kept.append(seed)
    while len(kept) < k:
        gain = (front & ~front[kept].any(axis=0)).sum(axis=1)
        best = max(order, key=lambda row: gain[row])  # max keeps the first of equals: the better mean
        if gain[best] < CERTAIN_GAIN:
            break
        kept.append(best)
    unknown: Mask = np.asarray(np.isnan(scores).all(axis=1))
    rest = [
        row
        for row in order
        if row not in kept and (unknown[row] or (front[row].any() and not clearly_worse[row]))
    ]
    kept += rest[: k - len(kept)]
    return kept + [kept[0]] * (k - len(kept))


def _by_mean(scores: Matrix) -> list[int]:
    """Rows by falling mean, older first among equals, rows without a score last."""
    means = row_means(scores)
    return sorted(
        range(len(scores)),
        key=lambda row: (np.isnan(means[row]), -round(float(np.nan_to_num(means[row])), 6), row),
    )
