"""`sample_tokens`: arguments checked, backend chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fst_kernels.backends import choose_backend
from fst_kernels.checks import FLOATS, INTS, check_tensor, look_at_values
from fst_kernels.sampling import cuda, reference


class SampleOutput(NamedTuple):
    ids: Tensor  # [S] int64
    # [S] fp32, under the distribution that was sampled: temperature, truncation, renormalised
    logprob: Tensor
    untruncated_logprob: Tensor  # [S] fp32, under temperature only


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    seeds: Tensor,
    positions: Tensor,
    backend: str | None = None,
) -> SampleOutput:
    """One token per row of logits [S, V]; row s depends on its logits, seeds[s], positions[s] and its rules only, never on the other rows.

    temperature: a float or [S]. 0 is greedy: the most probable token (the lowest id among equals) with logprob 0, since nothing else
        could be sampled; untruncated_logprob is then that of temperature 1, because that of temperature 0 would say nothing.
    top_k: the k most probable tokens (the lower id among equal logits). top_p, in (0, 1]: then the most probable ones of those up to and
        including the one that reaches the fraction top_p of their mass. min_p, in [0, 1]: then those with at least min_p times the
        greatest probability. The most probable token always stays.
        Each of the three is None (no such rule), a number for all rows, or a tensor [S], top_k of int32 or int64, the others of floats, one
        for each row: V or more, 1.0 and 0.0 leave a row whole. A row is sampled as by calls with its numbers.
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
    if isinstance(top_k, Tensor):
        _check_rows("top_k", top_k, logits, INTS, lambda k: k >= 1, "integers >= 1")
    elif top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k={top_k}; allowed: None or an integer >= 1")
    if isinstance(top_p, Tensor):
        _check_rows("top_p", top_p, logits, FLOATS, lambda p: (p > 0) & (p <= 1), "numbers in (0, 1]")
    elif top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; allowed: None or a number in (0, 1]")
    if isinstance(min_p, Tensor):
        _check_rows("min_p", min_p, logits, FLOATS, lambda p: (p >= 0) & (p <= 1), "numbers in [0, 1]")
    elif min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}; allowed: None or a number in [0, 1]")
    if isinstance(top_k, int) and top_k >= vocabulary:
        top_k = None
    if isinstance(top_p, (int, float)) and top_p == 1:
        top_p = None
    if taken == "reference":
        out = SampleOutput(*reference.sample(logits, temperature, top_k, top_p, min_p, seeds, positions))
    else:
        rules = (temperature, top_k, top_p, min_p)
        of_all = [None if isinstance(x, Tensor) else x for x in rules]
        of_rows = [x if isinstance(x, Tensor) else None for x in rules]
        of_all[0] = 1.0 if of_all[0] is None else float(of_all[0])
        out = SampleOutput(*cuda.sample_tokens_op(logits, *of_all, *of_rows, seeds, positions, taken))
    if values and bool(out.untruncated_logprob.isnan().any()):
        row = int(out.untruncated_logprob.isnan().nonzero()[0, 0])
        raise ValueError(
            f"logits row {row} holds NaN or +inf, or only -inf; at least one finite logit and none of those are needed"
        )
    return out


def _check_rows(
    name: str,
    x: Tensor,
    logits: Tensor,
    dtypes: tuple[torch.dtype, ...],
    good: Callable[[Tensor], Tensor],
    allowed: str,
) -> None:
    """A rule that is given row by row."""
    check_tensor(name, x, (logits.shape[0],), dtypes, logits.device)
    if look_at_values(logits.device) and not torch.compiler.is_compiling() and not bool(good(x).all()):
        row = int((~good(x)).nonzero()[0, 0])
        raise ValueError(f"{name}[{row}]={x[row].item()}; allowed: {allowed}")
