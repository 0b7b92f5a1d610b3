"""Tree attention inside unmodified transformers models, and how those models are loaded.

transformers selects a model's attention function by name. The one registered here as "fst" passes q, k and v to the
`plan` given to the model's forward:

    model(input_ids=..., position_ids=..., plan=plan, use_cache=False)

A plan defines which tokens attend to which. Training and scoring use TreePlan (a whole forest at once); rollouts use
plans that also store keys and values. So one model object serves training, prefill and decoding. No mask function is
registered under this name, so transformers never builds a mask tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from fst_fast.errors import UserError
from fst_fast.forest import Forest
from fst_fast.policy.base_model import first_line, model_folder, read_config
from fst_fast.policy.gguf import refuse_missing
from fst_kernels.tree_attention import TreeMask, tree_attention

NAME = "fst"
Attention = Literal["tree", "sdpa", "flash_attention_2"]


class AttentionPlan(Protocol):
    """The attention of one forward. `layer` counts from 0; q [B,Hq,N,D], k and v [B,Hkv,N,D], rotary embedding applied.

    A plan that supports sliding windows has the attribute `windows = True`. Its `attend` then takes the keyword
    `window` (int) in layers with a window: a token attends to itself and to the window - 1 tokens before it on its path."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor: ...  # [B,N,Hq,D]


class TreePlan:
    """Every token of a forest attends to itself and its ancestors. One plan serves all layers, forward and backward."""

    windows = True

    def __init__(
        self, subtree_end: Tensor, *, depth: Tensor | None = None, device: torch.device | str | None = None
    ) -> None:
        """subtree_end int32 [N] or [B, N]; see TreeMask.from_subtree_end."""
        self.mask = TreeMask.from_subtree_end(subtree_end, depth=depth, device=device)

    @classmethod
    def of(cls, forest: Forest, device: torch.device | str) -> TreePlan:
        """Check and analyse the forest on the host, then send the mask to the device, without synchronising with it."""
        end, depth = (torch.from_numpy(x) for x in (forest.subtree_end, forest.depth))
        return cls(end, depth=depth, device=device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        return tree_attention(q, k, v, self.mask, scale=scale, window=window).transpose(1, 2)

    def tokens(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """For CpuForward: one row of N tokens. q [N,Hq,D], k and v [N,Hkv,D] -> [N,Hq,D]."""
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return tree_attention(q, k, v, self.mask, scale=scale)[0].transpose(0, 1)

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Tensor) -> Tensor:
        """Like `tokens`, but returns only the outputs of `rows` [R]: [R,Hq,D]."""
        return self.tokens(layer, q, k, v, scale).index_select(0, rows)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    plan: AttentionPlan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer."""
    if plan is None:
        raise UserError(
            "this model was loaded with policy.attention=tree and was called without a plan; pass plan=TreePlan(...)"
        )
    unsupported = {"attention_mask": attention_mask, "softcap": softcap, "s_aux": s_aux}
    unsupported["dropout"] = dropout or None
    for name, given in unsupported.items():
        if given is not None:
            raise UserError(
                f"{type(module).__name__} asks for {name}, which policy.attention=tree does not support; {PADDED_HINT}"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    more = {}
    if sliding_window is not None:
        if not getattr(plan, "windows", False):
            raise UserError(
                f"{type(module).__name__} has a sliding window of {sliding_window} tokens, which a {type(plan).__name__} does not support; {PADDED_HINT}"
            )
        more["window"] = sliding_window
    return plan.attend(int(module.layer_idx), query, key, value, scale, **more), None  # type: ignore[arg-type]


# No mask function is registered under this name. So transformers builds no mask and does not search position_ids for
# packed sequences, which would synchronise with the device in every forward.
AttentionInterface.register(NAME, _attention)

PADDED_HINT = "use policy.packing=padded with policy.attention=sdpa"


def load_model(
    path: str | Path,
    dtype: torch.dtype | str,
    *,
    attention: Attention,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model. path, revision: as `model.path` and `model.revision`, see base_model.py.

    dtype: torch.float32, "bfloat16", ... attention="tree" takes the plan of each forward (see above); the others are
    transformers' own. Raises UserError if there is no model, and, with "tree", for architectures that cannot be packed."""
    folder = model_folder(path, revision)
    config = read_config(folder, path, trust_remote_code=trust_remote_code)
    if attention == "tree":
        reason = unpackable_reason(config)
        if reason:
            raise UserError(
                f"model.path={str(path)!r}: {config.model_type} cannot be packed as a forest: {reason}; {PADDED_HINT}"
            )
    implementation = NAME if attention == "tree" else attention
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=kind,
            attn_implementation=implementation,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except ImportError as error:
        raise UserError(
            f"policy.attention={attention} cannot run here: {first_line(error)}; sdpa runs everywhere"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # RuntimeError: weights of another shape
        raise UserError(f"model.path={str(path)!r} cannot be loaded: {first_line(error)}") from error
    refuse_missing(loading, f"model.path={str(path)!r}")
    found: PreTrainedModel = model
    return found


# Architectures (model_type) whose loss and gradients a test compares with the padded pass. Others may compute something else.
PACKABLE = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def unpackable_reason(config: PreTrainedConfig) -> str | None:
    """Why a model with this config cannot be packed as a forest, or None. Needs the config only, no weights."""
    text = config.get_text_config()
    other = sorted(set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if other:
        return f"it has layers of type {', '.join(other)}"
    for key in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(text, key, None) is not None:
            return f"it caps attention scores ({key}={getattr(text, key)})"
    if getattr(text, "v_head_dim", None) is not None:
        return f"its value heads have a size of their own (v_head_dim={text.v_head_dim})"
    if getattr(text, "attention_dropout", 0.0):
        return f"it drops attention weights (attention_dropout={text.attention_dropout})"
    if getattr(text, "use_bidirectional_attention", False):
        return "its attention is bidirectional (use_bidirectional_attention)"
    if config.model_type == "gpt_oss":
        return "it has attention sinks"
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and getattr(model_class, "_is_stateful", False):
        return "it carries a recurrent state (state space)"
    if model_class is not None and not model_class._supports_attention_backend:
        return "its attention cannot be swapped in transformers"
    if config.model_type not in PACKABLE:
        return f"it has not been tested as a forest; tested are {', '.join(PACKABLE)}"
    return None


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The sliding window of this model's layers, in tokens; None if no layer has one."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    if window is None or not getattr(text, "use_sliding_window", True):
        return None
    types = getattr(text, "layer_types", None)
    return int(window) if not types or "sliding_attention" in types else None
