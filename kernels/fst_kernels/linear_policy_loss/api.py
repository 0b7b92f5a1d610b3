"""`linear_policy_loss` (mode B, the training path) and `policy_loss`, the same loss on the output of linear_logprob (mode A)."""

from __future__ import annotations

import torch
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.checks import FLOATS, check_finite, check_tensor, look_at_values
from fst_kernels.linear_logprob.api import LogprobOutput, check_head, detached
from fst_kernels.linear_logprob.reference import IGNORED, accumulate_, default_chunk_rows
from fst_kernels.linear_policy_loss.cuda import (
    HostRowKernelPolicyLoss,
    RowKernelPolicyLoss,
    device_chunk_rows,
)
from fst_kernels.linear_policy_loss.objective import PolicyObjective, PolicyStats, policy_sums, policy_terms
from fst_kernels.linear_policy_loss.reference import LinearPolicyLoss

# Backend -> what runs it; triton, an optional package, is imported when it is taken. All take and save the same.
FUNCTIONS: dict[str, type[LinearPolicyLoss]] = {
    "reference": LinearPolicyLoss,
    "cuda": RowKernelPolicyLoss,
    "host": HostRowKernelPolicyLoss,
}


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
    have: ValueError; use linear_logprob and policy_loss.
    """
    check_head(
        hidden, weight, labels, rows, bias, temperature, softcap, ref_hidden, ref_weight, ref_bias, chunk_rows
    )
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
    grad = torch.is_grad_enabled()
    taken = choose_backend("linear_policy_loss", backend, hidden.device, hidden.dtype)
    op: type[torch.autograd.Function] = FUNCTIONS.get(taken, LinearPolicyLoss)
    default_rows = default_chunk_rows(weight.shape[0])
    if taken == "cuda":
        default_rows = device_chunk_rows(weight.shape[0], 1 if ref_hidden is None else 2)
    elif taken == "triton":
        from fst_kernels.linear_logprob.triton import default_chunk_rows as triton_chunk_rows
        from fst_kernels.linear_policy_loss.triton import LinearPolicyLossTriton

        op = LinearPolicyLossTriton
        default_rows = triton_chunk_rows(weight.shape[0], 2 if objective.kl in ("reverse", "forward") else 1)
    loss, sums = op.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        detached(ref_hidden),
        detached(ref_weight),
        detached(ref_bias),
        labels,
        rows,
        per_label,
        objective,
        temperature.detach() if isinstance(temperature, Tensor) else float(temperature),
        softcap,
        chunk_rows or default_rows,
        tuple(grad and x is not None and x.requires_grad for x in (hidden, weight, bias)),
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
    if sequence is not None:
        check_tensor("sequence", sequence, tuple(labels.shape), (torch.int64, torch.int32), labels.device)
    exact = objective.kl in ("reverse", "forward")
    if exact and output.kl is None:
        raise ValueError(
            f"objective.kl={objective.kl!r} needs output.kl: call linear_logprob with kl={objective.kl!r}"
        )
    live = ((labels != IGNORED) & (token_weight != 0)).nonzero().squeeze(1)  # [L]
    row = live if rows is None else rows[live].long()
    logprob = output.logprob[live]
    of = {name: x[live].to(logprob.dtype) for name, x in per_label.items()}
    n, advantages = of.pop("token_weight"), of.pop("advantages")
    terms = policy_terms(
        logprob.detach(),
        advantages,
        objective=objective,
        token_weight=n,
        sequence=None if sequence is None else sequence[live],
        **of,
    )
    kl = output.kl if exact else None
    with torch.no_grad():
        sums = policy_sums(
            terms,
            objective,
            n,
            of.get("rollout_weight"),
            output.entropy[row],
            None if kl is None else kl[row],
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
    """The arguments per label that are given, detached and checked: [M] floats, finite wherever a label counts."""
    given = {"token_weight": token_weight, "advantages": advantages}
    optional = {"old_logprob": old_logprob, "rollout_weight": rollout_weight, "ref_logprob": ref_logprob}
    given |= {name: x for name, x in optional.items() if x is not None}
    for name, x in given.items():
        check_tensor(name, x, tuple(labels.shape), FLOATS, labels.device)
    if look_at_values(labels.device):
        live = ((labels != IGNORED) & (token_weight != 0)).nonzero().squeeze(1)
        for name, x in given.items():
            check_finite(name, x, live)
    return {name: x.detach() for name, x in given.items()}
