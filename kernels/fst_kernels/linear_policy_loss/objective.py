"""The objectives of policy-gradient training per label: value and derivative by the log-probability, in one place.

    loss = sum_t n_t [ w_t PG_t + kl_coef KL_t - entropy_coef H_t ]
n_t: the normaliser (one global denominator per optimiser step); w_t: an optional detached importance weight. With the ratio
rho = exp(log p - old), the advantage A and c = dPG/dlog p:
    cispo              PG = -min(rho, ratio_cap) A log p (the weight is detached)      c = -min(rho, ratio_cap) A
    ppo, grpo, dapo    PG = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)       c = -rho A, or 0 where the clip took over
    gspo               the same with the sequence's ratio s = exp(mean of log p - old over its labels) in place of rho
    reinforce          PG = -A log p                                                    c = -A
    k3                 KL = exp(d) - d - 1, d = ref - log p                             dKL/dlog p = 1 - exp(d)
ppo, grpo and dapo differ in advantages, normaliser and clip widths, which the caller gives; per token they are one formula. CISPO:
arXiv 2506.13585; GSPO: arXiv 2507.18071; k3: J. Schulman, "Approximating KL divergence". k3 used as a loss has, on policy, the
gradient of KL(ref || policy).
k3 times rho is an unbiased estimate of KL(policy || reference) on labels of the old policy, and so is its gradient, c = -rho d (kl_unbiased).
Log-ratios are held at MAX_LOG_RATIO from above, so that a token that the other policy found impossible gives no infinity; beyond it
rho and k3 are constant and have no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fst_kernels.checks import check_finite, look_at_values
from fst_kernels.linear_logprob.rows import accumulate_

MAX_LOG_RATIO = 20.0

Kind = Literal["cispo", "grpo", "ppo", "dapo", "reinforce", "gspo"]
KL = Literal["k3", "reverse", "forward"]


@dataclass(frozen=True)
class PolicyObjective:
    """Which loss. Fields that the kind does not use are not read.

    ratio_cap: cispo, the absolute cap of rho (as in TRL and Liger; verl, open-instruct, NeMo and slime write 1 + eps), >= 1.
    clip_low, clip_high: ppo, grpo, dapo, gspo clip the ratio to [1 - clip_low, 1 + clip_high].
    kl: k3 on the labels, or exact over the vocabulary: reverse = KL(policy || reference), forward = KL(reference || policy).
    kl_unbiased: k3 times the label's importance ratio, with its gradient (TRL: use_bias_correction_kl, its default; slime: use_unbiased_kl).
    """

    kind: Kind = "cispo"
    ratio_cap: float = 4.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: KL | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    kl_unbiased: bool = False

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, get_args(Kind))
        _one_of("kl", self.kl, (None, *get_args(KL)))
        if not self.ratio_cap >= 1:
            raise ValueError(
                f"ratio_cap={self.ratio_cap}; allowed: >= 1, an absolute cap of the importance ratio"
            )
        if not 0 <= self.clip_low < 1:
            raise ValueError(f"clip_low={self.clip_low}; allowed: 0 <= clip_low < 1")
        if not 0 <= self.clip_high < math.inf:
            raise ValueError(f"clip_high={self.clip_high}; allowed: a finite number >= 0")
        if not 0 <= self.kl_coef < math.inf:
            raise ValueError(f"kl_coef={self.kl_coef}; allowed: a finite number >= 0")
        if not math.isfinite(self.entropy_coef):
            raise ValueError(f"entropy_coef={self.entropy_coef}; allowed: a finite number")
        if self.kl_unbiased and self.kl != "k3":
            raise ValueError(f"kl_unbiased=True with kl={self.kl!r}; allowed: kl='k3'")

    @property
    def exact_kl(self) -> Literal["reverse", "forward"] | None:
        """The KL over the whole vocabulary that is wanted, if one is."""
        return None if self.kl == "k3" else self.kl


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; allowed: {', '.join(map(repr, allowed))}")


class PolicyTerms(NamedTuple):
    """Per label, [M]; no gradient."""

    policy: Tensor  # PG_t, without n_t and w_t
    coefficient: Tensor  # dloss/dlog p: n_t (w_t dPG_t + kl_coef dKL_t)
    kl: Tensor | None  # k3, if that is the objective's KL, times rho if that is asked for
    ratio: Tensor  # rho, or the sequence's
    clipped: Tensor  # bool: the cap or the clip took over
    mismatch: Tensor  # rho - log rho - 1: an unbiased estimate of KL(old || policy) where labels were sampled from old


@torch.no_grad()
def policy_terms(
    logprob: Tensor,
    advantages: Tensor,
    *,
    objective: PolicyObjective,
    token_weight: Tensor,
    old_logprob: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    sequence: Tensor | None = None,
) -> PolicyTerms:
    """All arguments [M]; only labels that count may be passed. sequence (gspo): a number per label, equal within a sequence."""
    log_ratio = torch.zeros_like(logprob) if old_logprob is None else logprob - old_logprob
    held = log_ratio.clamp(max=MAX_LOG_RATIO)
    mismatch = torch.expm1(held) - held
    ratio, slope = held.exp(), (log_ratio <= MAX_LOG_RATIO).to(logprob.dtype)  # slope: d held / d log p
    of_label = ratio, slope
    weight = token_weight.to(logprob.dtype)
    if rollout_weight is not None:
        weight = weight * rollout_weight
    if objective.kind == "reinforce":
        policy, coefficient = -advantages * logprob, -weight * advantages
        clipped = torch.zeros_like(logprob, dtype=torch.bool)
    elif objective.kind == "cispo":
        capped = ratio.clamp(max=objective.ratio_cap) * advantages
        policy, coefficient = -capped * logprob, -weight * capped
        clipped = ratio > objective.ratio_cap
    else:
        if objective.kind == "gspo":
            if sequence is None:
                raise ValueError("objective.kind='gspo' needs sequence, which is None")
            index, length = _sequences(sequence, logprob)
            mean = accumulate_(torch.zeros_like(logprob), index, log_ratio) / length
            ratio, slope = (
                mean.clamp(max=MAX_LOG_RATIO).exp()[index],
                (mean <= MAX_LOG_RATIO).to(logprob.dtype)[index],
            )
        free = ratio * advantages
        bound = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantages
        policy, clipped = -torch.minimum(free, bound), free > bound
        coefficient = torch.where(clipped, 0.0, -weight * free * slope)
        if objective.kind == "gspo":
            coefficient = (accumulate_(torch.zeros_like(mean), index, coefficient) / length)[index]
    divergence = None
    if objective.kl == "k3":
        if ref_logprob is None:
            raise ValueError("objective.kl='k3' needs ref_logprob, which is None")
        d = ref_logprob - logprob
        held = d.clamp(max=MAX_LOG_RATIO)
        growth = torch.expm1(held)
        divergence, derivative = growth - held, -torch.where(d <= MAX_LOG_RATIO, growth, 0.0)
        if objective.kl_unbiased:
            rho, slope = of_label
            divergence, derivative = rho * divergence, rho * (slope * divergence + derivative)
        coefficient = coefficient + objective.kl_coef * token_weight * derivative
    return PolicyTerms(policy, coefficient, divergence, ratio, clipped, mismatch)


def _sequences(sequence: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequence each label belongs to, counted from 0 [M], and how many labels a sequence has, at least 1 [M]; no size is data's."""
    ordered, order = torch.sort(sequence, stable=True)
    starts = torch.zeros_like(order)
    starts[1:] = ordered[1:] != ordered[:-1]
    index = torch.empty_like(order).scatter_(0, order, starts.cumsum(0))
    length = accumulate_(torch.zeros_like(like), index, torch.ones_like(like))
    return index, length.clamp(min=1)


SUMS = ("loss", "policy", "kl", "entropy", "weight", "ratio", "clipped", "mismatch", "count")


@dataclass(frozen=True)
class PolicyStats:
    """Sums over the labels that count (not ignored, n_t != 0): add them over micro-batches, all-reduce `sums` over ranks, then read means.

    sums, [9] fp64 on the device, no host synchronisation, in the order of SUMS:
    loss; policy = sum n_t w_t PG_t; kl = sum n_t KL_t; entropy = sum n_t H_t; weight = sum n_t;
    ratio = sum rho_t; clipped = number of labels where the cap or clip took over; mismatch = sum of the k3 estimate of
    KL(old || policy); count = number of labels.
    """

    sums: Tensor

    @classmethod
    def zeros(cls, device: torch.device | str | None = None) -> PolicyStats:
        """Those of no label: what to add to."""
        return cls(torch.zeros(len(SUMS), dtype=torch.float64, device=device))

    def __add__(self, other: PolicyStats) -> PolicyStats:
        return PolicyStats(self.sums + other.sums)

    @property
    def loss(self) -> Tensor:
        """The loss, as the caller's n_t normalise it."""
        return self.sums[0]

    @property
    def policy_loss(self) -> Tensor:
        """Its policy-gradient part, normalised like the loss."""
        return self.sums[1]

    @property
    def kl(self) -> Tensor:
        """Mean KL to the reference in nats, weighted with n_t; 0 for an objective without KL."""
        return self._mean(2, 4)

    @property
    def entropy(self) -> Tensor:
        """Mean entropy in nats, weighted with n_t."""
        return self._mean(3, 4)

    @property
    def ratio(self) -> Tensor:
        """Mean importance ratio, every label counted once."""
        return self._mean(5, 8)

    @property
    def clipped_fraction(self) -> Tensor:
        """Fraction of labels whose ratio was capped or clipped."""
        return self._mean(6, 8)

    @property
    def mismatch_kl(self) -> Tensor:
        """Mean k3 estimate of KL(old || policy) in nats, every label counted once."""
        return self._mean(7, 8)

    @property
    def count(self) -> Tensor:
        """Labels that count."""
        return self.sums[8]

    def _mean(self, total: int, over: int) -> Tensor:
        return torch.where(self.sums[over] == 0, 0.0, self.sums[total] / self.sums[over])


def policy_sums(
    terms: PolicyTerms,
    objective: PolicyObjective,
    token_weight: Tensor,
    rollout_weight: Tensor | None,
    entropy: Tensor,
    kl: Tensor | None,
    live: Tensor | None = None,
) -> Tensor:
    """PolicyStats.sums of some labels: all arguments per label; kl: the exact one of the label's row; live (bool): which count, or None."""
    n = token_weight.double()
    kl = terms.kl if kl is None else kl
    policy = (n * terms.policy if rollout_weight is None else n * rollout_weight * terms.policy).sum()
    divergence = torch.zeros_like(policy) if kl is None else (n * kl).sum()
    bonus = (n * entropy).sum()
    loss = policy + objective.kl_coef * divergence - objective.entropy_coef * bonus
    counted = [terms.ratio, terms.clipped, terms.mismatch, torch.ones_like(terms.ratio)]
    if live is not None:
        counted = [torch.where(live, x, 0) for x in counted]
    others = [x.sum(dtype=torch.float64) for x in counted]
    return torch.stack([loss, policy, divergence, bonus, n.sum(), *others])


def check_label_values(per_label: dict[str, Tensor], live: Tensor) -> None:
    """Finite wherever a label counts; live: [M] bool. Looked at as fst_kernels.checks says."""
    if look_at_values(live.device):
        where = live.nonzero().squeeze(1)
        for name, x in per_label.items():
            check_finite(name, x, where)
