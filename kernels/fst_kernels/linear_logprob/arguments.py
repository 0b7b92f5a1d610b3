"""What both modes ask of the arguments they share: shapes, types and devices when they are called, values when they run.

Values are looked at inside the operators, so that torch.compile, which has none, can trace the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fst_kernels.checks import FLOATS, INTS, check_range, check_rows_finite, check_tensor, look_at_values
from fst_kernels.linear_logprob.rows import IGNORED


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
    *,
    host_rows: bool = False,  # rows may be on the host
) -> None:
    check_tensor("hidden", hidden, ("N", "H"), FLOATS)
    device = hidden.device
    num_rows, size = hidden.shape
    check_tensor("weight", weight, ("V", size), (hidden.dtype,), device)
    vocabulary = weight.shape[0]
    if not vocabulary:
        raise ValueError("weight has shape [0, H]; a vocabulary of at least 1 is needed")
    check_tensor("labels", labels, ("M",) if rows is not None else (num_rows,), (torch.int64,), device)
    if rows is not None:
        anywhere = host_rows and rows.device.type == "cpu"
        check_tensor("rows", rows, (labels.shape[0],), INTS, None if anywhere else device)
    if bias is not None:
        check_tensor("bias", bias, (vocabulary,), FLOATS, device)
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (num_rows,), FLOATS, device)
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
        if (ref_hidden.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise ValueError(
                f"ref_hidden has dtype {ref_hidden.dtype} and hidden {hidden.dtype}; float64 goes with float64 only"
            )


def check_head_values(
    hidden: Tensor,
    labels: Tensor,
    rows: Tensor | None,
    row_temperature: Tensor | None,
    ref_hidden: Tensor | None,
    biases: tuple[Tensor | None, Tensor | None],
    vocabulary: int,
    live: Tensor,  # [M] bool: labels that count
) -> None:
    if not look_at_values(hidden.device):
        return
    if row_temperature is not None:
        good = torch.isfinite(row_temperature) & (row_temperature > 0)
        if not bool(good.all()):
            bad = int((~good).nonzero()[0, 0])
            raise ValueError(f"temperature[{bad}]={float(row_temperature[bad])}; allowed: finite numbers > 0")
    for name, bias in zip(("bias", "ref_bias"), biases, strict=True):
        if bias is not None and not bool(torch.isfinite(bias).all()):
            bad = int((~torch.isfinite(bias)).nonzero()[0, 0])
            raise ValueError(
                f"{name}[{bad}]={float(bias[bad])}; it must be finite: to mask a token take a number such as -1e4"
            )
    known = torch.where(labels == IGNORED, 0, labels)
    check_range("labels", known, 0, max(vocabulary, 1), f", or {IGNORED} (ignored)")
    if rows is not None:
        check_range("rows", rows, 0, hidden.shape[0])
    read = live.nonzero().squeeze(1) if rows is None else rows[live].long()
    check_rows_finite("hidden", hidden, read)
    if ref_hidden is not None:
        check_rows_finite("ref_hidden", ref_hidden, read)
