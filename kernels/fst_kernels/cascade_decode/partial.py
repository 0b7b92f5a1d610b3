"""Attention over a part of the keys, with the log-sum-exp by which parts merge: what every plain path of decoding and prefill is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fst_kernels.checks import adjacent


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over part of the keys: out [B, H, Q, D] and lse [B, H, Q], in float32 at least off the CPU.

    q [B, H, Q, D], k and v [B, H, L, D], mask additive [B, 1, 1 or Q, L]. On the CPU torch's flash attention, which returns the lse
    and reads the last dimension as if its numbers lay side by side.
    """
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            adjacent(q), adjacent(k), adjacent(v), attn_mask=mask, scale=scale
        )
        return out, lse
    return plain_partial_attention(q, k, v, scale, mask)


def plain_partial_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in matrix products of float32 at least, on any device."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q.to(wide) * scale, k.to(wide).transpose(-1, -2))  # [B, H, Q, L]
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp_(), v.to(wide)), lse


@dataclass(frozen=True)
class Sight:
    """What queries see of a part of the keys, where they do not all see the same. mask: additive [B, 1, Q, L], 0 for a query that sees
    nothing, so that no softmax is taken over nothing; blind: [B, 1, Q], those queries."""

    mask: Tensor
    blind: Tensor

    @classmethod
    def of(cls, seen: Tensor, dtype: torch.dtype) -> Sight:
        """seen: [B, Q, L] bool"""
        blind = ~seen.any(-1)
        hidden = ~(seen | blind[..., None])[:, None]
        mask = torch.zeros(hidden.shape, device=seen.device, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return cls(mask, blind[:, None])


def seen_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, sight: Sight) -> tuple[Tensor, Tensor]:
    """partial_attention where queries see different keys; one that sees none has lse -inf and a finite out."""
    out, lse = partial_attention(q, k, v, scale, sight.mask)
    return out, lse.masked_fill(sight.blind, float("-inf"))
