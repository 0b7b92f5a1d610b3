"""Decoding attention over a tree of keys and values: every shared segment is read once for all sequences below it."""

from fst_kernels.cascade_decode.api import cascade_decode_attention
from fst_kernels.cascade_decode.plan import CascadePlan, KVBytes

__all__ = ["CascadePlan", "KVBytes", "cascade_decode_attention"]
