"""Mode B in plain PyTorch: the gradient is computed in the forward, chunk by chunk, while the chunk's logits exist.

Saved for the backward are dLoss/dhidden, dLoss/dweight and dLoss/dbias only (the weight is not), which the backward scales. Row
statistics, the closed form of dLoss/dlogits and the sums over chunks are those of linear_logprob; the coefficients are those of
policy_terms: mode A composed with policy_loss and this function are the same mathematics, written once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fst_kernels.linear_logprob.reference import (
    IGNORED,
    Gradients,
    Temperature,
    accumulate_,
    accumulator,
    chunk_temperature,
    label_table,
    logits_gradient,
    make_heads,
    pad_rows,
    refuse_second_derivatives,
    row_chunks,
    row_statistics,
)
from fst_kernels.linear_policy_loss.objective import SUMS, PolicyObjective, policy_sums, policy_terms


class LinearPolicyLoss(torch.autograd.Function):
    """hidden, weight, bias -> loss, PolicyStats.sums."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        labels: Tensor,
        rows: Tensor | None,
        per_label: dict[
            str, Tensor
        ],  # advantages, token_weight and, if given, old_logprob, rollout_weight, ref_logprob: [M]
        objective: PolicyObjective,
        temperature: Temperature,
        softcap: float | None,
        chunk_rows: int,
        need_gradient: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        dtype, device = accumulator(hidden.dtype), hidden.device
        # Rows whose labels are all ignored or weigh nothing take no part at all.
        table = label_table(labels, rows, (labels != IGNORED) & (per_label["token_weight"] != 0))
        selected, compact = torch.unique_consecutive(table.rows, return_inverse=True)  # [R], [L]
        every = selected.shape[0] == hidden.shape[0]
        kl = objective.kl if objective.kl in ("reverse", "forward") else None
        head, ref_head = make_heads(weight, bias, ref_hidden, ref_weight, ref_bias, softcap)
        out = Gradients(hidden, head, *need_gradient)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
        with torch.autocast(device.type, enabled=False):
            for chunk in row_chunks(None if every else selected, selected.shape[0], compact, chunk_rows):
                t = chunk_temperature(temperature, chunk, dtype)
                h = hidden[chunk.rows]
                z = head.logits(pad_rows(h), t)
                r = None if ref_head is None else ref_head.logits(pad_rows(ref_hidden[chunk.rows]), t)  # type: ignore[index]
                kept = z.clone() if softcap is not None and any(need_gradient) else None
                stats = row_statistics(z, r, kl)
                origin, at = table.origin[chunk.labels], chunk.label_rows
                label = table.labels[chunk.labels]
                of = {name: x[origin].to(dtype) for name, x in per_label.items()}
                weight_l, advantages = of.pop("token_weight"), of.pop("advantages")
                if stats.log_q is not None and objective.kl == "k3":
                    of["ref_logprob"] = stats.log_q[at, label]
                terms = policy_terms(
                    stats.log_p[at, label], advantages, objective=objective, token_weight=weight_l, **of
                )
                exact = None if stats.kl is None else stats.kl[at]
                sums += policy_sums(
                    terms, objective, weight_l, of.get("rollout_weight"), stats.entropy[at], exact
                )
                if not any(need_gradient):
                    continue
                row_weight = accumulate_(torch.zeros_like(stats.lse), at, weight_l)  # [n padded]
                d_entropy = -objective.entropy_coef * row_weight if objective.entropy_coef else None
                d_kl = objective.kl_coef * row_weight if kl is not None and objective.kl_coef else None
                d_z = logits_gradient(stats, kl, terms.coefficient, at, label, d_entropy, d_kl)
                d_logits, acting = head.gradient(d_z, kept, t)[: chunk.size], chunk.rows
                if d_entropy is None and d_kl is None:
                    # Rows whose coefficients are all zero (clipped, A = 0) drop out of the two products.
                    local = torch.unique_consecutive(at[terms.coefficient != 0])
                    if local.shape[0] < chunk.size:
                        acting = (
                            local + chunk.rows.start if isinstance(chunk.rows, slice) else chunk.rows[local]
                        )
                        d_logits, h = d_logits[local], h[local]
                out.add(acting, d_logits, h)
        ctx.save_for_backward(out.hidden, out.weight, out.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return sums[0].to(dtype), sums

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("linear_policy_loss")
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        dtypes = (None if d_hidden is None else d_hidden.dtype, *ctx.dtypes)
        scaled = [
            None
            if x is None or d_loss is None
            else torch.mul(x, d_loss, out=torch.empty_like(x, dtype=dtype))
            for x, dtype in zip((d_hidden, d_weight, d_bias), dtypes, strict=True)
        ]
        return *scaled, *([None] * 11)
