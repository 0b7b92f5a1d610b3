"""Fused operations for policy-gradient training of language models: importable on its own, needs torch only.

Each operation is a folder with a `reference.py` (plain PyTorch on any device: the definition of what the operation means) and an
`api.py` (checks the arguments, chooses the backend). Faster backends stand beside the reference and never change the contract.
"""

from fst_kernels.backends import backends
from fst_kernels.cascade_decode import CascadePlan, cascade_decode_attention
from fst_kernels.linear_logprob import LogprobOutput, linear_logprob
from fst_kernels.linear_policy_loss import (
    PolicyObjective,
    PolicyStats,
    linear_policy_loss,
    policy_loss,
    policy_terms,
)
from fst_kernels.sampling import SampleOutput, sample_tokens
from fst_kernels.tree_attention import TreeMask, tree_attention

__all__ = [
    "CascadePlan",
    "LogprobOutput",
    "PolicyObjective",
    "PolicyStats",
    "SampleOutput",
    "TreeMask",
    "backends",
    "cascade_decode_attention",
    "linear_logprob",
    "linear_policy_loss",
    "policy_loss",
    "policy_terms",
    "sample_tokens",
    "tree_attention",
]
