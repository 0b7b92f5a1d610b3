"""Log-probabilities, entropy and KL of a language model's head, straight from hidden states; logits never exist whole."""

from fst_kernels.linear_logprob.api import LogprobOutput, linear_logprob

__all__ = ["LogprobOutput", "linear_logprob"]
