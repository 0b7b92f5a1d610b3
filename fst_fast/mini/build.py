"""Train the mini base model from scratch: `build_base(out, seed=0)` writes a Hugging Face folder and returns what it measured.

Qwen3 architecture, 0.8M parameters, about a quarter of an hour on 2 cores. Three stages by step number, never by the clock, so the same
seed, step count and thread count give the same weights:
  lists    only list documents, from 3 edges up to 15: the model learns to look edges up, forwards and backwards;
  mixed    half lists, half answers on graphs of every size up to the mini task's;
  answers  nearly all answers at full size, the learning rate falling to zero.
Muon (arXiv 2502.16982) for the matrices, AdamW for the rest. What makes the look-up appear within a minute is the start: two heads of the
first layer begin as "one token back" and "two tokens back" (see _look_back). Looking an edge up needs both, rotary attention without
biases finds them very slowly by itself, and from there the matching is learned in some 200 steps.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fst_fast.errors import UserError
from fst_fast.mini import documents
from fst_fast.mini.evaluate import measure_contexts
from fst_fast.mini.tokenizer import make_tokenizer
from fst_fast.tasks.star_graph import StarGraph

ARMS, PATH = 5, 4
STEPS = 3000
_DOCS_PER_STEP = 32
_MUON_LR, _ADAM_LR = 0.01, 2e-3
_LISTS_UNTIL, _MIXED_UNTIL = 0.15, 0.4  # fractions of the steps; the learning rate falls from _MIXED_UNTIL on
_ROPE_THETA, _EMBEDDING_STD = 10000.0, 0.1


def mini_task(**changes: Any) -> StarGraph:
    """The task that the shipped base is built and measured for."""
    return StarGraph(**{"form": "mini", "arms": ARMS, "path": PATH, "ids": 40, **changes})


def build_base(
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    threads: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and save into `out` (config, bf16 safetensors, tokenizer, build.json); return the content of build.json.

    steps: default STEPS. threads: torch's CPU threads, default 2; another number, torch version or kind of processor gives slightly
    different weights. Raises UserError on numbers below 1 (seed: below 0) and where `out` cannot be written.
    """
    steps = STEPS if steps is None else steps
    threads = 2 if threads is None else threads
    for name, value, least in (("steps", steps, 1), ("threads", threads, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"base build: {name}={value} must be at least {least}")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"base build: {out} is not empty; choose a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(
            dir=out
        ).close()  # an unwritable folder is refused now, not after a quarter of an hour
    except OSError as error:
        raise UserError(f"base build: cannot write into {out}: {error.strerror}") from error
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        began = time.monotonic()
        tokenizer = make_tokenizer()
        model = _new_model(tokenizer, seed)
        last = _train(model, tokenizer, seed=seed, steps=steps, log=log)
        model = model.to(torch.bfloat16).eval()
        log(f"trained {steps} steps in {time.monotonic() - began:.0f} s; measuring")
        scores = measure_contexts(model, tokenizer, mini_task(), problems=128, seed=seed)
        for name, score in scores.items():
            log(f"  {name:<16} {score['mean']:.3f} +- {score['stderr']:.3f}   {score['context']}")
    finally:
        torch.set_num_threads(before)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "seed": seed, "steps": steps, "threads": threads, "torch": torch.__version__, "docs_per_step": _DOCS_PER_STEP,
        "muon_lr": _MUON_LR, "adam_lr": _ADAM_LR, "arms": ARMS, "path": PATH, "parameters": model.num_parameters(), **last,
        "scores_at_temperature_1": scores,
    }  # fmt: skip
    (out / "build.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    _look_back(model)
    model.generation_config.do_sample = True
    return model


@torch.no_grad()
def _look_back(model: Qwen3ForCausalLM) -> None:
    """Start heads 0 and 1 of the first layer (they share a key head) as attention to the token one and two back.

    A head that attends by position alone needs queries and keys that do not depend on the token. There are no biases, so the embeddings
    get a common direction, which the query and key matrices read. A query turned back by o steps of the rotary frequencies meets an
    unturned key at distance o; the sharpness comes from the highest frequencies and from query and key norms above 1.
    """
    embedding = model.model.embed_tokens.weight  # [V, H]
    common = torch.randn(embedding.shape[1])
    embedding.copy_(_EMBEDDING_STD * (torch.randn_like(embedding) + common))
    direction = common / common.norm()
    for number, layer in enumerate(model.model.layers):
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.fill_(2.0 if number == 0 else 1.5)
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    frequency = _ROPE_THETA ** (-torch.arange(size // 2) * 2 / size)
    energy = torch.zeros(size // 2)
    energy[:6] = torch.tensor([0.30, 0.30, 0.20, 0.10, 0.06, 0.04])

    def turned_back(steps: int) -> Tensor:
        turn = steps * frequency
        return energy.sqrt().repeat(2) * torch.cat([torch.cos(turn), -torch.sin(turn)])

    for head, steps in ((0, 1), (1, 2)):
        attention.q_proj.weight[head * size : (head + 1) * size] += torch.outer(turned_back(steps), direction)
    attention.k_proj.weight[:size] += torch.outer(turned_back(0), direction)
    attention.v_proj.weight.mul_(4.0)  # what these heads carry must be heard from the first step
    attention.o_proj.weight.mul_(4.0)


def _train(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int,
    log: Callable[[str], None],
) -> dict[str, Any]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=_MUON_LR, weight_decay=0.0), _MUON_LR),
        (torch.optim.AdamW(others, lr=_ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0), _ADAM_LR),
    ]
    rng = np.random.default_rng([seed, 1])
    began, tokens = time.monotonic(), 0
    window: list[tuple[float, float]] = []
    for step in range(steps):
        done = step / steps
        batch = _draw_batch(rng, done)
        ids, supervised = _tensors(batch, tokenizer)  # [B, L], [B, L]
        tokens += ids.numel()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, H]
        logits = model.lm_head(hidden[:, :-1][supervised[:, 1:]])  # [N, V]
        target = ids[:, 1:][supervised[:, 1:]]  # [N]
        loss = F.cross_entropy(logits, target)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / 50, (1.0 - done) / (1.0 - _MIXED_UNTIL))
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        window.append((loss.item(), (logits.argmax(-1) == target).float().mean().item()))
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean_loss, accuracy = np.mean(window, axis=0)
            spent = time.monotonic() - began
            left = spent / (step + 1) * (steps - step - 1)
            log(
                f"step {step + 1}/{steps} loss {mean_loss:.4f} accuracy {accuracy:.3f} {tokens / spent:.0f} tokens/s "
                f"{spent:.0f} s, about {left:.0f} s left"
            )
            window = []
    return {"tokens": tokens, "final_loss": round(float(mean_loss), 4)}


def _draw_batch(rng: np.random.Generator, done: float) -> list[documents.Document]:
    """The documents of one step. Sizes are drawn once per step, so that rows have about the same length."""
    full = ARMS * (PATH - 1)
    if done < _LISTS_UNTIL:
        most = 3 + int((full - 3) * min(1.0, done / (0.7 * _LISTS_UNTIL)))
        edges = int(rng.integers(2, most + 1))
        count = _DOCS_PER_STEP * (6 * full + 12) // (6 * edges + 12)  # keep the tokens of a step about equal
        return [documents.list_document(rng, edges=edges) for _ in range(count)]
    if done < _MIXED_UNTIL:
        share, arms, path = 0.5, int(rng.integers(2, ARMS + 1)), int(rng.integers(3, PATH + 1))
    else:
        share, arms, path = 0.1, ARMS, PATH
    lists = rng.binomial(_DOCS_PER_STEP, share)
    return [
        documents.list_document(rng, edges=full)
        if i < lists
        else documents.answer_document(rng, arms=arms, path=path)
        for i in range(_DOCS_PER_STEP)
    ]


def _tensors(batch: list[documents.Document], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right (harmless under causal attention), and which of them count in the loss."""
    prompts: list[list[int]] = tokenizer([d.prompt for d in batch])["input_ids"]
    answers: list[list[int]] = [tokenizer.convert_tokens_to_ids(d.response) for d in batch]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids: NDArray[np.int64] = np.full((len(batch), length), tokenizer.pad_token_id, dtype=np.int64)
    supervised: NDArray[np.bool_] = np.zeros((len(batch), length), dtype=bool)
    for row, (prompt, answer, document) in enumerate(zip(prompts, answers, batch, strict=True)):
        ids[row, : len(prompt) + len(answer)] = prompt + answer
        supervised[row, len(prompt) : len(prompt) + len(answer)] = document.supervised
    return torch.from_numpy(ids), torch.from_numpy(supervised)
