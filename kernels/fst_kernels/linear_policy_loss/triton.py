"""Mode B in Triton: reference.py's forward with a chunk's statistics read off its product and its gradient written over it.

Per chunk of rows: one product that leaves h W^T in fp32 and the rows' statistics, with the very kernel that linear_logprob runs (hence
a ratio of exactly 1 on the policy that was scored with it), policy_terms on the labels, one pass over the chunk that turns h W^T into
dLoss/d(h W^T + b), and the two products of the gradient.
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
    label_table,
    make_heads,
    row_chunks,
)
from fst_kernels.linear_logprob.triton import (
    LabelRanges,
    RowNumbers,
    Statistics,
    divergence,
    head_statistics_,
    logits_gradient_,
    make_weights,
    row_temperatures,
)
from fst_kernels.linear_policy_loss.objective import SUMS, PolicyObjective, policy_sums, policy_terms
from fst_kernels.linear_policy_loss.reference import LinearPolicyLoss


class LinearPolicyLossTriton(LinearPolicyLoss):
    """Arguments, results and backward of LinearPolicyLoss."""

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
        per_label: dict[str, Tensor],
        objective: PolicyObjective,
        temperature: Temperature,
        softcap: float | None,
        chunk_rows: int,
        need_gradient: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        # Rows whose labels are all ignored or weigh nothing take no part at all.
        table = label_table(labels, rows, (labels != IGNORED) & (per_label["token_weight"] != 0))
        selected, compact = torch.unique_consecutive(table.rows, return_inverse=True)  # [R], [L]
        every = selected.shape[0] == hidden.shape[0]
        kl = objective.kl if objective.kl in ("reverse", "forward") else None
        head, ref_head = make_weights(weight, bias, ref_hidden, ref_weight, ref_bias)
        out = Gradients(hidden, make_heads(weight, bias, None, None, None, softcap)[0], *need_gradient)
        temperatures = row_temperatures(temperature, hidden)
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in row_chunks(None if every else selected, selected.shape[0], compact, chunk_rows):
                h, t, at = hidden[chunk.rows], temperatures[chunk.rows], chunk.label_rows
                origin = table.origin[chunk.labels]
                of = {name: x[origin].float() for name, x in per_label.items()}
                weight_l, advantages = of.pop("token_weight"), of.pop("advantages")
                ranges = LabelRanges.of(chunk.size, at, table.labels[chunk.labels])
                policy = Statistics.empty(chunk.size, origin.shape[0], hidden.device)
                products = head_statistics_(
                    policy, h, head, t, softcap, ranges, store=any(need_gradient) or kl is not None
                )
                reference = ref_products = exact = None
                if ref_head is not None:
                    assert ref_hidden is not None
                    reference = Statistics.empty(chunk.size, origin.shape[0], hidden.device)
                    ref_products = head_statistics_(
                        reference, ref_hidden[chunk.rows], ref_head, t, softcap, ranges, store=kl is not None
                    )
                    if objective.kl == "k3":
                        of["ref_logprob"] = reference.logprob(at)
                    if kl is not None and products is not None and ref_products is not None:
                        exact = divergence(
                            products, ref_products, policy, reference, head, ref_head, t, softcap, kl
                        )
                terms = policy_terms(
                    policy.logprob(at), advantages, objective=objective, token_weight=weight_l, **of
                )
                sums += policy_sums(
                    terms,
                    objective,
                    weight_l,
                    of.get("rollout_weight"),
                    policy.entropy[at],
                    None if exact is None else exact[at],
                )
                if products is None or not any(need_gradient):
                    continue
                row_weight = accumulate_(torch.zeros_like(policy.peak), at, weight_l)  # [n]
                d_entropy = -objective.entropy_coef * row_weight if objective.entropy_coef else None
                d_kl = objective.kl_coef * row_weight if kl is not None and objective.kl_coef else None
                local = None
                acting = chunk.rows
                if d_entropy is None and d_kl is None:
                    # Rows whose coefficients are all zero (clipped, A = 0) drop out of the two products.
                    found = torch.unique_consecutive(at[terms.coefficient != 0])
                    if found.shape[0] < chunk.size:
                        local, h = found, h[found]
                        acting = (
                            found + chunk.rows.start if isinstance(chunk.rows, slice) else chunk.rows[found]
                        )
                d_logits = logits_gradient_(
                    products,
                    ref_products,
                    head,
                    ref_head,
                    RowNumbers(
                        t,
                        policy.peak,
                        policy.log_total,
                        None if reference is None else reference.peak,
                        None if reference is None else reference.log_total,
                        policy.entropy,
                        exact,
                    ),
                    softcap,
                    kl,
                    terms.coefficient,
                    ranges,
                    d_entropy,
                    d_kl,
                    local,
                )
                out.add(acting, d_logits, h)
        ctx.save_for_backward(out.hidden, out.weight, out.bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return sums[0].float(), sums
