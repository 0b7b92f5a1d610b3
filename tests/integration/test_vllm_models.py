"""Model families on a real vLLM (`make vllm`): its greedy tokens are those of transformers, and it takes weights that training has moved.

Two are random; SmolLM2 and Qwen2.5-Coder are those of scripts/fetch_model.py, in the folders that FST_MODELS names.
"""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fst_fast.config import Config
from fst_fast.policy.attention import load_model
from fst_fast.policy.trained import load
from fst_fast.rollout.engine import Request
from fst_fast.rollout.vllm import VllmEngine
from fst_fast.rollout.vllm_args import vllm_args
from fst_fast.rollout.vllm_hosts import Hosts, Weights
from tests.fst_fast import families
from tests.fst_fast.vllm_exchanges import SAMPLING

REAL = os.environ.get("FST_VLLM")
FETCHED = {Path(folder).name: Path(folder) for folder in shlex.split(os.environ.get("FST_MODELS", ""))}
TEXTS = (
    "The capital of France is",
    "def add(a, b):\n    ",
    "One, two, three, four, five, six, seven,",
    "Water boils at",
)
NEW_TOKENS, STEPS = 24, 3

pytestmark = pytest.mark.skipif(REAL is None, reason="FST_VLLM names no vLLM; `make vllm` does")


FARTHEST = 3e-4
"""No log-prob of a right server is farther from float64, nats. vLLM 0.32 on a CPU with Qwen2.5-Coder-0.5B: up to 2.0e-4, tokens alike."""


def random_model(family: str, folder: Path) -> Path:
    """A small model whose logits lie apart, so that greedy tokens do not hang on rounding. Its head is tied (qwen3) or its own (llama3)."""
    tokenizer = families.make(family)
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.2, "tie_word_embeddings": family == "qwen3",
    }  # fmt: skip
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**shape))
        if family == "qwen3"
        else LlamaForCausalLM(LlamaConfig(**shape))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def started(folder: Path, tmp_path: Path) -> Config:
    """A run that starts a server of this model."""
    args = {
        "command": [REAL], "args": ["--enforce-eager"], "env": {"VLLM_CPU_KVCACHE_SPACE": "1"}, "folder": str(tmp_path), "max_mismatch": 1e-4, "start_timeout_s": 1800,
    }  # fmt: skip
    return Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "rollout": {"backend": "vllm", "backend_args": args},
        }
    )


@pytest.fixture(params=["qwen3", "llama3", "smollm2-135m", "qwen2.5-coder-0.5b"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param in ("qwen3", "llama3"):
        return random_model(request.param, tmp_path / "model")
    if request.param not in FETCHED:
        pytest.skip(f"FST_MODELS names no folder {request.param}; `make vllm` fetches it")
    return FETCHED[request.param]


@contextmanager
def served(config: Config, probe_ids: list[int], tmp_path: Path) -> Iterator[Hosts]:
    said: list[str] = []
    ids = np.array(probe_ids)
    hosts = Hosts(vllm_args(config), config, longest=256, probe_ids=ids, pad_id=0, note=said.append)
    try:
        hosts.enter(tmp_path)
        yield hosts
    finally:
        hosts.close()
    assert said == []


def greedy(hosts: Hosts, prompt: list[int]) -> tuple[list[int], list[float]]:
    """The server's own tokens and their log-probs; nothing of the model's generation config, which may penalise repetition."""
    how = {**SAMPLING, "max_tokens": NEW_TOKENS, "stop_token_ids": [], "ignore_eos": True}
    body = {"token_ids": prompt, "sampling_params": how, "return_token_ids": True}
    (choice,) = hosts.clients[0].post("/inference/v1/generate", body)["choices"]
    assert len(choice["token_ids"]) == NEW_TOKENS
    # Greedy, vLLM's processed log-probs are 0: those of temperature 1 are asked for as a prompt's.
    scored = {**how, "temperature": 1.0, "max_tokens": 1, "prompt_logprobs": 0}
    body = {"token_ids": prompt + choice["token_ids"], "sampling_params": scored}
    rows = hosts.clients[0].post("/inference/v1/generate", body)["prompt_logprobs"][len(prompt) :]
    ids = choice["token_ids"]
    return ids, [row[str(i)]["logprob"] for row, i in zip(rows, ids, strict=True)]


@torch.no_grad()
def expected(plain: Any, prompt: list[int], ids: list[int]) -> tuple[list[int], list[float], float]:
    """What greedy decoding by transformers gives, the log-probs of `ids` after the prompt in float64, and the largest error that float32 has in transformers."""
    asked = torch.tensor([prompt])
    how = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    found = plain.generate(asked, attention_mask=torch.ones_like(asked), **how)[0, len(prompt) :].tolist()

    def logprobs(model: Any) -> torch.Tensor:
        rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(rows.double(), -1)[range(len(ids)), ids]

    exact = logprobs(copy.deepcopy(plain).double())
    return found, exact.tolist(), float((logprobs(plain) - exact).abs().max())


def train(plain: Any, prompts: list[list[int]]) -> None:
    """A few steps away from the model's own continuation, by plain gradient descent, each of the same length."""
    weights = [p for p in plain.parameters() if p.requires_grad]
    for _ in range(STEPS):
        ids = torch.tensor([prompts[0][::-1] * 3])
        plain(ids, labels=ids).loss.backward()
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        with torch.no_grad():
            for weight in weights:
                if weight.grad is not None:
                    weight -= 0.5 * weight.grad / norm
                    weight.grad = None


def test_tokens_and_log_probs_are_those_of_transformers_before_and_after_training(
    folder: Path, tmp_path: Path
) -> None:
    config = started(folder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    plain: Any = load_model(folder, torch.float32, attention="sdpa").eval()
    own = load(config)
    kept, beyond = [], 0.0
    with served(config, prompts[2], tmp_path) as hosts:
        for step in (0, STEPS):
            if step:
                train(plain, prompts)
                own.load_state_dict(plain.state_dict())
            hosts.prepare(Weights(own, step))
            assert hosts.mismatch is not None
            assert hosts.mismatch < 1e-4
            for prompt in prompts:
                ids, logprobs = greedy(hosts, prompt)
                same, exact, rounding = expected(plain, prompt, ids)
                assert ids == same
                error = float(np.abs(np.subtract(logprobs, exact)).max())
                assert error < FARTHEST
                beyond = max(beyond, error if error > max(1e-4, 2 * rounding) else 0.0)
                kept.append(ids)
    before, after = kept[: len(prompts)], kept[len(prompts) :]
    assert before != after, "training has moved nothing that the tokens show"
    if beyond and folder.name.startswith("qwen2.5"):
        pytest.xfail(f"vLLM's float32 is {beyond:.1e} nats from float64, transformers' a tenth of that")
    assert not beyond


def test_more_prompts_than_a_batch_holds_are_sampled_without_a_restart(tmp_path: Path) -> None:
    """vLLM computes 2,048 tokens at once, and on a CPU must not begin a prompt that it cannot end: managed_server.WHOLE_PROMPTS."""
    folder = random_model("qwen3", tmp_path / "model")
    config = started(folder, tmp_path)
    own: Any = load(config)
    size = own.config.vocab_size
    rng = np.random.default_rng(0)
    requests = [Request(f"p{i}", "c", 0, rng.integers(10, size, 100 + i), seed=2**40 + i) for i in range(48)]
    with served(config, requests[0].prompt_ids.tolist(), tmp_path) as hosts:
        engine = VllmEngine(
            hosts, own, base=True, eos_ids=[5], stop=(), vocab_size=size, decode=str, encode=lambda _: [1]
        )
        engine.prepare(0)
        rollouts = engine.generate(requests, max_response_tokens=4, temperature=1.0, policy_version=0)
        assert hosts.generation == 0
    assert all(len(r.response_ids) == 4 or r.finish == "stop" for r in rollouts)
