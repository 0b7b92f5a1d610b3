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
k3 times rho is an unbiased estimate of KL(policy || reference) on labels of the old policy, and so is its gradient, c = -rho d
(kl_unbiased). With the sequence's ratio s in place of rho (kl_ratio="sequence") it is neither, but it is what TRL and Liger compute for gspo.
Log-ratios are held at MAX_LOG_RATIO from above, so that a token that the other policy found impossible gives no infinity; beyond it
rho and k3 are constant and have no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fst_kernels.checks import FLOATS, INTS, check_finite, check_tensor, look_at_values
from fst_kernels.linear_logprob.rows import accumulate_, accumulator

MAX_LOG_RATIO = 20.0

Kind = Literal["cispo", "grpo", "ppo", "dapo", "reinforce", "gspo"]
KL = Literal["k3", "reverse", "forward"]
Ratio = Literal["token", "sequence"]


@dataclass(frozen=True)
class PolicyObjective:
    """Which loss. Fields that the kind does not use are not read.

    ratio_cap: cispo, the absolute cap of rho (as in TRL and Liger; verl, open-instruct, NeMo and slime write 1 + eps), > 0. A cap below 1
        cuts on-policy labels too: every ratio near 1 becomes the cap, which only scales the learning rate. It is rarely meant; a
        setting in the 1 + eps convention (0.2 for 1.2) looks like one.
    clip_low, clip_high: ppo, grpo, dapo, gspo clip the ratio to [1 - clip_low, 1 + clip_high].
    kl: k3 on the labels, or exact over the vocabulary: reverse = KL(policy || reference), forward = KL(reference || policy).
    kl_unbiased: k3 times an importance ratio, with its gradient (TRL: use_bias_correction_kl, its default; slime: use_unbiased_kl).
    kl_ratio: which ratio that is: "token", the label's own, or "sequence", the one gspo clips (TRL and Liger). gspo must say; the others
        have the label's only.
    """

    kind: Kind = "cispo"
    ratio_cap: float = 4.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: KL | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    kl_unbiased: bool = False
    kl_ratio: Ratio | None = None

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, get_args(Kind))
        _one_of("kl", self.kl, (None, *get_args(KL)))
        _one_of("kl_ratio", self.kl_ratio, (None, *get_args(Ratio)))
        if not self.ratio_cap > 0:
            raise ValueError(
                f"ratio_cap={self.ratio_cap}; allowed: > 0, an absolute cap of the importance ratio"
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
        if self.kl_unbiased and self.kind == "gspo" and self.kl_ratio is None:
            raise ValueError(
                "kl_unbiased=True with kind='gspo' needs kl_ratio: 'token', the label's ratio, or 'sequence', as in TRL and Liger"
            )
        if self.kl_ratio == "sequence" and self.kind != "gspo":
            raise ValueError(
                f"kl_ratio='sequence' with kind={self.kind!r}; allowed: None or 'token', only gspo has a sequence's ratio"
            )

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
    kl: Tensor | None  # k3, if that is the objective's KL, times the ratio if that is asked for
    ratio: Tensor  # rho, or the sequence's
    clipped: Tensor  # bool: the cap or the clip took over
    clipped_low: Tensor  # bool: the clip took over below 1 - clip_low, where A < 0; cispo has no such bound
    clipped_high: Tensor  # bool: the cap or the clip took over above, where A > 0
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
    """What each label adds to the loss and to its gradient, before anything is summed.

    logprob, advantages, token_weight, old_logprob, rollout_weight, ref_logprob: [M] floats, of any type; results come in that of logprob,
    float32 at least. sequence (gspo): [M] int, equal within a sequence. Only labels that count may be passed. ValueError for shapes, types
    and devices that do not fit.
    """
    check_tensor("logprob", logprob, ("M",), FLOATS)
    optional = {"old_logprob": old_logprob, "rollout_weight": rollout_weight, "ref_logprob": ref_logprob}
    given = {"advantages": advantages, "token_weight": token_weight}
    given |= {name: x for name, x in optional.items() if x is not None}
    dtype = accumulator(logprob.dtype)
    for name, x in given.items():
        check_tensor(name, x, tuple(logprob.shape), FLOATS, logprob.device)
        given[name] = x.to(dtype)
    if sequence is not None:
        check_tensor("sequence", sequence, tuple(logprob.shape), INTS, logprob.device)
    return label_terms(logprob.to(dtype), objective=objective, sequence=sequence, **given)


@torch.no_grad()
def label_terms(
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
    """policy_terms of checked arguments of one type."""
    log_ratio = torch.zeros_like(logprob) if old_logprob is None else logprob - old_logprob
    held = log_ratio.clamp(max=MAX_LOG_RATIO)
    mismatch = torch.expm1(held) - held
    ratio, slope = held.exp(), (log_ratio <= MAX_LOG_RATIO).to(logprob.dtype)  # slope: d held / d log p
    of_label = ratio, slope
    weight = token_weight
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
        if objective.kl_unbiased and objective.kl_ratio == "sequence":
            # every label moves the ratio of its whole sequence
            moved = (
                accumulate_(torch.zeros_like(logprob), index, token_weight * ratio * slope * divergence)
                / length
            )
            coefficient = coefficient + objective.kl_coef * moved[index]
            divergence, derivative = ratio * divergence, ratio * derivative
        elif objective.kl_unbiased:
            rho, slope = of_label
            divergence, derivative = rho * divergence, rho * (slope * divergence + derivative)
        coefficient = coefficient + objective.kl_coef * token_weight * derivative
    low = torch.zeros_like(clipped) if objective.kind == "cispo" else clipped & (advantages < 0)
    return PolicyTerms(
        policy, coefficient, divergence, ratio, clipped, low, clipped & (advantages > 0), mismatch
    )


def _sequences(sequence: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequence each label belongs to, counted from 0 [M], and how many labels a sequence has, at least 1 [M]; no size is data's."""
    ordered, order = torch.sort(sequence, stable=True)
    starts = torch.zeros_like(order)
    starts[1:] = ordered[1:] != ordered[:-1]
    index = torch.empty_like(order).scatter_(0, order, starts.cumsum(0))
    length = accumulate_(torch.zeros_like(like), index, torch.ones_like(like))
    return index, length.clamp(min=1)


SUMS = (
    "loss", "policy", "kl", "entropy", "weight", "ratio", "clipped", "mismatch", "count", "clipped_low", "clipped_high"
)  # fmt: skip


@dataclass(frozen=True)
class PolicyStats:
    """Sums over the labels that count (not ignored, n_t != 0): add them over micro-batches, all-reduce `sums` over ranks, then read means.

    sums, [11] fp64 on the device, no host synchronisation, in the order of SUMS:
    loss; policy = sum n_t w_t PG_t; kl = sum n_t KL_t; entropy = sum n_t H_t; weight = sum n_t;
    ratio = sum rho_t; clipped = number of labels where the cap or clip took over; mismatch = sum of the k3 estimate of
    KL(old || policy); count = number of labels; clipped_low, clipped_high = number of those clipped whose advantage is negative (the ratio
    below 1 - clip_low) or positive (above 1 + clip_high or ratio_cap).
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
        """Fraction of labels whose ratio was capped or clipped. cispo caps whatever the sign of the advantage is, and all are counted;
        TRL's cispo_clip_ratio and Liger's count positive advantages only, which is clipped_high_fraction."""
        return self._mean(6, 8)

    @property
    def clipped_low_fraction(self) -> Tensor:
        """Fraction of labels of negative advantage whose ratio was clipped from below: TRL's clip_ratio/low_mean; 0 for cispo."""
        return self._mean(9, 8)

    @property
    def clipped_high_fraction(self) -> Tensor:
        """Fraction of labels of positive advantage whose ratio was capped or clipped from above: TRL's clip_ratio/high_mean, cispo_clip_ratio."""
        return self._mean(10, 8)

    @property
    def clipped_region_fraction(self) -> Tensor:
        """Fraction of either: TRL's clip_ratio/region_mean, Liger's clip ratio. For all kinds but cispo this is clipped_fraction."""
        both = self.sums[9] + self.sums[10]
        return torch.where(self.sums[8] == 0, 0.0, both / self.sums[8])

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
    counted += [terms.clipped_low, terms.clipped_high]
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
