"""`linear_logprob` (mode A): the primitive from which any loss can be composed on [M]-sized tensors."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.linear_logprob.arguments import check_head
from fst_kernels.linear_logprob.op import default_chunk_rows, linear_logprob_op


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
    taken = choose_backend("linear_logprob", backend, hidden.device, hidden.dtype)
    row_temperature, shared = split_temperature(temperature)
    logprob, entropy, lse, ref_logprob, divergence, _ = linear_logprob_op(
        hidden,
        weight,
        bias,
        labels,
        rows,
        detached(ref_hidden),
        detached(ref_weight),
        detached(ref_bias),
        row_temperature,
        temperature=shared,
        softcap=softcap,
        kl=kl,
        backend=taken,
        chunk_rows=chunk_rows or default_chunk_rows(taken, weight.shape[0], 1 if kl is None else 2),
    )
    return LogprobOutput(
        logprob, entropy, lse, None if ref_hidden is None else ref_logprob, None if kl is None else divergence
    )


def split_temperature(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """One per row, or one for all."""
    if isinstance(temperature, Tensor):
        return temperature.detach(), 1.0
    return None, float(temperature)


def detached(x: Tensor | None) -> Tensor | None:
    return x.detach() if x is not None and x.requires_grad else x
