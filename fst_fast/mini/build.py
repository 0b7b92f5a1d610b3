"""Train the mini base model from scratch: `build_base(out, seed=0)` writes a Hugging Face folder and returns its measurements.

Qwen3 architecture, 0.8M parameters, about a quarter of an hour on 2 cores. Three stages by step number, never by the
clock, so the same seed, step count and thread count give the same weights:
  lists    only list documents, from 3 edges up to 15: the model learns to look edges up, forwards and backwards;
  mixed    half lists, half answers on graphs of every size up to the mini task's;
  answers  nearly all answers at full size, the learning rate decaying to zero.
Muon (arXiv 2502.16982) for the matrices, AdamW for the rest. The initialisation makes the look-up emerge within a
minute: two heads of the first layer start as "one token back" and "two tokens back" (see _look_back). Looking up an
edge needs both, and rotary attention without biases finds them very slowly on its own; with them the matching is learned in some 200 steps.
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

from fst_fast.contracts import Task
from fst_fast.errors import UserError
from fst_fast.mini import documents, world
from fst_fast.mini.evaluate import measure_contexts
from fst_fast.mini.tokenizer import make_tokenizer
from fst_fast.tasks.registry import load_task

STEPS = 3200
_DOCUMENTS: dict[world.Kind, int] = {
    "star_graph": 12, "linked_facts": 12, "list_programs": 16, "formula_choice": 16,
}  # fmt: skip
"""Documents per step."""
_TOGETHER: tuple[tuple[world.Kind, ...], ...] = (
    ("star_graph", "linked_facts"),
    ("list_programs", "formula_choice"),
)
"""Kinds batched together because their documents have similar lengths."""
_MUON_LR, _ADAM_LR = 0.01, 2e-3
# fractions of the steps; the learning rate falls from _MIXED_UNTIL on
_DRILLS_UNTIL, _MIXED_UNTIL = (0.15, 0.4)
_ROPE_THETA, _EMBEDDING_STD = 10000.0, 0.1


def mini_task(kind: world.Kind = "star_graph", **changes: Any) -> Task:
    """The task of a kind with the settings that the shipped base model is built and measured with."""
    standard: dict[str, Any] = (
        {"form": "mini", "arms": 5, "path": 4, "ids": 40} if kind == "star_graph" else {}
    )
    task: Task = load_task(kind, {**standard, **changes})
    return task


def build_base(
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    threads: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and save into `out` (config, bf16 safetensors, tokenizer, build.json); returns the contents of build.json.

    steps: default STEPS. threads: torch's CPU threads, default 2; another number, torch version or processor type gives
    slightly different weights. Raises UserError for numbers below 1 (seed: below 0) and if `out` cannot be written."""
    steps = STEPS if steps is None else steps
    threads = 2 if threads is None else threads
    for name, value, least in (("steps", steps, 1), ("threads", threads, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"base build: {name}={value} must be at least {least}")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"base build: {out} is not empty; choose a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # fail now, not after a quarter of an hour
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
        scores = {}
        for kind in world.KINDS:
            log(kind)
            contexts = world.measured_contexts(kind)
            scores[kind] = measure_contexts(
                model, tokenizer, mini_task(kind), contexts, problems=128, seed=seed
            )
            for name, score in scores[kind].items():
                log(f"  {name:<18} {score['mean']:.3f} +- {score['stderr']:.3f}   {score['context']}")
    finally:
        torch.set_num_threads(before)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "seed": seed, "steps": steps, "threads": threads, "torch": torch.__version__, "documents_per_step": _DOCUMENTS,
        "muon_lr": _MUON_LR, "adam_lr": _ADAM_LR, "parameters": model.num_parameters(), **last,
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
    """Initialise heads 0 and 1 of the first layer (they share a key head) to attend one and two tokens back.

    A head that attends by position alone needs queries and keys that do not depend on the token. There are no biases,
    so the embeddings get a common direction, which the query and key matrices read. A query rotated back by o steps of
    the rotary frequencies matches an unrotated key at distance o. The sharpness comes from the highest frequencies and
    from query and key norms above 1."""
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
    attention.v_proj.weight.mul_(4.0)  # makes these heads' output count from the first step
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
    window: dict[world.Kind, list[tuple[float, float]]] = {kind: [] for kind in world.KINDS}
    for step in range(steps):
        done = step / steps
        for kinds in _TOGETHER:
            drawn = [(kind, document) for kind in kinds for document in _draw_documents(rng, kind, done)]
            ids, supervised = _tensors([document for _, document in drawn], tokenizer)  # [B, L], [B, L]
            tokens += ids.numel()
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, H]
            logits = model.lm_head(hidden[:, :-1][supervised[:, 1:]])  # [N, V]
            target = ids[:, 1:][supervised[:, 1:]]  # [N]
            losses = F.cross_entropy(logits, target, reduction="none")  # [N]
            of = torch.tensor([world.KINDS.index(kind) for kind, _ in drawn])  # [B]
            row = of[:, None].expand_as(supervised[:, 1:])[supervised[:, 1:]]  # [N]
            right = logits.argmax(-1) == target
            total = logits.new_zeros(())
            for kind in kinds:
                mine = row == world.KINDS.index(kind)
                mean = losses[mine].mean()
                total = total + mean / len(world.KINDS)
                window[kind].append((mean.item(), right[mine].float().mean().item()))
            total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / 50, (1.0 - done) / (1.0 - _MIXED_UNTIL))
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            means = {kind: np.mean(seen, axis=0) for kind, seen in window.items()}
            spent = time.monotonic() - began
            left = spent / (step + 1) * (steps - step - 1)
            log(
                f"step {step + 1}/{steps} {tokens / spent:.0f} tokens/s {spent:.0f} s, about {left:.0f} s left; loss (accuracy): "
                + ", ".join(f"{kind} {loss:.3f} ({accuracy:.3f})" for kind, (loss, accuracy) in means.items())
            )
            window = {kind: [] for kind in world.KINDS}
    return {
        "tokens": tokens,
        "final_loss": {kind: round(float(loss), 4) for kind, (loss, _) in means.items()},
    }


def _draw_documents(rng: np.random.Generator, kind: world.Kind, done: float) -> list[documents.Document]:
    """The documents of one kind in one step: first only drills, then half drills, finally almost none."""
    if done < _DRILLS_UNTIL:
        size = min(1.0, done / (0.7 * _DRILLS_UNTIL))
        # more documents when they are small, so that every step costs about the same
        count = round(_DOCUMENTS[kind] / max(size, 0.25))
        return [documents.drill_document(rng, kind, size) for _ in range(count)]
    share, size = (0.5, 0.0) if done < _MIXED_UNTIL else (0.1, 1.0)
    drills = rng.binomial(_DOCUMENTS[kind], share)
    return [
        documents.drill_document(rng, kind) if i < drills else documents.answer_document(rng, kind, size)
        for i in range(_DOCUMENTS[kind])
    ]


def _tensors(batch: list[documents.Document], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right (harmless under causal attention), and a mask of the tokens that count in the loss: [B, L] each."""
    prompts: list[list[int]] = tokenizer([d.prompt for d in batch])["input_ids"]
    answers: list[list[int]] = [tokenizer.convert_tokens_to_ids(d.response) for d in batch]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids: NDArray[np.int64] = np.full((len(batch), length), tokenizer.pad_token_id, dtype=np.int64)
    supervised: NDArray[np.bool_] = np.zeros((len(batch), length), dtype=bool)
    for row, (prompt, answer, document) in enumerate(zip(prompts, answers, batch, strict=True)):
        ids[row, : len(prompt) + len(answer)] = prompt + answer
        supervised[row, len(prompt) : len(prompt) + len(answer)] = document.supervised
    return torch.from_numpy(ids), torch.from_numpy(supervised)
