"""`linear_logprob` (mode A): the primitive from which any loss can be composed on [M]-sized tensors."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.checks import FLOATS, INTS, check_range, check_tensor, look_at_values
from fst_kernels.linear_logprob.reference import IGNORED, LinearLogprob, default_chunk_rows


class LogprobOutput(NamedTuple):
    """fp32 (fp64 for fp64 hidden states); logprob, entropy and kl are differentiable in hidden, weight and bias."""

    logprob: Tensor  # [M], 0 for ignored labels
    entropy: Tensor  # [N]
    lse: Tensor  # [N] logsumexp of the scaled logits
    ref_logprob: Tensor | None  # [M], 0 for ignored labels
    kl: Tensor | None  # [N]


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    kl: Literal["reverse", "forward"] | None = None,
    backend: str | None = None,
    chunk_rows: int | None = None,
) -> LogprobOutput:
    """Log-probabilities of labels under softmax(softcap(hidden weight^T + bias) / temperature), and each row's entropy and KL.

    hidden [N, H], weight [V, H] of the same dtype (fp32, bf16, fp16, fp64), bias [V]; labels [M] int64 with -100 = ignored; rows [M]
    int, the row of each label in any order, several labels per row allowed (None: M == N, label m belongs to row m); temperature a
    float > 0 or [N], no gradient; softcap c > 0 maps a logit x to c tanh(x / c) before the temperature.
    ref_hidden [N, H'] with ref_weight [V, H'] (None: weight and bias, H' == H) and ref_bias give ref_logprob, and with kl="reverse"
    KL(policy || reference) or "forward" KL(reference || policy), over the whole vocabulary. No gradient flows into the reference.
    chunk_rows: rows of logits that exist at one time; None: about 64 MiB of them, in Triton, which is for GPUs, under 1 GiB.
    First derivatives only. A row gets the same bits whatever rows are beside it and however they are chunked, from the reference
    backend on the CPU and from Triton.
    """
    check_head(
        hidden, weight, labels, rows, bias, temperature, softcap, ref_hidden, ref_weight, ref_bias, chunk_rows
    )
    if kl not in (None, "reverse", "forward"):
        raise ValueError(f"kl={kl!r}; allowed: None, 'reverse', 'forward'")
    if kl is not None and ref_hidden is None:
        raise ValueError(f"kl={kl!r} needs ref_hidden, which is None")
    op: type[torch.autograd.Function] = LinearLogprob
    default_rows = default_chunk_rows(weight.shape[0])
    if choose_backend("linear_logprob", backend, hidden.device, hidden.dtype) == "triton":
        from fst_kernels.linear_logprob import triton as kernels

        op = kernels.LinearLogprobTriton
        default_rows = kernels.default_chunk_rows(weight.shape[0], 1 if kl is None else 2)
    out = op.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        detached(ref_hidden),
        detached(ref_weight),
        detached(ref_bias),
        labels,
        rows,
        temperature.detach() if isinstance(temperature, Tensor) else float(temperature),
        softcap,
        kl,
        chunk_rows or default_rows,
    )
    return LogprobOutput(*out)


def detached(x: Tensor | None) -> Tensor | None:
    return x.detach() if x is not None and x.requires_grad else x


def check_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    chunk_rows: int | None,
) -> None:
    """What both modes ask of the arguments they share."""
    check_tensor("hidden", hidden, ("N", "H"), FLOATS)
    device = hidden.device
    num_rows, size = hidden.shape
    check_tensor("weight", weight, ("V", size), (hidden.dtype,), device)
    vocabulary = weight.shape[0]
    check_tensor("labels", labels, ("M",) if rows is not None else (num_rows,), (torch.int64,), device)
    if rows is not None:
        check_tensor("rows", rows, (labels.shape[0],), INTS, device)
    if bias is not None:
        check_tensor("bias", bias, (vocabulary,), FLOATS, device)
    values = look_at_values(device)
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (num_rows,), FLOATS, device)
        if values and not bool((torch.isfinite(temperature) & (temperature > 0)).all()):
            bad = int((~(torch.isfinite(temperature) & (temperature > 0))).nonzero()[0, 0])
            raise ValueError(f"temperature[{bad}]={float(temperature[bad])}; allowed: finite numbers > 0")
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; allowed: a finite number > 0")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap={softcap}; allowed: None or a finite number > 0")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}; allowed: None or an integer >= 1")
    if ref_hidden is None:
        for name, x in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if x is not None:
                raise ValueError(f"{name} is given without ref_hidden; give both or neither")
    elif ref_weight is None:
        if ref_bias is not None:
            raise ValueError(
                "ref_bias is given without ref_weight; without ref_weight the reference uses weight and bias"
            )
        check_tensor("ref_hidden", ref_hidden, (num_rows, size), (weight.dtype,), device)
    else:
        check_tensor("ref_hidden", ref_hidden, (num_rows, "H'"), FLOATS, device)
        check_tensor("ref_weight", ref_weight, (vocabulary, ref_hidden.shape[1]), (ref_hidden.dtype,), device)
        if ref_bias is not None:
            check_tensor("ref_bias", ref_bias, (vocabulary,), FLOATS, device)
    if values:
        check_range(
            "labels",
            torch.where(labels == IGNORED, 0, labels),
            0,
            max(vocabulary, 1),
            f", or {IGNORED} (ignored)",
        )
        if rows is not None:
            check_range("rows", rows, 0, num_rows)
