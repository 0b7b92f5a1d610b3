"""Forward + backward of one training batch: the forest against the padded batch, each at its best micro-batch size, in one run.

The batch is 4 contexts x 256 tokens, 8 problems x 48, 4 samples of 32 tokens for every (context, problem): 128 sequences. The model is a
Qwen3 of hidden 256, 4 layers, 8/4 heads, in float32. Both sides run the same transformers model and the same cross-entropy over the
labelled rows only; they differ in packing and attention. The padded side has no padding at all here (equal lengths) and uses causal
scaled-dot-product attention without a mask, its fastest path.

    python benchmarks/training_step.py [--threads 2] [--rounds 5] [--context 256] [--write]

The sweep times each candidate once after a warm-up; then the two winners run in turn, and the medians are compared, in seconds and in
CPU seconds (the figure to trust where other programs share the machine, and then with --threads 1: waiting threads spin). The ratio of
operations (multiply-adds of the layers' matrices, of the head's and of visible attention pairs) is what packing alone can give.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from fst_fast.forest import Leaf, pack, split
from fst_fast.policy.attention import NAME
from fst_fast.policy.packing import PackedBatch, forest_batch, model_inputs, padded_batch

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 256, 4, 8, 4, 32, 768, 512
RESULTS = Path(__file__).parent / "results"


def make_leaves(
    contexts: int, context: int, problems: int, problem: int, samples: int, response: int
) -> list[Leaf]:
    rng = np.random.default_rng(0)
    context_ids = [rng.integers(0, VOCAB, context) for _ in range(contexts)]
    problem_ids = [rng.integers(0, VOCAB, problem) for _ in range(problems)]
    return [
        Leaf(np.concatenate([c, p]), rng.integers(0, VOCAB, response))
        for c in context_ids
        for p in problem_ids
        for _ in range(samples)
    ]


def make_model(attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model


def step(model: PreTrainedModel, batches: Sequence[PackedBatch]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and loss of forward + backward over all micro-batches; gradients add up in the model."""
    model.zero_grad(set_to_none=True)
    total, labels = 0.0, sum(len(b.labels) for b in batches)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    for batch in batches:
        hidden = model.model(**model_inputs(batch)).last_hidden_state.flatten(0, 1)
        loss = torch.zeros(())
        for rows, targets in zip(batch.rows.split(1024), batch.labels.split(1024), strict=True):
            logits = model.lm_head(hidden.index_select(0, rows)).float()
            loss = loss + torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / labels
        loss.backward()
        total += loss.item()
    return time.perf_counter() - begin, time.process_time() - cpu_begin, total


def operations(leaves: Sequence[Leaf]) -> tuple[float, float]:
    """Multiply-adds of one forward, forest and padded. Backward is about twice as much for both."""
    matrices = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INTERMEDIATE
    head = sum(len(leaf.response_ids) for leaf in leaves) * HIDDEN * VOCAB

    def total(tokens: int, pairs: float) -> float:
        return LAYERS * (tokens * matrices + pairs * 2 * HEADS * HEAD_DIM) + head

    forest, width = pack(leaves), max(len(leaf) for leaf in leaves)
    packed = total(len(forest.token_ids), float(np.sum(forest.depth.astype(np.int64) + 1)))
    return packed, total(width * len(leaves), len(leaves) * width * (width + 1) / 2)


def sweep(
    model: PreTrainedModel, candidates: dict[str, list[PackedBatch]], part: float
) -> tuple[str, dict[str, float]]:
    """CPU seconds of every candidate, over the first `part` of its micro-batches (they are all alike) and scaled up."""
    seconds = {}
    for name, batches in candidates.items():
        some = batches[: max(1, round(len(batches) * part))]
        step(model, some[:1])
        seconds[name] = step(model, some)[1] * len(batches) / len(some)
        print(f"  {name:28s} {seconds[name]:7.3f} CPU s")
    return min(seconds, key=seconds.__getitem__), seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, default=256, help="tokens of a context")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/training_step.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    leaves = make_leaves(4, args.context, 8, 48, 4, 32)
    forest_model, padded_model = make_model(NAME), make_model("sdpa")
    whole = len(pack(leaves).token_ids)
    forest_candidates = {
        f"forest, {len(parts)} micro-batches": [
            forest_batch([leaves[i] for i in p], share="prompts", device="cpu") for p in parts
        ]
        for parts in (split(leaves, whole // n + n) for n in (1, 2, 4))
    }
    padded_candidates = {
        f"padded, {size} rows": [
            padded_batch(leaves[i : i + size], pad_id=0, device="cpu") for i in range(0, len(leaves), size)
        ]
        for size in (1, 2, 4, 8, 16, 32)
    }
    print(f"{len(leaves)} sequences, {args.threads} threads; sweep:")
    best_forest, forest_sweep = sweep(forest_model, forest_candidates, 1.0)
    best_padded, padded_sweep = sweep(padded_model, padded_candidates, 0.25)

    times: dict[str, list[float]] = {"forest": [], "padded": []}
    cpu_times: dict[str, list[float]] = {"forest": [], "padded": []}
    losses = {}
    for _ in range(args.rounds):
        for side, model, batches in (
            ("forest", forest_model, forest_candidates[best_forest]),
            ("padded", padded_model, padded_candidates[best_padded]),
        ):
            seconds, cpu_seconds, losses[side] = step(model, batches)
            times[side].append(seconds)
            cpu_times[side].append(cpu_seconds)
    gradient = max(
        (a.grad - b.grad).abs().max().item()
        for a, b in zip(forest_model.parameters(), padded_model.parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    )
    forest_ops, padded_ops = operations(leaves)
    medians = {side: statistics.median(values) for side, values in times.items()}
    cpu_medians = {side: statistics.median(values) for side, values in cpu_times.items()}
    result = {
        "benchmark": "training_step",
        "cpu": cpu_name(),
        "threads": args.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "batch": {
            "contexts": 4,
            "context": args.context,
            "problems": 8,
            "problem": 48,
            "samples": 4,
            "response": 32,
        },
        "model": {
            "hidden": HIDDEN,
            "layers": LAYERS,
            "heads": [HEADS, KV_HEADS],
            "intermediate": INTERMEDIATE,
            "vocabulary": VOCAB,
        },
        "tokens": {"forest": whole, "padded": len(leaves) * max(map(len, leaves))},
        "sweep_cpu_s": {**forest_sweep, **padded_sweep},
        "best": {"forest": best_forest, "padded": best_padded},
        "seconds": times,
        "cpu_seconds": cpu_times,
        "median_s": medians,
        "median_cpu_s": cpu_medians,
        "speedup": medians["padded"] / medians["forest"],
        "speedup_cpu": cpu_medians["padded"] / cpu_medians["forest"],
        "speedup_of_each_round": [p / f for f, p in zip(times["forest"], times["padded"], strict=True)],
        "operations_ratio": padded_ops / forest_ops,
        "loss": losses,
        "largest_gradient_difference": gradient,
    }
    print(
        f"{best_forest}: {medians['forest']:.3f} s; {best_padded}: {medians['padded']:.3f} s; median of {args.rounds}"
    )
    print(f"speed-up {result['speedup']:.2f}x, by CPU seconds {result['speedup_cpu']:.2f}x")
    print(f"operations ratio {result['operations_ratio']:.2f}x, gradients differ by {gradient:.1e}")
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        name = "training_step.json" if args.context == 256 else f"training_step_context{args.context}.json"
        (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
