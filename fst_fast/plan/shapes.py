"""The sizes of a causal language model as its config.json gives them, and the counts that follow: no weights, no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_fast import mini
from fst_fast.errors import UserError

# What sets an architecture apart from Llama's, which every other one is taken for.
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "gemma3_text": {"qk_norm": True, "norms": 4},
}
OPTIONAL = (
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Shape:
    """A decoder of `layers` times attention and gated MLP. Widths are in elements, counts in parameters."""

    model_type: str
    hidden: int
    inner: int  # of the MLP, of one expert in a mixture
    layers: int
    heads: int
    kv_heads: int
    dim: int  # of a head
    vocabulary: int
    tied: bool  # input and output embeddings are one matrix
    qk_norm: bool = False
    qkv_bias: bool = False
    norms: int = 2  # of the hidden width, per layer
    experts: int = 1
    active: int = 1  # experts that a token goes through
    assumption: str | None = None  # one sentence, of an architecture that is not known

    @property
    def q_width(self) -> int:
        return self.heads * self.dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.dim

    @property
    def attention_weights(self) -> int:
        """Of the four products of a layer."""
        return self.hidden * (2 * self.q_width + 2 * self.kv_width)

    @property
    def token_weights(self) -> int:
        """Of the products of one layer that one token goes through."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.attention_weights + router + self.active * 3 * self.hidden * self.inner

    @property
    def layer_weights(self) -> int:
        """Of the products of one layer."""
        router = self.hidden * self.experts if self.experts > 1 else 0
        return self.attention_weights + router + self.experts * 3 * self.hidden * self.inner

    @property
    def small(self) -> int:
        """Parameters of one layer outside its products: norms and biases."""
        bias = self.q_width + 2 * self.kv_width if self.qkv_bias else 0
        return self.norms * self.hidden + (2 * self.dim if self.qk_norm else 0) + bias

    @property
    def embedding(self) -> int:
        """Parameters of one embedding, the largest tensor of most models."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return (
            self.layers * (self.layer_weights + self.small)
            + self.embedding * (1 if self.tied else 2)
            + self.hidden
        )

    def kv_elements(self) -> int:
        """Keys and values of one token, all layers."""
        return 2 * self.layers * self.kv_width

    def adapter_parameters(self, rank: int, targets: Sequence[str]) -> int:
        """Of low-rank adapters on these linear layers."""
        q, kv, h, i = self.q_width, self.kv_width, self.hidden, self.inner
        ends = {
            "q_proj": h + q, "k_proj": h + kv, "v_proj": h + kv, "o_proj": q + h,
            "gate_proj": self.experts * (h + i), "up_proj": self.experts * (h + i), "down_proj": self.experts * (h + i),
        }  # fmt: skip
        return self.layers * rank * sum(ends.get(name, 0) for name in targets)


def shape_of(tree: dict[str, Any], where: str) -> Shape:
    """The shape that the content of a config.json describes. where: how errors name it. Raises UserError."""
    text = tree["text_config"] if isinstance(tree.get("text_config"), dict) else tree
    kind = str(text.get("model_type", "unknown"))
    optional = [key for key in OPTIONAL if text.get(key) is not None]
    wrong = [
        key for key in (*NEEDED, *optional) if type(text.get(key)) is not int or not 1 <= text[key] < 2**40
    ]
    if wrong:
        raise UserError(
            f"{where}: its config.json has no usable {', '.join(wrong)}; a plan needs {', '.join(NEEDED)} as positive integers"
        )
    heads = text["num_attention_heads"]
    special = dict(KNOWN.get(kind, {}))
    assumption = None
    if kind not in KNOWN:
        assumption = (
            f"model_type={kind} is not known to fst plan; it is taken for a decoder like Llama's, with the sizes in its config.json "
            f"(known: {', '.join(KNOWN)})"
        )
    if text.get("attention_bias"):
        special["qkv_bias"] = True
    experts = int(text.get("num_experts") or text.get("num_local_experts") or 1)
    return Shape(
        model_type=kind,
        hidden=text["hidden_size"],
        inner=int(text.get("moe_intermediate_size") or text["intermediate_size"])
        if experts > 1
        else text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=int(text.get("num_key_value_heads") or heads),
        dim=int(text.get("head_dim") or text["hidden_size"] // heads),
        vocabulary=text["vocab_size"],
        tied=bool(tree.get("tie_word_embeddings", text.get("tie_word_embeddings", kind == "gemma3_text"))),
        experts=experts,
        active=int(text.get("num_experts_per_tok") or 1),
        assumption=assumption,
        **special,
    )


def local_folder(path: str) -> Path | None:
    """The folder of a model that lies here, weights or none; None: there is no config.json of that name."""
    folder = mini.path(path) if path in mini.BASES else Path(path).expanduser()
    return folder if (folder / "config.json").is_file() else None


def read_shape(folder: Path, path: str) -> Shape:
    """The shape of the model in `folder`. path: how errors name it. Raises UserError."""
    where = f"model.path={path!r}"
    try:
        tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: its config.json cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where}: its config.json holds a {type(tree).__name__}, not an object")
    return shape_of(tree, where)
