"""Liger's kernels (arXiv 2410.10989) for RMSNorm, SwiGLU and rotary embedding (policy.liger), from the package liger-kernel.

Each of the three is one pass over memory instead of several. All models of a run use them (trained, frozen and sampling
ones), so that they compute the same function up to the last rounding. Attention and head are unaffected.
"""

from __future__ import annotations

import importlib.util

from torch import nn

from fst_fast import distributed
from fst_fast.errors import UserError
from fst_kernels.backends import triton_interpreted

TYPES = ("llama", "qwen2", "qwen3")  # model types that a test compares with transformers' own layers


def check() -> None:
    """Raise UserError if policy.liger is not available: the package or a GPU is missing."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("policy.liger needs the package liger-kernel: pip install 'fst-fast[liger]'")
    if distributed.device().type != "cuda" and not triton_interpreted():
        raise UserError(
            "policy.liger=true needs a GPU, and this process has none; policy.liger=false computes the same function"
        )


def install(model: nn.Module) -> None:
    """Replace the forward and backward of `model`'s layers by Liger's; weights and their names stay. Raises UserError
    for an untested model type.

    Like Liger's own interface, this also replaces the classes in transformers' module of that type: models of the type
    created later in this process use Liger's layers too."""
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    if kind not in TYPES:
        raise UserError(f"policy.liger=true: not tested for {kind}; tested are {', '.join(TYPES)}")
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(
        model,
        {
            "rope": True,
            "rms_norm": True,
            "swiglu": True,
            "cross_entropy": False,
            "fused_linear_cross_entropy": False,
        },
    )
