"""The torch operators of mode A: `fst_kernels::linear_logprob` and its backward, loops over chunks of rows for any backend.

Only hidden states, weights and a few numbers per row are kept for the backward; logits are recomputed there, chunk by chunk. As
operators of torch.library, with fake kernels, they are opaque to torch.compile, which traces around them without a break.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fst_kernels.linear_logprob import reference
from fst_kernels.linear_logprob.arguments import check_head_values
from fst_kernels.linear_logprob.rows import (
    IGNORED,
    Gradients,
    Heads,
    RecallableRows,
    RowIndex,
    Rows,
    accumulator,
    every_label,
    gathered_rows,
    label_table,
    operand,
    refuse_second_derivatives,
    row_chunks,
)

KEPT = 4  # numbers per row that the backward gets back (RowValues.kept)

_TENSORS = "Tensor labels, Tensor? rows, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, Tensor? row_temperature"
_NUMBERS = "float temperature, float? softcap, str? kl, str backend, int chunk_rows"
_SCHEMA = (
    f"(Tensor hidden, Tensor weight, Tensor? bias, {_TENSORS}, *, {_NUMBERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    f"(Tensor? d_logprob, Tensor? d_entropy, Tensor? d_kl, Tensor hidden, Tensor weight, Tensor? bias, {_TENSORS}, Tensor entropy, "
    f"Tensor divergence, Tensor kept, *, {_NUMBERS}, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
)


def head_rows(backend: str, heads: Heads) -> RecallableRows:
    if backend == "triton":
        from fst_kernels.linear_logprob import triton  # only here: it is not installed everywhere

        return triton.TritonRows(heads)
    return reference.ReferenceRows(heads)


def default_chunk_rows(backend: str, vocabulary: int, matrices: int) -> int:
    """matrices: of logits that exist at one time."""
    if backend == "triton":
        from fst_kernels.linear_logprob import triton

        return triton.default_chunk_rows(vocabulary, matrices)
    return reference.default_chunk_rows(vocabulary)


def optional(x: Tensor | None, rows: RowIndex) -> Tensor | None:
    return None if x is None else x[rows]


def _absent(like: Tensor) -> Tensor:
    """An operator returns tensors only; this one stands for None."""
    return like.new_empty(0)


@torch.library.custom_op("fst_kernels::linear_logprob", mutates_args=(), schema=_SCHEMA)
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    row_temperature: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    kl: str | None,
    backend: str,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob [M], entropy [N], lse [N], ref_logprob [M] or [0], kl [N] or [0], kept [4, N]."""
    ignored = labels == IGNORED
    check_head_values(
        hidden, labels, rows, row_temperature, ref_hidden, (bias, ref_bias), weight.shape[0], ~ignored
    )
    dtype, num_rows = accumulator(hidden.dtype), hidden.shape[0]
    table = every_label(labels, rows)
    logprob = hidden.new_zeros(labels.shape, dtype=dtype)
    entropy = hidden.new_empty(num_rows, dtype=dtype)
    lse = torch.empty_like(entropy)
    ref_logprob = None if ref_hidden is None else torch.zeros_like(logprob)
    divergence = None if kl is None else torch.empty_like(lse)
    kept = lse.new_empty((KEPT, num_rows))
    head = head_rows(backend, Heads(weight, bias, ref_weight, ref_bias, softcap, kl))
    # Triton stores no logits without an exact KL: all rows are one chunk then.
    step = max(num_rows, 1) if backend == "triton" and kl is None else chunk_rows
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in row_chunks(None, num_rows, table.rows, step):
            at, origin = chunk.rows, table.origin[chunk.labels]
            t = temperature if row_temperature is None else row_temperature[at]
            values = head.evaluate(
                Rows(hidden[at], optional(ref_hidden, at), t, chunk.label_rows, table.labels[chunk.labels]),
                keep=False,
            )
            lse[at], entropy[at] = values.lse, values.entropy
            logprob[origin] = values.logprob
            if ref_logprob is not None and values.ref_logprob is not None:
                ref_logprob[origin] = values.ref_logprob
            if divergence is not None and values.kl is not None:
                divergence[at] = values.kl
            if values.kept is not None:
                kept[:, at] = values.kept
    logprob.masked_fill_(ignored, 0)
    if ref_logprob is not None:
        ref_logprob.masked_fill_(ignored, 0)
    absent = _absent(lse)
    return (
        logprob,
        entropy,
        lse,
        absent if ref_logprob is None else ref_logprob,
        absent.clone() if divergence is None else divergence,
        kept,
    )


@linear_logprob_op.register_fake
def _(hidden: Tensor, *tensors: Tensor | None, kl: str | None, **_: Any) -> tuple[Tensor, ...]:
    labels, ref_hidden = tensors[2], tensors[4]
    assert labels is not None
    dtype, num_rows, num_labels = accumulator(hidden.dtype), hidden.shape[0], labels.shape[0]
    return tuple(
        hidden.new_empty(shape, dtype=dtype)
        for shape in (
            (num_labels,),
            (num_rows,),
            (num_rows,),
            (0 if ref_hidden is None else num_labels,),
            (0 if kl is None else num_rows,),
            (KEPT, num_rows),
        )
    )


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    _, entropy, lse, ref_logprob, divergence, kept = output
    needed = list(inputs)
    if keyword_only_inputs["kl"] is None:  # the reference's own log-probs have no gradient
        needed[5:8] = [None] * 3
    ctx.save_for_backward(*needed, entropy, divergence, kept)
    ctx.numbers = keyword_only_inputs
    without_kl = [divergence] if keyword_only_inputs["kl"] is None else []
    ctx.mark_non_differentiable(lse, ref_logprob, kept, *without_kl)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("linear_logprob")
    d_logprob, d_entropy, _, _, d_kl, _ = grads
    hidden, weight, bias, labels, rows, *reference, row_temperature, entropy, divergence, kept = (
        ctx.saved_tensors
    )
    numbers = ctx.numbers
    if d_kl is None:  # then nothing depends on the reference
        reference, numbers = [None] * 3, numbers | {"kl": None}
    needed = ctx.needs_input_grad[:3]
    gradients = linear_logprob_backward_op(
        d_logprob, d_entropy, d_kl, hidden, weight, bias, labels, rows, *reference, row_temperature, entropy, divergence,
        kept, **numbers, need_hidden=needed[0], need_weight=needed[1], need_bias=needed[2],
    )  # fmt: skip
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), *([None] * 6)


@torch.library.custom_op("fst_kernels::linear_logprob_backward", mutates_args=(), schema=_BACKWARD_SCHEMA)
def linear_logprob_backward_op(
    d_logprob: Tensor | None,
    d_entropy: Tensor | None,
    d_kl: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    row_temperature: Tensor | None,
    entropy: Tensor,
    divergence: Tensor,
    kept: Tensor,
    *,
    temperature: float,
    softcap: float | None,
    kl: str | None,
    backend: str,
    chunk_rows: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dLoss/dhidden, dLoss/dweight, dLoss/dbias in their types; [0] where not needed."""
    if d_logprob is None:
        d_logprob = entropy.new_zeros(labels.shape)
    # Labels and rows without a coefficient take no part from here on.
    table = label_table(labels, rows, (labels != IGNORED) & (d_logprob != 0))
    wanted = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
    wanted[table.rows] = True
    for d_row in (d_entropy, d_kl):
        if d_row is not None:
            wanted |= d_row != 0
    selected = wanted.nonzero().squeeze(1)  # [R]
    compact = torch.searchsorted(selected, table.rows)  # [L]
    every = selected.shape[0] == hidden.shape[0]
    head = head_rows(backend, Heads(weight, bias, ref_weight, ref_bias, softcap, kl))
    taken = operand(weight)
    out = Gradients(
        hidden, taken, need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
        gathered_rows=gathered_rows(taken, selected.shape[0], chunk_rows),
    )  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in row_chunks(None if every else selected, selected.shape[0], compact, chunk_rows):
            at, h, origin = chunk.rows, hidden[chunk.rows], table.origin[chunk.labels]
            t = temperature if row_temperature is None else row_temperature[at]
            label = table.labels[chunk.labels]
            head.recall(
                Rows(h, optional(ref_hidden, at), t, chunk.label_rows, label),
                entropy[at],
                None if kl is None else divergence[at],
                kept[:, at],
            )
            d_logits = head.gradient(
                d_logprob[origin], optional(d_entropy, at), optional(d_kl, at), None, out.room(chunk.size)
            )
            out.add(at, d_logits, h)
        out.flush()
    return results(out, weight, bias)


def results(out: Gradients, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    absent = _absent(weight)
    return (
        absent if out.hidden is None else out.hidden,
        absent.clone() if out.weight is None else out.weight.to(weight.dtype),
        absent.clone() if out.bias is None or bias is None else out.bias.to(bias.dtype),
    )


@linear_logprob_backward_op.register_fake
def _(
    *tensors: Any, need_hidden: bool, need_weight: bool, need_bias: bool, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needed = zip(tensors[3:6], (need_hidden, need_weight, need_bias), strict=True)
    like = [x.new_empty(x.shape) if need else tensors[4].new_empty(0) for x, need in needed]
    return like[0], like[1], like[2]


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)
