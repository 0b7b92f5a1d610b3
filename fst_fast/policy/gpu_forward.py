"""A fused forward for sampling on a GPU: Llama, Qwen2 and Qwen3 in nine launches per layer around the attention, with the model's own weights.

An eager layer of transformers is about 60 launches, 25 ms a decode step in 36 layers, where the memory needs 8 to 13. Here q, k and v are one
product, gate and up are one, and what lies between the products is one kernel each (fst_kernels/gpu.py), rounded where transformers' layers round. The
residual is added by the product itself.

The fused products share the memory of the model's weights wherever these lie side by side, or can be laid so. Weights inside a larger tensor (ZeRO's)
that have something else between them are copied, and the copies are rebuilt when the weights change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fst_fast.policy.cpu_forward import TokenPlan, unusual
from fst_fast.policy.lora import has_adapters
from fst_kernels.backends import choose_backend


def unsupported_reason(model: Any) -> str | None:
    """Why this model needs the transformers forward, or None if GpuForward can replace it."""
    weight = model.get_output_embeddings().weight
    if weight.device.type != "cuda":
        return f"the GPU forward is for a GPU, the weights are on {weight.device.type}"
    backend = choose_backend("cascade_decode_attention", None, weight.device, weight.dtype)
    if backend != "triton":
        return f"its kernels are Triton's, and this GPU runs {backend}"
    if has_adapters(model):
        return "it has adapters, and weights that they are merged into would be a second model"
    return unusual(model, liger=True)


@dataclass(frozen=True)
class _Layer:
    norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2 Hkv) D, H]
    qkv_bias: Tensor | None
    norms: Tensor | None  # [Hq + Hkv, D], of each query and key head
    out: Tensor  # [H, Hq D]
    norm2: Tensor  # [H]
    gate_up: Tensor  # [2 I, H]
    down: Tensor  # [H, I]


class GpuForward:
    """The forward of `model`, which `unsupported_reason` has nothing against."""

    def __init__(self, model: Any) -> None:
        from fst_kernels import gpu  # only here: it needs triton

        self.gpu, config = gpu, model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.eps = float(config.rms_norm_eps)
        self.embedding = model.get_input_embeddings().weight
        self.head = model.get_output_embeddings()
        self.rotary, self.final_norm = model.model.rotary_emb, model.model.norm.weight
        self.scale = float(model.model.layers[0].self_attn.scaling)
        with torch.inference_mode(False), torch.no_grad():  # the weights may move, and are trained later
            self.layers = [self._fuse(layer) for layer in model.model.layers]

    def _fuse(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [p.bias for p in projections if p.bias is not None]
        norms = None
        if hasattr(attention, "q_norm"):
            each = (
                attention.q_norm.weight.expand(self.heads, -1),
                attention.k_norm.weight.expand(self.kv_heads, -1),
            )
            norms = torch.cat(each)
        return _Layer(
            norm=layer.input_layernorm.weight,
            qkv=joined([p.weight for p in projections]),
            qkv_bias=torch.cat(biases) if biases else None,
            norms=norms,
            out=attention.o_proj.weight,
            norm2=layer.post_attention_layernorm.weight,
            gate_up=joined([mlp.gate_proj.weight, mlp.up_proj.weight]),
            down=mlp.down_proj.weight,
        )

    def __call__(self, ids: Tensor, positions: Tensor, plan: TokenPlan, rows: Tensor | None = None) -> Tensor:
        """Logits [R, V] of the tokens `rows` [R], or of all N tokens if rows is None, as the output layer gives them. ids, positions [N]."""
        gpu = self.gpu
        x = F.embedding(ids, self.embedding)  # [N, H]
        cos, sin = (part[0] for part in self.rotary(x, positions[None]))  # [N, D]
        both = self.heads + self.kv_heads
        for number, layer in enumerate(self.layers):
            normed = gpu.rms_norm(x, layer.norm, self.eps)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(x), -1, self.dim)
            gpu.norm_and_turn(qkv[:, :both], layer.norms, cos, sin, self.eps)
            q, k, v = qkv[:, : self.heads], qkv[:, self.heads : both], qkv[:, both:]
            if rows is not None and number == len(self.layers) - 1:
                x = x.index_select(0, rows)
                attended = plan.last(number, q, k, v, self.scale, rows)
            else:
                attended = plan.tokens(number, q, k, v, self.scale)
            x.addmm_(attended.flatten(1), layer.out.t())
            gate_up = F.linear(gpu.rms_norm(x, layer.norm2, self.eps), layer.gate_up)
            x.addmm_(gpu.gate(gate_up), layer.down.t())
        logits: Tensor = self.head(gpu.rms_norm(x, self.final_norm, self.eps))
        return logits


def joined(weights: Sequence[Tensor]) -> Tensor:
    """The weights [n_i, H] as one [sum n_i, H]: without a copy where they lie side by side in memory, or own their memory and can move there."""
    first = weights[0]
    rows, width = [len(w) for w in weights], first.shape[1]
    begins = [sum(rows[:i]) * width for i in range(len(rows))]
    side_by_side = all(
        w.is_contiguous()
        and w.untyped_storage()._cdata == first.untyped_storage()._cdata
        and w.storage_offset() == first.storage_offset() + begin
        for w, begin in zip(weights, begins, strict=True)
    )
    if side_by_side:
        return first.detach().as_strided((sum(rows), width), (width, 1), first.storage_offset())
    whole = torch.cat([w.detach() for w in weights])
    if all(isinstance(w, torch.nn.Parameter) and w.untyped_storage().nbytes() == w.nbytes for w in weights):
        for weight, part in zip(weights, torch.split(whole, rows), strict=True):
            weight.data = part
    return whole
