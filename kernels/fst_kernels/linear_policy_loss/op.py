"""The torch operator of mode B, `fst_kernels::linear_policy_loss`: the gradient is computed in the forward, while a chunk's logits exist.

Per chunk of rows the backend evaluates them (log-probs, entropy, KL), label_terms turns the labels' log-probs into loss and
coefficients, the backend turns those into dLoss/dlogits, and two products take that to the hidden states and the weight. Saved for
the backward are dLoss/dhidden, dLoss/dweight and dLoss/dbias only (the weight is not), which the backward scales. Mode A composed with
policy_loss and this function are the same mathematics, written once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fst_kernels.linear_logprob.arguments import check_head_values
from fst_kernels.linear_logprob.op import head_rows, optional
from fst_kernels.linear_logprob.rows import (
    IGNORED,
    Gradients,
    Heads,
    LabelTable,
    Rows,
    accumulate_,
    accumulator,
    acting_rows,
    gathered_rows,
    label_table,
    operand,
    refuse_second_derivatives,
    row_chunks,
)
from fst_kernels.linear_policy_loss.objective import (
    SUMS,
    PolicyObjective,
    check_label_values,
    label_terms,
    policy_sums,
)

# Per label, in the operator's order; those behind the first two may be missing.
PER_LABEL = ("advantages", "token_weight", "old_logprob", "rollout_weight", "ref_logprob")

_SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? rows, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, "
    "Tensor? row_temperature, Tensor? order, Tensor advantages, Tensor token_weight, Tensor? old_logprob, Tensor? rollout_weight, Tensor? ref_logprob, *, "
    "int[] bounds, float temperature, float? softcap, str kind, float ratio_cap, float clip_low, float clip_high, str? kl, float kl_coef, "
    "float entropy_coef, bool kl_unbiased, str backend, int chunk_rows, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def rows_with_advantages(
    label_rows: Tensor, advantages: Tensor, num_rows: int, chunk_rows: int
) -> Iterator[Tensor]:
    """For each chunk its rows, counted inside it, that have a label with an advantage; both arguments [L], rows ascending. Waits once, not per chunk."""
    acting = torch.unique_consecutive(label_rows[advantages != 0])
    starts = range(0, num_rows, chunk_rows)
    edges = torch.tensor([*starts, num_rows], device=acting.device)
    bounds = torch.searchsorted(acting, edges).tolist()
    for i, start in enumerate(starts):
        yield acting[bounds[i] : bounds[i + 1]] - start


@torch.library.custom_op("fst_kernels::linear_policy_loss", mutates_args=(), schema=_SCHEMA)
def linear_policy_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    row_temperature: Tensor | None,
    order: Tensor | None,
    *per_label: Tensor | None,
    bounds: Sequence[int],
    temperature: float,
    softcap: float | None,
    backend: str,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    **objective_fields: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss [], PolicyStats.sums [9], dLoss/dhidden [N, H], dLoss/dweight [V, H] and dLoss/dbias [V] in fp32; [0] where not needed.

    order, bounds: with rows, of KnownRows."""
    objective = PolicyObjective(**objective_fields)
    given = {name: x for name, x in zip(PER_LABEL, per_label, strict=True) if x is not None}
    live = (labels != IGNORED) & (given["token_weight"] != 0)
    check_head_values(
        hidden, labels, rows, row_temperature, ref_hidden, (bias, ref_bias), weight.shape[0], live
    )
    check_label_values(given, live)
    dtype, device = accumulator(hidden.dtype), hidden.device
    known = order is not None
    if order is not None and rows is not None:  # labels that do not count stay, with every number 0
        selected, size, compact = None, hidden.shape[0], rows
        table = LabelTable(rows, torch.where(live, labels, 0)[order], order)
        given = {name: torch.where(live, x, 0) for name, x in given.items()}
    else:  # rows whose labels are all ignored or weigh nothing take no part at all
        table = label_table(labels, rows, live)
        selected, compact = torch.unique_consecutive(table.rows, return_inverse=True)  # [R], [L]
        size = selected.shape[0]
        selected = None if size == hidden.shape[0] else selected
    needed = need_hidden or need_weight or need_bias
    head = head_rows(backend, Heads(weight, bias, ref_weight, ref_bias, softcap, objective.exact_kl))
    taken = operand(weight)
    out = Gradients(
        hidden, taken, need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
        gathered_rows=gathered_rows(taken, size, chunk_rows) if backend == "triton" else 0,
    )  # fmt: skip
    # Rows without a coefficient drop out of the two products, where neither entropy nor an exact KL gives all rows one. A host that computes drops
    # what clipping silences, too; a device is not waited for in every chunk: it drops the rows whose advantages are all 0 (k3 gives those a
    # coefficient), and clipped rows stay with a gradient of exactly 0.
    waits = backend == "reference"
    without: Iterator[Tensor | None] = itertools.repeat(None)
    if (
        needed
        and not waits
        and not known
        and (objective.kl is None or not objective.kl_coef)
        and not objective.entropy_coef
    ):
        advantages = given["advantages"][table.origin]
        without = rows_with_advantages(compact, advantages, size, chunk_rows)
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device)
    with torch.autocast(device.type, enabled=False):
        chunks = row_chunks(selected, size, compact, chunk_rows, bounds)
        for chunk, acting in zip(chunks, without, strict=False):
            at, here, origin = chunk.rows, chunk.label_rows, table.origin[chunk.labels]
            h, t = hidden[at], temperature if row_temperature is None else row_temperature[at]
            of = {name: x[origin].to(dtype) for name, x in given.items()}
            chosen = Rows(h, optional(ref_hidden, at), t, here, table.labels[chunk.labels])
            values = head.evaluate(chosen, keep=needed)
            if objective.kl == "k3" and values.ref_logprob is not None:
                of["ref_logprob"] = values.ref_logprob
            n = of.pop("token_weight")
            terms = label_terms(values.logprob, objective=objective, token_weight=n, **of)
            exact = None if values.kl is None else values.kl[here]
            counted = live[origin] if known else None
            sums += policy_sums(
                terms, objective, n, of.get("rollout_weight"), values.entropy[here], exact, counted
            )
            if not needed:
                continue
            row_weight = accumulate_(values.entropy.new_zeros(chunk.size), here, n)
            d_entropy = -objective.entropy_coef * row_weight if objective.entropy_coef else None
            d_kl = objective.kl_coef * row_weight if exact is not None and objective.kl_coef else None
            if waits and d_entropy is None and d_kl is None:
                acting = torch.unique_consecutive(here[terms.coefficient != 0])
            if acting is not None and acting.shape[0] == chunk.size:
                acting = None
            if acting is not None:
                at, h = acting_rows(chunk, acting), h[acting]
            out.add(at, head.gradient(terms.coefficient, d_entropy, d_kl, acting, out.room(len(h))), h)
        out.flush()
    absent = hidden.new_empty(0)
    return (
        sums[0].to(dtype, copy=True),
        sums,
        absent if out.hidden is None else out.hidden,
        absent.clone() if out.weight is None else out.weight,
        absent.clone() if out.bias is None else out.bias,
    )


@linear_policy_loss_op.register_fake
def _(
    *tensors: Any, need_hidden: bool, need_weight: bool, need_bias: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = tensors[:2]
    dtype = accumulator(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(SUMS), dtype=torch.float64),
        hidden.new_empty(hidden.shape if need_hidden else 0),
        hidden.new_empty(weight.shape, dtype=dtype) if need_weight else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=dtype) if need_bias else hidden.new_empty(0),
    )


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    _, sums, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(sums, *gradients)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("linear_policy_loss")
    scaled: list[Tensor | None] = [None] * ctx.inputs
    for i, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
        if ctx.needs_input_grad[i] and d_loss is not None:  # no product in fp32 besides the result
            scaled[i] = torch.mul(gradient, d_loss, out=torch.empty_like(gradient, dtype=dtype))
    return tuple(scaled)


linear_policy_loss_op.register_autograd(_backward, setup_context=_setup_context)
