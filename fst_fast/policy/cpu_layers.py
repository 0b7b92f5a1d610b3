"""RMSNorm, SwiGLU and rotary embedding of a model in training on the CPU, each one pass over memory, forward and backward.

transformers makes five to eight passes of each, and keeps what it makes on the way for the backward. The kernels are csrc/cpu/rows.cpp, in
float32; the function is the same up to the last rounding. Matrix products, attention and head are unaffected. It is to the CPU what `liger.py`
is to a GPU.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from fst_kernels import cpu
from fst_kernels.backends import choose_backend

TYPES = ("llama", "qwen2", "qwen3")  # model types that a test compares with transformers' own layers


def install(model: Any) -> None:
    """Let the norms, the MLPs and the attention of `model` use the kernels, if it is one of TYPES, in float32 on the CPU, and they can be
    compiled here; weights and their names stay. Else nothing changes."""
    weight = model.get_output_embeddings().weight
    if (
        model.config.model_type not in TYPES
        or (weight.device.type, str(weight.dtype)) != ("cpu", "torch.float32")
        or model.config.hidden_act != "silu"
        or choose_backend("cascade_decode_attention", None) != "cpu"
    ):
        return
    for module in model.modules():
        kind: Any = type(module)
        name = kind.__name__
        if name.endswith("RMSNorm"):
            _derive(module, _norm)
        elif name.endswith("MLP"):
            _derive(module, _mlp)
        elif name.endswith("Attention"):
            _derive(module, _attention(kind))


def _derive(module: nn.Module, forward: Any) -> None:
    """Make the module one of a class derived from its own, of the same name, with another forward."""
    kind: Any = type(module)
    module.__class__ = _derived(kind, forward)


@functools.cache
def _derived(kind: Any, forward: Any) -> Any:
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


@functools.cache
def _attention(kind: Any) -> Any:
    """The forward of an attention class, with `_rotate` under the name by which it calls the rotary embedding."""
    code = kind.forward
    names = {**code.__globals__, "apply_rotary_pos_emb": _rotate}
    return types.FunctionType(code.__code__, names, code.__name__, code.__defaults__, code.__closure__)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return cpu.norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    out: Tensor = self.down_proj(cpu.swiglu(self.gate_proj(x), self.up_proj(x)))
    return out


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' apply_rotary_pos_emb: q, k [B, heads, T, D], cos, sin [B or 1, T, D]."""
    cos, sin = (x.expand(len(q), -1, -1).flatten(0, 1).contiguous() for x in (cos, sin))

    def rotated(x: Tensor) -> Tensor:
        batch, heads, tokens, dim = x.shape
        by_token = x.transpose(1, 2).reshape(batch * tokens, heads, dim)
        return cpu.rotate(by_token, cos, sin).view(batch, tokens, heads, dim).transpose(1, 2)

    return rotated(q), rotated(k)
