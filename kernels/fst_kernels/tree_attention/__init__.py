"""Attention over a forest of sequences that share prefixes."""

from fst_kernels.tree_attention.api import tree_attention
from fst_kernels.tree_attention.mask import TreeMask

__all__ = ["TreeMask", "tree_attention"]
