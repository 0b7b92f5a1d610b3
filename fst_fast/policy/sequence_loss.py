"""The head's job for losses that need whole sequences before the gradient: gspo, and importance weights against the sampler.

`LossJob` computes gradients chunk by chunk while the logits exist and sees labels only. Here the log-probs of the micro-batch, which holds
whole sequences, come first (linear_logprob); the loss is composed on them (policy_loss).

The weights are those of truncated importance sampling (TIS, https://fengyao.notion.site/off-policy-rl) and of masked importance sampling, as
in TRL's vllm_importance_sampling_mode: r = p_trainer / p_sampler of a token, or the product over its sequence; tis: min(r, cap); mis: r where
r <= cap, else 0. A batch has one optimiser step, so the trainer's log-probs before the step are the ones of this very forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fst_fast.config import SlowConfig
from fst_fast.policy.head import LossJob
from fst_kernels import PolicyStats, linear_logprob, policy_loss, policy_terms
from fst_kernels.linear_logprob.rows import accumulate_
from fst_kernels.linear_policy_loss.objective import MAX_LOG_RATIO, SUMS

SEQUENCE_SUMS = 4  # see SequenceLossJob


@dataclass(frozen=True)
class Mismatch:
    """slow.mismatch, mismatch_level and mismatch_cap."""

    kind: Literal["tis", "mis"]
    level: Literal["token", "sequence"]
    cap: float

    @classmethod
    def of(cls, slow: SlowConfig) -> Mismatch | None:
        """None where there is no weight."""
        if slow.mismatch == "none":
            return None
        return cls(slow.mismatch, slow.mismatch_level, slow.mismatch_cap)

    def weights(self, log_ratio: Tensor, sequence: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """The weight of each label [M], and whether it was cut to the cap or to 0 [M]. log_ratio [M]: trainer minus sampler."""
        if self.level == "sequence":
            log_ratio = accumulate_(log_ratio.new_zeros(sequences), sequence, log_ratio)[sequence]
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        cut = ratio > self.cap
        return torch.where(cut, self.cap if self.kind == "tis" else 0.0, ratio), cut


@dataclass
class SequenceLossJob(LossJob):
    """sequence [M] int64: which of the `sequences` of this micro-batch a label belongs to.

    Afterwards `sequence_sums` [4] fp64 holds, for labels that count: the sum of the weights, the number of labels with a weight that was cut,
    of sequences with one, of sequences. For gspo the three numbers of clipped in `stats` are those of sequences.
    """

    sequence: Tensor = field(kw_only=True)
    sequences: int = field(kw_only=True)
    mismatch: Mismatch | None = None
    sequence_sums: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = linear_logprob(
            hidden.index_select(0, self.at.unique), weight, self.at.labels, rows=self.at.row_of, bias=bias,
            temperature=self.temperature, ref_hidden=self.ref_hidden, ref_weight=self.ref_weight, ref_bias=self.ref_bias,
            kl=self.objective.exact_kl, chunk_rows=self.chunk_rows,
        )  # fmt: skip
        trained = out.logprob.detach()
        live = self.token_weight != 0
        log_ratio = torch.where(live, trained - self.old_logprob, 0)
        old, weights, cut = self.old_logprob, None, torch.zeros_like(live)
        if self.mismatch is not None:
            weights, cut = self.mismatch.weights(log_ratio, self.sequence, self.sequences)
            old = trained
        loss, stats = policy_loss(
            out, self.at.labels, self.advantages, objective=self.objective, token_weight=self.token_weight, rows=self.at.row_of,
            old_logprob=old, rollout_weight=weights, ref_logprob=self.ref_logprob, sequence=self.sequence,
        )  # fmt: skip
        # [M] fp64: each live label's share of its sequence; a sum over labels of flags times it counts sequences
        count = live.double()
        share = count / accumulate_(count.new_zeros(self.sequences), self.sequence, count)[
            self.sequence
        ].clamp(min=1)
        sums = dict(zip(SUMS, stats.sums, strict=True))
        if self.mismatch is not None:  # what the log-probs differ by, not the objective's ratio, which is 1
            held = log_ratio.clamp(max=MAX_LOG_RATIO)
            sums["ratio"] = (held.exp() * count).sum(dtype=torch.float64)
            sums["mismatch"] = (torch.expm1(held) - held).sum(dtype=torch.float64)
        if self.objective.kind == "gspo":
            terms = policy_terms(
                trained, self.advantages, objective=replace(self.objective, kl=None), token_weight=self.token_weight,
                old_logprob=old, sequence=self.sequence,
            )  # fmt: skip
            sums |= {
                name: (getattr(terms, name) * share).sum()
                for name in ("clipped", "clipped_low", "clipped_high")
            }
        self.stats = PolicyStats(torch.stack(list(sums.values())))
        weighed = count if weights is None else weights * count
        self.sequence_sums = torch.stack(
            [weighed.sum(dtype=torch.float64), (cut * count).sum(), (cut * share).sum(), share.sum()]
        )
        return loss
