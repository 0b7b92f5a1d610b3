"""A fused forward for sampling on the CPU: Llama, Qwen2 and Qwen3 in few operations per layer, with the model's own weights.

On a small model or a small batch the transformers forward costs several times its matrix products: some fifty
operations and a dozen module calls per layer, each a pass over memory.

Here a layer is ten operations around the attention. It computes the same function of the same weights, with less work:
- q, k and v are one product, gate and up are one, and the weight of the preceding norm is multiplied into them;
- rows of q and k are permuted so that the pairs that the rotary embedding rotates are adjacent, which makes it one
  complex product. Attention scores do not change under a permutation shared by q and k, and keys and values never leave
  the engine;
- the last layer of a prefill computes keys and values for every token and everything else only for the tokens whose
  logits are read.

The fused products are copies of the weights, with LoRA adapters (policy.lora) added, and are rebuilt when the weights
change. A model that is not exactly one of the three architectures as transformers ships it (other adapters, hooks,
dtypes other than float32, another device) takes the transformers forward; `unsupported_reason` says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fst_fast.policy.attention import sliding_window
from fst_fast.policy.lora import bias_of, merged_weight
from fst_kernels import cpu
from fst_kernels.backends import choose_backend

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
CHUNK_ROWS = 1024  # of one matrix product, so that intermediate results stay in a core's cache
WIDE = 2**18
"""Numbers in a weight from which on it may be the left factor of its product, whose result is [features, rows]: MKL divides that better among threads.
The product of gate and up always is, as what follows works in either layout; the others for up to FEW_ROWS rows, whose results cost little to turn."""
FEW_ROWS = 64
# their frequencies do not depend on the sequence length
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


class TokenPlan(Protocol):
    """Attention for the N tokens of a forward, in whatever arrangement the plan defines."""

    def tokens(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [N, Hq, D], k and v [N, Hkv, D] -> [N, Hq, D]"""

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor) -> Tensor:
        """Like `tokens`, but returns only the outputs of `rows` [R]: [R, Hq, D]."""


def unsupported_reason(model: Any) -> str | None:
    """Why this model needs the transformers forward, or None if CpuForward can replace it."""
    weight = model.get_output_embeddings().weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return f"the CPU forward is for float32 on the CPU, the weights are {weight.dtype} on {weight.device.type}"
    return unusual(model)


def unusual(model: Any, *, liger: bool = False) -> str | None:
    """What this model has that a fused forward does not know, or None. liger: its layers are known."""
    if type(model).__name__ not in ARCHITECTURES:
        return f"{type(model).__name__} is none of {', '.join(ARCHITECTURES)}"
    if (window := sliding_window(model.config)) is not None:
        return f"it has a sliding window of {window} tokens"
    if model.config.hidden_act != "silu":
        return f"its activation is {model.config.hidden_act}, not silu"
    if model.model.rotary_emb.rope_type not in STATIC_ROPE:
        return f"its rotary embedding is of type {model.model.rotary_emb.rope_type}"
    for name, module in model.model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
        if "forward" in vars(module) and not (liger and _of_liger(vars(module)["forward"])):
            return f"{name} has another forward than its class"
        if name.endswith("_proj") and type(getattr(module, "base_layer", module)) is not nn.Linear:
            return f"{name} is a {type(module).__name__}"
        if name.endswith(("o_proj", "gate_proj", "up_proj", "down_proj")) and bias_of(module) is not None:
            return f"{name} has a bias"
    return None


def _of_liger(forward: Any) -> bool:
    """Whether policy.liger has put this forward there; it computes the same."""
    return str(getattr(getattr(forward, "__func__", forward), "__module__", "")).startswith("liger_kernel.")


@dataclass(frozen=True)
class _Layer:
    qkv: Tensor  # [(Hq + 2 Hkv) D, H]
    qkv_bias: Tensor | None
    norms: Tensor | None  # [Hq + Hkv, D], of each query and key head
    out: Tensor  # [Hq D, H], transposed
    gate_up: Tensor  # [2 I, H]
    down: Tensor  # [I, H], transposed


def _scaled(parts: Sequence[Tensor], columns: Tensor) -> Tensor:
    """The rows [*, H] of all parts times columns [H], in one pass over memory."""
    out = columns.new_empty(sum(map(len, parts)), len(columns))
    for part, place in zip(parts, torch.split(out, [len(part) for part in parts]), strict=True):
        torch.mul(part, columns, out=place)
    return out


class CpuForward:
    """The forward of `model` with its current weights. Raises ValueError with `unsupported_reason(model)`, if there is one."""

    def __init__(self, model: Any) -> None:
        reason = unsupported_reason(model)
        if reason:
            raise ValueError(reason)
        config, rotary = model.config, model.model.rotary_emb
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.eps = float(config.rms_norm_eps)
        # the compiled kernels do in one pass over memory what torch does in several
        self.compiled = choose_backend("cascade_decode_attention", None) == "cpu"
        self.embedding = model.get_input_embeddings().weight
        self.head = model.get_output_embeddings()
        self.scale = float(model.model.layers[0].self_attn.scaling)
        self.frequencies, self.rope_scale = rotary.inv_freq.float(), float(rotary.attention_scaling)
        with torch.no_grad():
            self.final_norm = model.model.norm.weight.detach().clone()
            self.layers = [self._fuse(layer) for layer in model.model.layers]

    def _fuse(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        pair = torch.arange(self.dim).view(2, -1).t().reshape(-1)  # 0, D/2, 1, D/2 + 1, ...

        def interleaved(rows: Tensor) -> Tensor:
            return rows.view(-1, self.dim, *rows.shape[1:])[:, pair].reshape(rows.shape)

        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = map(merged_weight, projections)
        bias = None
        q_bias, k_bias, v_bias = map(bias_of, projections)
        if q_bias is not None and k_bias is not None and v_bias is not None:
            bias = torch.cat([interleaved(q_bias), interleaved(k_bias), v_bias])
        norms = None
        if hasattr(attention, "q_norm"):
            q_norm, k_norm = attention.q_norm.weight[pair], attention.k_norm.weight[pair]
            norms = torch.cat([q_norm.expand(self.heads, -1), k_norm.expand(self.kv_heads, -1)])
        return _Layer(
            qkv=_scaled([interleaved(q), interleaved(k), v], layer.input_layernorm.weight),
            qkv_bias=bias,
            norms=norms,
            out=merged_weight(attention.o_proj).t().contiguous(),
            gate_up=_scaled(
                [merged_weight(mlp.gate_proj), merged_weight(mlp.up_proj)],
                layer.post_attention_layernorm.weight,
            ),
            down=merged_weight(mlp.down_proj).t().contiguous(),
        )

    def __call__(self, ids: Tensor, positions: Tensor, plan: TokenPlan, rows: Tensor | None = None) -> Tensor:
        """Logits [R, V] of the tokens `rows` [R], or of all N tokens if rows is None. ids, positions [N]."""
        hidden = self.hidden(ids, positions, plan, rows)
        return F.linear(hidden, self.head.weight, self.head.bias)

    def hidden(self, ids: Tensor, positions: Tensor, plan: TokenPlan, rows: Tensor | None = None) -> Tensor:
        """The hidden states that the head reads: [R, H]."""
        x = F.embedding(ids, self.embedding)  # [N, H]
        angle = torch.outer(positions.float(), self.frequencies)
        rotation = torch.polar(torch.full_like(angle, self.rope_scale), angle)  # [N, D/2] complex
        for number, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, x, rotation)
            if rows is not None and number == len(self.layers) - 1:
                x = x.index_select(0, rows)
                attended = plan.last(number, q, k, v, self.scale, rows)
            else:
                attended = plan.tokens(number, q, k, v, self.scale)
            self._output_and_mlp(layer, x, attended.flatten(1))
        return self._rms_norm(x).mul_(self.final_norm)

    def _rms_norm(self, x: Tensor) -> Tensor:
        """x / rms(x), as a new tensor"""
        if self.compiled:
            return cpu.rms_norm(x, self.eps)
        mean: Tensor = torch.linalg.vecdot(x, x).div_(x.shape[-1])
        return x * mean.add_(self.eps).rsqrt_().unsqueeze(-1)

    def _qkv(self, layer: _Layer, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = self.heads + self.kv_heads
        qkv = x.new_empty(len(x), len(layer.qkv) // self.dim, self.dim)
        for (rows, rotation_rows), out in zip(
            _row_chunks(x, rotation), torch.split(qkv, CHUNK_ROWS), strict=True
        ):
            normed, flat = self._rms_norm(rows), out.flatten(1)
            if _left(layer.qkv, rows):
                flat.copy_(torch.mm(layer.qkv, normed.t()).t())
                if layer.qkv_bias is not None:
                    flat.add_(layer.qkv_bias)
            elif layer.qkv_bias is None:
                torch.mm(normed, layer.qkv.t(), out=flat)
            else:
                torch.addmm(layer.qkv_bias, normed, layer.qkv.t(), out=flat)
            self._norm_and_rotate(out[:, :both], layer.norms, rotation_rows)
        return qkv[:, : self.heads], qkv[:, self.heads : both], qkv[:, both:]

    def _norm_and_rotate(self, qk: Tensor, norms: Tensor | None, rotation: Tensor) -> None:
        """In place; rotation [N, D/2] complex"""
        if self.compiled:
            cpu.norm_and_turn(qk, norms, torch.view_as_real(rotation), self.eps)
            return
        if norms is not None:
            mean = torch.linalg.vecdot(qk, qk).div_(self.dim)
            qk.mul_(mean.add_(self.eps).rsqrt_().unsqueeze(-1)).mul_(norms)
        torch.view_as_complex(torch.unflatten(qk, -1, (-1, 2))).mul_(rotation[:, None])

    def _output_and_mlp(self, layer: _Layer, x: Tensor, attended: Tensor) -> None:
        """The attention's output projection and the MLP, added to x in place."""
        for rows, attended_rows in _row_chunks(x, attended):
            _add_product(rows, attended_rows, layer.out)
            _add_product(rows, self._gated(layer, self._rms_norm(rows)), layer.down)

    def _gated(self, layer: _Layer, x: Tensor) -> Tensor:
        """silu(gate) * up of x [N, H]: [N, I]"""
        if layer.gate_up.numel() < WIDE:
            both = F.linear(x, layer.gate_up)
            if self.compiled:
                return cpu.gate(both)
            gate, up = both.chunk(2, -1)
            return F.silu(gate).mul_(up)
        gate, up = torch.mm(layer.gate_up, x.t()).chunk(2)
        return (cpu.swiglu(gate, up) if self.compiled else F.silu(gate).mul_(up)).t()


def _left(weight: Tensor, rows: Tensor) -> bool:
    """Whether the weight is the left factor of its product with so many rows."""
    return len(rows) <= FEW_ROWS and weight.numel() >= WIDE


def _add_product(to: Tensor, x: Tensor, weight: Tensor) -> None:
    """to [N, H] += x [N, I] @ weight [I, H]"""
    if _left(weight, to):
        to.add_(torch.mm(weight.t(), x.t()).t())
    else:
        to.addmm_(x, weight)


def _row_chunks(x: Tensor, other: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Views of both tensors, CHUNK_ROWS rows at a time. Short inputs are passed on as they are, since a decode step is many small calls."""
    if len(x) <= CHUNK_ROWS:
        return [(x, other)]
    return zip(torch.split(x, CHUNK_ROWS), torch.split(other, CHUNK_ROWS), strict=True)
