"""Policy-gradient losses over the head of a language model: fused with the head, or composed on the output of linear_logprob."""

from fst_kernels.linear_policy_loss.api import linear_policy_loss, policy_loss
from fst_kernels.linear_policy_loss.objective import PolicyObjective, PolicyStats, PolicyTerms, policy_terms

__all__ = [
    "PolicyObjective",
    "PolicyStats",
    "PolicyTerms",
    "linear_policy_loss",
    "policy_loss",
    "policy_terms",
]
