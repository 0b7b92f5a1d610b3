"""Sampling of next tokens with a counter-based random number per sequence."""

from fst_kernels.sampling.api import SampleOutput, sample_tokens

__all__ = ["SampleOutput", "sample_tokens"]
