"""Liger's kernels (arXiv 2410.10989) in place of transformers' RMSNorm, SwiGLU and rotary embedding (policy.liger). By the package liger-kernel.

Each of the three is one pass over memory there, and several in transformers. All models of a run take them, trained, frozen and sampling ones, so
that they compute the same function to the last rounding. Attention and the head stay ours.
"""

from __future__ import annotations

import importlib.util

from torch import nn

from fst_fast import distributed
from fst_fast.errors import UserError
from fst_kernels.backends import triton_interpreted

TYPES = ("llama", "qwen2", "qwen3")  # model types that a test has compared with transformers' own layers


def check() -> None:
    """Raise UserError where policy.liger cannot be had: the package or a GPU is missing."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError("policy.liger needs the package liger-kernel: pip install 'fst-fast[liger]'")
    if distributed.device().type != "cuda" and not triton_interpreted():
        raise UserError(
            "policy.liger=true needs a GPU, and this process has none; policy.liger=false computes the same function"
        )


def install(model: nn.Module) -> None:
    """Give the layers of `model` Liger's forward and backward; weights and their names stay. Raises UserError for a type that was not tested.

    Liger also replaces the classes in transformers' module of that type, as its own interface does: models of it made later in this process have its layers too.
    """
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
