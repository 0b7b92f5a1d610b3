"""Small models with chat templates that have tools, in the style of Qwen and Llama, and a policy that says what a test tells it to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fst_fast.config import Config
from fst_fast.contracts import Rollout
from tests.fst_fast.families import make

QWEN = """{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}\
{{- '# Tools\\n\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}\
{{- '\\n</tools>\\n\\nReturn each call as JSON within <tool_call></tool_call> tags.<|im_end|>\\n' }}\
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content and strips is defined else m.content %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
THINKS = "{%- set strips = true %}" + QWEN
"""Thoughts are stripped from earlier turns, as by Qwen3's own."""

LLAMA = """{{ bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- endif %}\
{%- if tools %}{{- '\\nCall a function with {"name": ..., "parameters": {...}}.' }}{%- for t in tools %}{{- '\\n' + t | tojson }}{%- endfor %}{%- endif %}{{- '<|eot_id|>' }}\
{%- for m in messages %}{%- if m.role in ('tool', 'ipython') %}{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}\
{%- elif m.role != 'system' %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}{#- "parameters" <|python_tag|> #}"""

TEMPLATES = {"qwen": QWEN, "thinks": THINKS, "llama": LLAMA}


def tokenizer_of(name: str) -> Any:
    if name == "llama":
        return make("llama3", LLAMA)
    tokenizer = make("qwen3", TEMPLATES[name])
    tokenizer.add_tokens([AddedToken(w, normalized=False) for w in ("<tool_call>", "</tool_call>")])
    return tokenizer


def save_model(folder: Path, name: str, seed: int = 0) -> Path:
    """A folder with a tiny random model and the tokenizer and template `name`."""
    tokenizer = tokenizer_of(name)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 4096,
    }  # fmt: skip
    torch.manual_seed(seed)
    model: Any = (
        LlamaForCausalLM(LlamaConfig(**shape)) if name == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    )
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)  # far from uniform
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(folder: Path | str, task: str, **more: Any) -> Config:
    """A run on the model in `folder`; more: sections."""
    rollout = {"max_prompt_tokens": 2000, "max_response_tokens": 400, **more.pop("rollout", {})}
    slow = {"tokens_per_micro_batch": 8192, **more.pop("slow", {})}
    tree = {"model": {"path": str(folder)}, "task": task, "method": "rl", "rollout": rollout, "slow": slow}
    return Config.model_validate({**tree, **more})


class Scripted:
    """An engine whose policy says say(problem id, turn, sample). "" ends without the end token, as a cut response does."""

    def __init__(self, tokenizer: Any, say: Callable[[str, int, int], str], limit: int = 10**6) -> None:
        self.tokenizer, self.say, self.limit = tokenizer, say, limit
        self.eos_ids = (tokenizer.eos_token_id,)
        self.read: list[Sequence[int]] = []
        self._turn: dict[tuple[str, int], int] = {}

    def generate(self, requests: Any, **how: Any) -> list[Rollout]:
        out = []
        for r in requests:
            key = r.problem_id, r.sample
            turn = self._turn[key] = self._turn.get(key, -1) + 1
            self.read.append(r.prompt_ids.tolist())
            ids = self.tokenizer(self.say(r.problem_id, turn, r.sample), add_special_tokens=False)[
                "input_ids"
            ]
            whole = len(ids) < self.limit
            ids = np.array([*ids, self.eos_ids[0]] if whole else ids[: self.limit], np.int64)
            logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32)
            out.append(
                Rollout(
                    r.problem_id, r.context_id, r.sample, ids, logprobs, "stop" if whole else "length",
                    how["policy_version"], how["temperature"],
                )
            )  # fmt: skip
        return out
