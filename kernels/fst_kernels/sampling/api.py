"""`sample_tokens`: arguments checked, backend chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.checks import FLOATS, check_tensor, look_at_values
from fst_kernels.sampling import cuda, reference


class SampleOutput(NamedTuple):
    ids: Tensor  # [S] int64
    logprob: (
        Tensor  # [S] fp32, under the distribution that was sampled: temperature, truncation, renormalised
    )
    untruncated_logprob: Tensor  # [S] fp32, under temperature only


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seeds: Tensor,
    positions: Tensor,
    backend: str | None = None,
) -> SampleOutput:
    """One token per row of logits [S, V]; row s depends on its logits, seeds[s] and positions[s] only, never on the other rows.

    temperature: a float or [S]. 0 is greedy: the most probable token (the lowest id among equals) with logprob 0, since nothing else
        could be sampled; untruncated_logprob is then that of temperature 1, because that of temperature 0 would say nothing.
    top_k: the k most probable tokens (the lower id among equal logits). top_p, in (0, 1]: then the most probable ones of those up to and
        including the one that reaches the fraction top_p of their mass. min_p, in [0, 1]: then those with at least min_p times the
        greatest probability. The most probable token always stays.
    seeds, positions: [S] int64, any value: the random number of a row is a pure function of the two. Use a new position for every
        token of a sequence and a seed of its own for every sequence.
    Logits of -inf are never sampled. ValueError names the row that holds NaN, +inf or only -inf (on a GPU: with FST_CHECK=1; without it
        both log-probs of such a row are NaN and its id means nothing).
    Backends agree on the order and on top_k and min_p exactly; they round exponentials and sums differently, which can move top_p's last token
        or the drawn one only where the compared sums agree to about 1e-6. Within one backend nothing depends on batch or launch.
    """
    check_tensor("logits", logits, ("S", "V"), FLOATS)
    taken = choose_backend("sample_tokens", backend, logits.device, torch.float32)  # as which they are read
    rows, vocabulary = logits.shape
    if vocabulary == 0:
        raise ValueError(f"logits has shape {[rows, vocabulary]}; at least one token is needed")
    check_tensor("seeds", seeds, (rows,), (torch.int64,), logits.device)
    check_tensor("positions", positions, (rows,), (torch.int64,), logits.device)
    if taken != "reference" and vocabulary > cuda.LARGEST_VOCABULARY:
        raise ValueError(
            f"logits has {vocabulary} columns; backend={taken} takes up to {cuda.LARGEST_VOCABULARY}, backend='reference' any number"
        )
    values = look_at_values(logits.device) and not torch.compiler.is_compiling()
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (rows,), FLOATS, logits.device)
        if values and not bool((torch.isfinite(temperature) & (temperature >= 0)).all()):
            raise ValueError(f"temperature={temperature.tolist()}; allowed: finite numbers >= 0")
    elif not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; allowed: a finite number >= 0")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k={top_k}; allowed: None or an integer >= 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; allowed: None or a number in (0, 1]")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}; allowed: None or a number in [0, 1]")
    if top_k is not None and top_k >= vocabulary:
        top_k = None
    if top_p == 1:
        top_p = None
    if taken == "reference":
        out = SampleOutput(*reference.sample(logits, temperature, top_k, top_p, min_p, seeds, positions))
    else:
        per_row = isinstance(temperature, Tensor)
        out = SampleOutput(
            *cuda.sample_tokens_op(
                logits,
                temperature if per_row else None,
                1.0 if per_row else float(temperature),
                top_k,
                top_p,
                min_p,
                seeds,
                positions,
                taken,
            )
        )
    if values and bool(out.untruncated_logprob.isnan().any()):
        row = int(out.untruncated_logprob.isnan().nonzero()[0, 0])
        raise ValueError(
            f"logits row {row} holds NaN or +inf, or only -inf; at least one finite logit and none of those are needed"
        )
    return out
