"""`linear_policy_loss` (mode B, the training path) and `policy_loss`, the same loss on the output of linear_logprob (mode A)."""

from __future__ import annotations

import torch
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.checks import FLOATS, INTS, check_tensor
from fst_kernels.linear_logprob.api import LogprobOutput, detached, split_temperature
from fst_kernels.linear_logprob.arguments import check_head
from fst_kernels.linear_logprob.op import default_chunk_rows
from fst_kernels.linear_logprob.rows import IGNORED, KnownRows, accumulate_
from fst_kernels.linear_policy_loss.objective import (
    PolicyObjective,
    PolicyStats,
    check_label_values,
    label_terms,
    policy_sums,
)
from fst_kernels.linear_policy_loss.op import PER_LABEL, linear_policy_loss_op


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    *,
    objective: PolicyObjective,
    token_weight: Tensor,
    rows: Tensor | None = None,
    old_logprob: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    backend: str | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Loss and statistics of one micro-batch; gradients reach hidden, weight and bias when the loss is backpropagated.

    hidden, weight, labels, rows, bias, temperature, softcap, ref_*, chunk_rows: as in linear_logprob. Per label, [M] floats:
    advantages; token_weight, the normaliser n_t (0: the label does not count); old_logprob, of the policy that sampled the labels
    (None: the ratio is 1); rollout_weight, the detached weight w_t (None: 1); ref_logprob, enough for kl="k3", which else needs
    ref_hidden. The exact KL and the entropy of a row are weighted with the sum of its labels' n_t.
    What the objective does not need of the reference is not read. kind="gspo" needs whole sequences, which a chunk of rows does not
    have: ValueError; use linear_logprob and policy_loss. rows on the host, with hidden states on a GPU: the call then waits for the device
    nowhere.
    """
    check_head(
        hidden, weight, labels, rows, bias, temperature, softcap, ref_hidden, ref_weight, ref_bias, chunk_rows,
        host_rows=True,
    )  # fmt: skip
    if objective.kind == "gspo":
        raise ValueError(
            "objective.kind='gspo' needs whole sequences, which linear_policy_loss does not see; use linear_logprob with policy_loss"
        )
    per_label = check_labels(labels, advantages, token_weight, old_logprob, rollout_weight, ref_logprob)
    if objective.kl != "k3":
        per_label.pop("ref_logprob", None)
    if objective.kl is None or "ref_logprob" in per_label:
        ref_hidden = None
    elif ref_hidden is None:
        needed = "ref_hidden or ref_logprob" if objective.kl == "k3" else "ref_hidden"
        raise ValueError(f"objective.kl={objective.kl!r} needs {needed}, which is None")
    taken = choose_backend("linear_policy_loss", backend, hidden.device, hidden.dtype)
    row_temperature, shared = split_temperature(temperature)
    matrices = 1 if objective.exact_kl is None else 2
    chunk_rows = chunk_rows or default_chunk_rows(taken, weight.shape[0], matrices)
    order: Tensor | None = None
    bounds: list[int] = []
    if rows is not None and rows.device != hidden.device:
        rows, order, bounds = KnownRows.of(rows, len(hidden), chunk_rows, hidden.device)
    grad = torch.is_grad_enabled()
    loss, sums, *_ = linear_policy_loss_op(
        hidden,
        weight,
        bias,
        labels,
        rows,
        detached(ref_hidden),
        detached(ref_weight),
        detached(ref_bias),
        row_temperature,
        order,
        *(per_label.get(name) for name in PER_LABEL),
        bounds=bounds,
        temperature=shared,
        softcap=softcap,
        kind=objective.kind,
        ratio_cap=objective.ratio_cap,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        kl=objective.kl,
        kl_coef=objective.kl_coef,
        entropy_coef=objective.entropy_coef,
        kl_unbiased=objective.kl_unbiased,
        backend=taken,
        chunk_rows=chunk_rows,
        need_hidden=grad and hidden.requires_grad,
        need_weight=grad and weight.requires_grad,
        need_bias=grad and bias is not None and bias.requires_grad,
    )
    return loss, PolicyStats(sums)


def policy_loss(
    output: LogprobOutput,
    labels: Tensor,
    advantages: Tensor,
    *,
    objective: PolicyObjective,
    token_weight: Tensor,
    rows: Tensor | None = None,
    old_logprob: Tensor | None = None,
    rollout_weight: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    sequence: Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """The loss of linear_policy_loss from what linear_logprob returned, differentiable through it; gspo too.

    labels and rows: as given to linear_logprob. ref_logprob None: output.ref_logprob. kl="reverse" and "forward" need output.kl, which
    must have been computed with the same kl. sequence [M] int (gspo): equal within a sequence.
    """
    check_tensor("labels", labels, tuple(output.logprob.shape), (torch.int64,), output.logprob.device)
    ref_logprob = output.ref_logprob if ref_logprob is None else ref_logprob
    per_label = check_labels(labels, advantages, token_weight, old_logprob, rollout_weight, ref_logprob)
    if rows is not None:
        check_tensor("rows", rows, tuple(labels.shape), INTS, labels.device)
    if sequence is not None:
        check_tensor("sequence", sequence, tuple(labels.shape), (torch.int64, torch.int32), labels.device)
    exact = objective.exact_kl is not None
    if exact and output.kl is None:
        raise ValueError(
            f"objective.kl={objective.kl!r} needs output.kl: call linear_logprob with kl={objective.kl!r}"
        )
    live = (labels != IGNORED) & (token_weight != 0)  # [M]
    if not torch.compiler.is_compiling():
        check_label_values(per_label, live)
    row = torch.arange(labels.shape[0], device=labels.device) if rows is None else rows.long()
    # Labels that do not count stay, with every number 0: no size depends on how many there are. They are a sequence of their own.
    logprob = torch.where(live, output.logprob, 0)
    of = {name: torch.where(live, x.to(logprob.dtype), 0) for name, x in per_label.items()}
    if sequence is not None:
        of["sequence"] = torch.where(live, sequence.long(), torch.iinfo(torch.int64).min)
    n = of.pop("token_weight")
    terms = label_terms(logprob.detach(), objective=objective, token_weight=n, **of)
    kl = output.kl if exact else None
    with torch.no_grad():
        sums = policy_sums(
            terms,
            objective,
            n,
            of.get("rollout_weight"),
            output.entropy[row],
            None if kl is None else kl[row],
            live,
        )
        row_weight = accumulate_(torch.zeros_like(output.entropy), row, n)
    # Each term adds its gradient and the value 0.
    loss = sums[0].to(logprob.dtype) + (terms.coefficient * (logprob - logprob.detach())).sum()
    if objective.entropy_coef:
        loss = loss - objective.entropy_coef * (row_weight * (output.entropy - output.entropy.detach())).sum()
    if kl is not None and objective.kl_coef:
        loss = loss + objective.kl_coef * (row_weight * (kl - kl.detach())).sum()
    return loss, PolicyStats(sums)


def check_labels(
    labels: Tensor,
    advantages: Tensor,
    token_weight: Tensor,
    old_logprob: Tensor | None,
    rollout_weight: Tensor | None,
    ref_logprob: Tensor | None,
) -> dict[str, Tensor]:
    """The arguments per label that are given, detached, all [M] floats."""
    given = {"token_weight": token_weight, "advantages": advantages}
    optional = {"old_logprob": old_logprob, "rollout_weight": rollout_weight, "ref_logprob": ref_logprob}
    given |= {name: x for name, x in optional.items() if x is not None}
    for name, x in given.items():
        check_tensor(name, x, tuple(labels.shape), FLOATS, labels.device)
    return {name: x.detach() for name, x in given.items()}
