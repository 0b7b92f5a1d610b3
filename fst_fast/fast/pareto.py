"""Comparing contexts on the same problems: the per-problem front, who may be a parent, who is admitted, who is kept.

Everything here is a pure function of a score matrix, so every process that holds the same scores decides the same. Rows are contexts
(oldest first), columns problems; NaN is "no judged sample".

A context *wins* a problem if none scores higher there. A problem on which all known contexts tie distinguishes nobody and is left out:
it never changes who is dominated (everyone shares its front), it would only pull the choice of parents towards uniform. *Dominated* is
GEPA's word (arXiv 2507.19457): on every problem that the context wins, another one that is still standing wins too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fst_fast.contracts import REWARD_ROUNDING

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]

_TIE = REWARD_ROUNDING
"""Scores, in [0, 1], closer than this are equal: sums of the same rewards in another order differ in the last bits."""

CLEARLY_WORSE_Z = 2.0
"""Standard errors of the paired difference to the best beyond which a context is kept only for what it alone covers."""

CERTAIN_GAIN = 2
"""Problems that a context has to add to what the kept ones win: one may be luck."""


def wins(scores: Matrix) -> Mask:
    """[C, N] -> [C, N]: the front of every problem that distinguishes; all False elsewhere."""
    known = ~np.isnan(scores)
    best = np.where(known, scores, -np.inf).max(axis=0, initial=-np.inf)  # [N]
    worst = np.where(known, scores, np.inf).min(axis=0, initial=np.inf)  # [N]
    distinguishes = np.zeros(scores.shape[1], dtype=np.bool_)
    finite = known.any(axis=0)
    distinguishes[finite] = best[finite] - worst[finite] > _TIE
    front: Mask = (
        known & distinguishes & (np.where(known, scores, -np.inf) >= np.where(finite, best, np.inf) - _TIE)
    )
    return front


def row_means(scores: Matrix) -> NDArray[np.float64]:
    """[C, N] -> [C]: the mean over the problems with a score; NaN where there is none."""
    known = ~np.isnan(scores)
    count = known.sum(axis=1)
    total = np.where(known, scores, 0.0).sum(axis=1)
    means: NDArray[np.float64] = np.divide(total, count, out=np.full(len(scores), np.nan), where=count > 0)
    return means


def undominated(scores: Matrix) -> Mask:
    """[C, N] -> [C]: what stands when the dominated are struck out, worst mean first (of equals the younger first).

    One pass is enough: who is needed for a problem stays needed when others go.
    """
    front = wins(scores)
    standing = np.ones(len(scores), dtype=np.bool_)
    for row in _by_mean(scores)[::-1]:
        others = standing.copy()
        others[row] = False
        if not (front[row] & ~front[others].any(axis=0)).any():
            standing[row] = False
    if not standing.any():  # no problem distinguishes: nobody dominates anybody
        standing[:] = True
    return standing


def parent_weights(scores: Matrix) -> NDArray[np.float64]:
    """[C, N] -> [C], summing to 1: problems won by each undominated context; uniform where no problem distinguishes."""
    weights = (wins(scores) & undominated(scores)[:, None]).sum(axis=1).astype(np.float64)
    if weights.sum() == 0:
        weights = np.ones(len(scores))
    share: NDArray[np.float64] = weights / weights.sum()
    return share


def lower_bound(child: Matrix, parent: Matrix, z: float) -> NDArray[np.float64]:
    """[..., N, S] rewards of child and parent on the same (problem, sample) pairs -> [...]: mean paired difference minus z standard
    errors, over problems.

    A pair counts where both were judged; a problem's difference is the mean over its pairs; the standard error is that of the mean over
    problems (n - 1 in the variance). Fewer than two problems have no standard error: the bound is then -inf, or for z = 0 the plain
    difference. No pair at all: -inf.
    """
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
    """Whether a child, [N, S], is better than its parent beyond z standard errors. z = 0 is GEPA's strict improvement.

    One success against none among n problems is exactly one standard error, hence not enough at z = 1.
    """
    return bool(lower_bound(child, parent, z) > _TIE)


def select(scores: Matrix, rewards: Matrix, k: int, *, seed: int | None) -> list[int]:
    """The k rows that are kept, best mean first; rows may repeat only where distinct ones run out.

    scores: [C, N], for means and front. rewards: [C, N, S], this cycle's samples, for paired comparison with the best.

    1. The best mean. 2. The seed (row `seed`), while it alone wins some problem and is not clearly worse than the best, which is
    CLEARLY_WORSE_Z standard errors. 3. Greedily whoever wins most problems that no kept one wins, at least CERTAIN_GAIN of them (ties:
    better mean, then older). 4. By mean, whoever wins something and is not clearly worse; contexts without any score too, as nothing
    speaks against them. 5. The best again.

    Why not cover to the last problem: with a few 0/1 samples everybody wins some problem by luck. Simulated with 32 problems, 2 samples,
    K = 4 (docs/fast_phase.md), these two thresholds raise the mean of the kept by up to 0.09 and cost at most 0.002 of what they cover.
    """
    assert k >= 1
    assert len(scores) >= 1
    front = wins(scores)
    order = _by_mean(scores)
    kept = [order[0]]
    clearly_worse: Mask = np.asarray(lower_bound(rewards[order[0]], rewards, CLEARLY_WORSE_Z) > _TIE)
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
    """Rows by falling mean, of equals the older first; rows without a score last."""
    means = row_means(scores)
    return sorted(
        range(len(scores)),
        key=lambda row: (np.isnan(means[row]), -round(float(np.nan_to_num(means[row])), 6), row),
    )
