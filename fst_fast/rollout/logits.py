"""Logits of a 16-bit model in float32, as they are sampled from.

A logit near 20 has a spacing of 0.125 in bfloat16, and the log-prob of a sampled token is the denominator of the importance ratio. The product sums in
float32 anyhow: it is asked not to round its sums. What the model does to its logits afterwards (a soft-cap, a scale) is then float32 too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def float32_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., H] times weight [V, H], plus bias, all of one 16-bit type -> [..., V] in float32."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.is_cuda:
        out = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    else:  # the CPU has no such product
        out = torch.mm(rows.float(), weight.t().float())
    if bias is not None:
        out += bias
    return out.view(*x.shape[:-1], -1)


@contextmanager
def float32_logits(model: Any) -> Iterator[None]:
    """While open, the model's output layer gives float32. An output layer that is no plain nn.Linear (with adapters, quantised) keeps its own product."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    module: Any = head
    before = vars(module).get("forward")
    module.forward = lambda x: float32_product(x, module.weight, module.bias)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
