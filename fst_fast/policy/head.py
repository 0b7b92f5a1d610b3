"""The lm_head module computes what the caller needs (a loss, log-probs, hidden states), never the logits of the whole batch.

A *job* is a function of (hidden [R, H], weight [V, H], bias [V] | None). `install` replaces the forward of the model's
own lm_head module and leaves the rest of the model unmodified. The job runs inside a module's forward, so ZeRO-3 has
already gathered the partitioned weight, and hooks (offload, LoRA on other modules) work as usual. Without a job the
module is a plain linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fst_fast.policy.packing import to_device
from fst_kernels import LogprobOutput, PolicyObjective, PolicyStats, linear_logprob, linear_policy_loss

Job = Callable[[Tensor, Tensor, Tensor | None], Any]


def install(model: nn.Module) -> None:
    """Make the model's lm_head able to run jobs. Idempotent."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if hasattr(head, "fst_job"):
        return
    head.fst_job = None

    def forward(hidden: Tensor) -> Any:  # hidden [B, N, H]
        if head.fst_job is None:
            return F.linear(hidden, head.weight, head.bias)
        return head.fst_job(hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias)

    head.forward = forward


def uninstall(model: nn.Module) -> None:
    """Undo `install`. Needed for a copy of a model too, whose lm_head would otherwise run the original's jobs."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name in ("fst_job", "forward"):
        head.__dict__.pop(name, None)


@contextmanager
def running(model: nn.Module, job: Job) -> Iterator[None]:
    """While open, the model's forward returns the result of `job` in place of the logits."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    head.fst_job = job
    try:
        yield
    finally:
        head.fst_job = None


@dataclass
class Labels:
    """Labelled rows of a packed batch, without duplicates: at a branch point one row carries several labels.

    unique: [R] int64, flat token index of each labelled row. row_of: [M] int64, index into `unique` of each label's
    row. labels: [M] int64. on_host: row_of, on the host."""

    unique: Tensor
    row_of: Tensor
    labels: Tensor
    on_host: Tensor

    @classmethod
    def of(cls, rows: Tensor, labels: Tensor, device: torch.device | str | None = None) -> Labels:
        """Build from host tensors rows [M] and labels [M], on `device` (None: the tensors' own device)."""
        unique, row_of = torch.unique(rows, return_inverse=True)
        if device is None:
            return cls(unique, row_of, labels, row_of)
        return cls(to_device(unique, device), to_device(row_of, device), to_device(labels, device), row_of)


@dataclass
class HiddenJob:
    """Return the hidden states of the labelled rows: [R, H]."""

    at: Labels

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return hidden.index_select(0, self.at.unique)


@dataclass
class ScoreJob:
    """Log-probs of the labels [M] and, given the reference's hidden states, the exact KL(policy || reference) of every labelled row."""

    at: Labels
    temperature: float
    chunk_rows: int
    ref_hidden: Tensor | None = None  # [R, H]
    ref_weight: Tensor | None = None  # [V, H]
    ref_bias: Tensor | None = None
    out: LogprobOutput | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.out = linear_logprob(
            hidden.index_select(0, self.at.unique), weight, self.at.labels, rows=self.at.row_of, bias=bias,
            temperature=self.temperature, ref_hidden=self.ref_hidden, ref_weight=self.ref_weight, ref_bias=self.ref_bias,
            kl=None if self.ref_hidden is None else "reverse", chunk_rows=self.chunk_rows,
        )  # fmt: skip
        return self.out.logprob


@dataclass
class LossJob:
    """The policy-gradient loss of the labels; after the forward `stats` holds the sums for the logs. Tensors are [M] fp32."""

    at: Labels
    objective: PolicyObjective
    advantages: Tensor
    token_weight: Tensor
    old_logprob: Tensor
    temperature: float
    chunk_rows: int
    ref_logprob: Tensor | None = None  # [M], for k3
    ref_hidden: Tensor | None = None  # [R, H], for the exact forms
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    stats: PolicyStats | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        loss, self.stats = linear_policy_loss(
            hidden.index_select(0, self.at.unique), weight, self.at.labels, self.advantages, objective=self.objective,
            token_weight=self.token_weight, rows=self.at.on_host, old_logprob=self.old_logprob, bias=bias,
            temperature=self.temperature, ref_hidden=self.ref_hidden, ref_weight=self.ref_weight, ref_bias=self.ref_bias,
            ref_logprob=self.ref_logprob, chunk_rows=self.chunk_rows,
        )  # fmt: skip
        return loss
