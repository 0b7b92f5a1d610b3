"""Sampling in plain PyTorch: one random number per row, inverse distribution function in vocabulary order.

The random number is a pure function of (seed, position): Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011) with the seed as key and the position as counter. There is no generator state, so a sequence draws the same tokens whoever
its batch neighbours are, in whatever order the batch is, and after a resume. Every operation below works row by row.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@functools.cache
def _philox_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Multipliers [2, 1] of the lanes (0, 2) and what each of the 10 rounds adds to the key [10, 2, 1]."""
    multipliers = torch.tensor([[0xD2511F53], [0xCD9E8D57]], device=device)
    weyl = torch.tensor(
        [[[0x9E3779B9 * r & _MASK], [0xBB67AE85 * r & _MASK]] for r in range(10)], device=device
    )
    return multipliers, weyl


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10. counter [4, S], key [2, S], each an int64 that holds a 32-bit word -> [4, S].

    Two lanes go through one operation: even = words (0, 2), odd = words (1, 3). A product of two words wraps around in int64, which
    keeps all 64 bits; the mask after the shift drops the copies of the sign.
    """
    multipliers, weyl = _philox_constants(counter.device)
    keys = (key + weyl) & _MASK  # [10, 2, S]
    even, odd = counter[0::2], counter[1::2]
    for round_key in keys.unbind():
        product = (even * multipliers).flip(0)
        even = ((product >> 32) & _MASK) ^ odd ^ round_key
        odd = product & _MASK
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """One float64 in [0, 1) per (seed, position), a multiple of 2^-32: the first word of Philox. seeds, positions [S] int64."""
    words = torch.stack((positions, positions >> 32, seeds, seeds >> 32)) & _MASK  # [4, S]
    counter = torch.cat((words[:2], torch.zeros_like(words[:2])))
    return philox(counter, words[2:])[0].double() * 2.0**-32


def sample(
    logits: Tensor,  # [S, V]
    temperature: float | Tensor,  # > 0 or 0; [S]
    top_k: int | Tensor | None,  # [S]
    top_p: float | Tensor | None,  # [S]
    min_p: float | Tensor | None,  # [S]
    seeds: Tensor,  # [S]
    positions: Tensor,  # [S]
) -> tuple[Tensor, Tensor, Tensor]:
    """-> ids, logprob, untruncated_logprob, each [S]; untruncated_logprob is NaN iff the row is unusable, and its id then means nothing."""
    logits = logits.float()
    greedy: Tensor | None = None  # [S] bool: rows of temperature 0, where the temperature is per row
    scores = logits
    if isinstance(temperature, Tensor):
        greedy = temperature == 0
        temperature = torch.where(greedy, 1.0, temperature.float()).unsqueeze(1)
        scores = (logits - logits.amax(1, keepdim=True)) / temperature
    elif temperature not in (0, 1):
        # the distance to the maximum first: quotients of large logits would lose digits
        scores = (logits - logits.amax(1, keepdim=True)) / temperature
    log_p = torch.log_softmax(scores, -1)  # [S, V]
    if not isinstance(temperature, Tensor) and temperature == 0:
        ids = log_p.argmax(-1)
        untruncated = log_p.gather(1, ids.unsqueeze(1)).squeeze(1)
        return ids, torch.where(untruncated.isnan(), untruncated, 0.0), untruncated
    p = log_p.exp()
    truncated = _truncated(logits.shape[1], top_k, top_p, min_p)
    if truncated is not False:
        p = p * _kept(logits, p, temperature, top_k, top_p, min_p)
    cumulative = p.cumsum(-1, dtype=torch.float64)  # [S, V]
    mass = cumulative[:, -1]
    target = (uniform(seeds, positions) * mass).unsqueeze(1)
    # the first token whose cumulative mass exceeds the target: it exists, since u < 1, and has mass of its own
    ids = torch.searchsorted(cumulative, target, right=True)  # [S, 1]
    if greedy is not None:
        ids = torch.where(greedy.unsqueeze(1), log_p.argmax(-1, keepdim=True), ids)
    untruncated = log_p.gather(1, ids.clamp_(max=log_p.shape[1] - 1)).squeeze(1)  # clamp: unusable rows only
    logprob = untruncated
    if truncated is not False:
        logprob = untruncated - mass.log().float()
    if isinstance(truncated, Tensor):
        logprob = torch.where(truncated, logprob, untruncated)
    if greedy is not None:
        logprob = torch.where(greedy & ~untruncated.isnan(), 0.0, logprob)
    return ids.squeeze(1), logprob, untruncated


def _truncated(
    vocabulary: int, top_k: int | Tensor | None, top_p: float | Tensor | None, min_p: float | Tensor | None
) -> bool | Tensor:
    """Whether a rule applies, [S] where a rule is given row by row: a row that all of them leave whole is sampled as without them."""
    rules: list[bool | Tensor] = []
    if top_k is not None:
        rules.append(top_k < vocabulary)
    if top_p is not None:
        rules.append(top_p < 1)
    if min_p is not None:
        rules.append(min_p > 0)
    return functools.reduce(operator.or_, rules, False)


def log_min_p(min_p: float | Tensor) -> Tensor:
    """fp32, of the shape of min_p; -inf: no such rule."""
    return torch.as_tensor(min_p, dtype=torch.float64).log().float()


def _kept(
    logits: Tensor,  # [S, V] fp32
    p: Tensor,  # [S, V] their probabilities
    temperature: float | Tensor,  # [S, 1]
    top_k: int | Tensor | None,  # [S]
    top_p: float | Tensor | None,  # [S]
    min_p: float | Tensor | None,  # [S]
) -> Tensor:
    """The tokens that survive, [S, V] bool. In the order of their logits (ties: lower id first) they are a prefix for each of the three rules.

    The order and min_p look at logits, not at probabilities, so that no rounding of an exponential moves them; top_p is a comparison of sums.
    """
    keep = torch.ones_like(logits, dtype=torch.bool)
    if top_k is not None or top_p is not None:
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices  # [S, V]
        if top_k is not None:
            keep &= torch.arange(logits.shape[1], device=logits.device) < _column(top_k)
        if top_p is not None:
            share = _column(top_p)
            candidates = p.gather(1, order)
            candidates = candidates if top_k is None else candidates * keep
            cumulative = candidates.cumsum(-1, dtype=torch.float64)
            # left: the mass of the more probable ones
            nucleus = cumulative - candidates < share * cumulative[:, -1:]
            keep &= nucleus | (share >= 1) if isinstance(share, Tensor) else nucleus
        keep = torch.zeros_like(keep).scatter_(1, order, keep)
    if isinstance(min_p, Tensor) or min_p:  # p >= min_p * max p, in float32: x - max x >= T log(min_p)
        t = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
        least = log_min_p(min_p)
        keep &= logits - logits.amax(1, keepdim=True) >= t * (least.unsqueeze(1) if least.ndim else least)
    return keep


def _column(x: float | Tensor) -> float | Tensor:
    """[S] -> [S, 1], in float64 unless integers; a number for all rows stays one."""
    if not isinstance(x, Tensor) or not x.ndim:
        return x
    return (x.double() if x.is_floating_point() else x).unsqueeze(1)
