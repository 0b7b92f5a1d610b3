"""Train a mini base model from scratch: `build_base(out, "mini", seed=0)` writes a Hugging Face folder and returns its measurements.

Qwen3 architecture; `mini` has 0.8M parameters, `mini_tools` 0.5M. Three stages by step number, never by the clock, so the same seed, step
count and thread count give the same weights:
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fst_fast.errors import UserError
from fst_fast.mini import documents, world
from fst_fast.mini.evaluate import measure_contexts
from fst_fast.mini.tokenizer import make_tokenizer
from fst_fast.tasks.registry import load_task


@dataclass(frozen=True)
class Recipe:
    """How a base is built. documents: per step, of each kind. together: kinds batched together because their documents have similar lengths.
    threads: torch's CPU threads. tools: its chat template has tools. least: the smallest drill's share of the tokens of the largest."""

    steps: int
    documents: Mapping[world.Kind, int]
    together: tuple[tuple[world.Kind, ...], ...]
    layers: int
    intermediate: int
    threads: int
    tools: bool = False
    least: float = 0.25


RECIPES = {
    "mini": Recipe(
        steps=3200,
        documents={"star_graph": 12, "linked_facts": 12, "list_programs": 16, "formula_choice": 16},
        together=(("star_graph", "linked_facts"), ("list_programs", "formula_choice")),
        layers=4,
        intermediate=384,
        threads=2,
    ),
    "mini_tools": Recipe(
        steps=1500,
        documents={"hidden_facts": 24},
        together=(("hidden_facts",),),
        layers=3,
        intermediate=256,
        threads=1,
        tools=True,
        least=0.5,
    ),
}
_PARTIAL, _KEPT_EVERY = "partial.pt", 50  # steps
_MUON_LR, _ADAM_LR = 0.01, 2e-3
# fractions of the steps; the learning rate falls from _MIXED_UNTIL on
_DRILLS_UNTIL, _MIXED_UNTIL = (0.15, 0.4)
_ROPE_THETA, _EMBEDDING_STD = 10000.0, 0.1


def mini_task(kind: world.Kind = "star_graph", **changes: Any) -> Any:
    """The task, or environment, of a kind with the settings that the shipped base model is built and measured with."""
    standard: dict[str, Any] = (
        {"form": "mini", "arms": 5, "path": 4, "ids": 40}
        if kind == "star_graph"
        else {"level": "easy"}
        if kind == "hidden_facts"
        else {}
    )
    return load_task(kind, {**standard, **changes})


def build_base(
    out: Path,
    base: str = "mini",
    seed: int = 0,
    steps: int | None = None,
    threads: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train and save into `out` (config, bf16 safetensors, tokenizer, build.json); returns the contents of build.json.

    base: a name in RECIPES, which has the defaults of steps and threads (torch's CPU threads); another number of threads, torch version or
    processor type gives slightly different weights. A build that was killed goes on from its last 50 steps when it is asked for again, and
    gives the same weights. Raises UserError for numbers below 1 (seed: below 0) and if `out` cannot be written."""
    recipe = RECIPES[base]
    steps = recipe.steps if steps is None else steps
    threads = recipe.threads if threads is None else threads
    for name, value, least in (("steps", steps, 1), ("threads", threads, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"base build: {name}={value} must be at least {least}")
    if out.is_dir() and any(file.stem != Path(_PARTIAL).stem for file in out.iterdir()):
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
        tokenizer = make_tokenizer(recipe.tools)
        model = _new_model(tokenizer, recipe, seed)
        same = json.dumps([base, str(recipe), seed, steps, threads, torch.__version__])
        last = _train(
            model, tokenizer, recipe, seed=seed, steps=steps, partial=out / _PARTIAL, same=same, log=log
        )
        model = model.to(torch.bfloat16).eval()
        log(f"trained {steps} steps in {time.monotonic() - began:.0f} s; measuring")
        scores = {}
        for kind in recipe.documents:
            log(kind)
            contexts = world.measured_contexts(kind)
            scores[kind] = measure_contexts(
                model, tokenizer, mini_task(kind), contexts, problems=128, seed=seed
            )
            for name, score in scores[kind].items():
                log(f"  {name:<18} {score['mean']:.3f} +- {score['stderr']:.3f}   {score['context']}")
    finally:
        torch.set_num_threads(before)
    (out / _PARTIAL).unlink(missing_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "seed": seed, "steps": steps, "threads": threads, "torch": torch.__version__, "documents_per_step": dict(recipe.documents),
        "muon_lr": _MUON_LR, "adam_lr": _ADAM_LR, "parameters": model.num_parameters(), **last,
        "scores_at_temperature_1": scores,
    }  # fmt: skip
    (out / "build.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
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
    recipe: Recipe,
    *,
    seed: int,
    steps: int,
    partial: Path,
    same: str,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """partial: where it is kept how far the training is. same: what a build must have in common with one that it continues."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.Muon(matrices, lr=_MUON_LR, weight_decay=0.0), _MUON_LR),
        (torch.optim.AdamW(others, lr=_ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0), _ADAM_LR),
    ]
    rng = np.random.default_rng([seed, 1])
    began, tokens, first = time.monotonic(), 0, 0
    if partial.is_file():
        saved = torch.load(partial, weights_only=True)
        if saved["same"] != same:
            raise UserError(
                f"base build: {partial} is of another build ({saved['same']}); remove it, or choose a new folder"
            )
        model.load_state_dict(saved["model"])
        for (optimizer, _), state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        rng.bit_generator.state = json.loads(saved["rng"])
        tokens, first = saved["tokens"], saved["step"]
        log(f"continued at step {first}")
    tokens_before = tokens
    all_kinds = list(recipe.documents)
    window: dict[world.Kind, list[tuple[float, float]]] = {kind: [] for kind in all_kinds}
    for step in range(first, steps):
        done = step / steps
        for kinds in recipe.together:
            drawn = [
                (kind, document) for kind in kinds for document in _draw_documents(rng, kind, recipe, done)
            ]
            ids, supervised = _tensors([document for _, document in drawn], tokenizer)  # [B, L], [B, L]
            tokens += ids.numel()
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, H]
            logits = model.lm_head(hidden[:, :-1][supervised[:, 1:]])  # [N, V]
            target = ids[:, 1:][supervised[:, 1:]]  # [N]
            losses = F.cross_entropy(logits, target, reduction="none")  # [N]
            of = torch.tensor([all_kinds.index(kind) for kind, _ in drawn])  # [B]
            row = of[:, None].expand_as(supervised[:, 1:])[supervised[:, 1:]]  # [N]
            right = logits.argmax(-1) == target
            total = logits.new_zeros(())
            for kind in kinds:
                mine = row == all_kinds.index(kind)
                mean = losses[mine].mean()
                total = total + mean / len(all_kinds)
                window[kind].append((mean.item(), right[mine].float().mean().item()))
            total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = min(1.0, (step + 1) / 50, (1.0 - done) / (1.0 - _MIXED_UNTIL))
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % _KEPT_EVERY == 0 or step + 1 == steps:
            means = {kind: np.mean(seen, axis=0) for kind, seen in window.items()}
            spent = time.monotonic() - began
            left = spent / (step + 1 - first) * (steps - step - 1)
            log(
                f"step {step + 1}/{steps} {(tokens - tokens_before) / spent:.0f} tokens/s {spent:.0f} s, about {left:.0f} s left; loss (accuracy): "
                + ", ".join(f"{kind} {loss:.3f} ({accuracy:.3f})" for kind, (loss, accuracy) in means.items())
            )
            window = {kind: [] for kind in all_kinds}
            if step + 1 < steps:
                state = {
                    "same": same, "step": step + 1, "tokens": tokens, "model": model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                    "rng": json.dumps(rng.bit_generator.state),
                }  # fmt: skip
                torch.save(state, unfinished := partial.with_suffix(".new"))
                unfinished.replace(partial)
    return {
        "tokens": tokens,
        "final_loss": {kind: round(float(loss), 4) for kind, (loss, _) in means.items()},
    }


def _draw_documents(
    rng: np.random.Generator, kind: world.Kind, recipe: Recipe, done: float
) -> list[documents.Document]:
    """The documents of one kind in one step: first only drills, then half drills, finally almost none."""
    per_step = recipe.documents[kind]
    if done < _DRILLS_UNTIL:
        size = min(1.0, done / (0.7 * _DRILLS_UNTIL))
        # more documents when they are small, so that every step costs about the same
        count = round(per_step / max(size, recipe.least))
        return [documents.drill_document(rng, kind, size) for _ in range(count)]
    share, size = (0.5, 0.0) if done < _MIXED_UNTIL else (0.1, 1.0)
    drills = rng.binomial(per_step, share)
    return [
        documents.drill_document(rng, kind) if i < drills else documents.answer_document(rng, kind, size)
        for i in range(per_step)
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
