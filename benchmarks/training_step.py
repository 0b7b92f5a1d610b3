"""Forward + backward of one training batch: the forest versus one-level sharing and versus the padded batch, in one run.

    python -m benchmarks.training_step [--context 256] [--trees 4] [--threads T] [--rounds 3] [--out benchmarks/results]

All sides run the same transformers model and the same loss (`linear_policy_loss`, the training path) over the same
labels; they differ in packing and attention. `forest` computes every shared prefix once, at any depth. `one level`
gives each (context, problem) its own copy of the context and shares it among its samples only. `padded` is causal
scaled-dot-product attention without a mask, its fastest path, and has no padding here (equal lengths). Every side runs
at its best micro-batch size, found by a sweep; `padded, one batch` is the whole batch at once.

On a CPU: contexts of 256 or 1024 tokens, 8 problems x 48, 4 samples x 32, a Qwen3 with hidden size 256 and 4 layers,
float32. On a GPU: contexts of 1536 tokens, 64 problems x 300, 2 samples x 512, the shape of Qwen3-1.7B in bfloat16 with
activation checkpointing.

The sides alternate and their medians are compared: on a CPU in CPU seconds (the figure to trust on a shared machine,
with one thread, since waiting threads spin) and wall-clock seconds, on a GPU in seconds. Ratio of operations:
multiply-adds of the layers' matrices, the head's and visible attention pairs, i.e. what packing alone can gain. MFU:
operations per second relative to a large matrix product of the same dtype. Peak memory: on a CPU of child processes,
for the forest and the padded batch at once; on a GPU by torch's allocator for all sides.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from benchmarks import measure
from benchmarks.plan_step import Load
from fst_fast.forest import Leaf, pack, split
from fst_fast.policy import head
from fst_fast.policy.attention import NAME, TreePlan
from fst_fast.policy.packing import PackedBatch, forest_batch, model_inputs, padded_batch
from fst_kernels import PolicyObjective


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    dtype: str


BATCH = {"cpu": Load(4, 256, 8, 48, 4, 32), "cuda": Load(1, 1536, 64, 300, 2, 512)}
SHAPE = {
    "cpu": Shape(256, 4, 8, 4, 32, 768, 512, "float32"),
    "cuda": Shape(2048, 28, 16, 8, 128, 6144, 151936, "bfloat16"),
}
# Micro-batch sizes to try: parts of the forest; groups of samples, or sequences, at a time.
FOREST, ONE_LEVEL, PADDED = (
    {"cpu": (1, 2, 4), "cuda": (1, 2)},
    {"cpu": (4, 8, 32), "cuda": (8, 32)},
    {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (4, 16, 64)},
)

LARGEST_PADDED = 16384  # largest padded micro-batch tried on a CPU, in tokens: larger ones were only slower


def make_leaves(batch: Load, vocabulary: int) -> list[Leaf]:
    rng = np.random.default_rng(0)
    contexts = [rng.integers(0, vocabulary, batch.context) for _ in range(batch.contexts)]
    problems = [rng.integers(0, vocabulary, batch.problem) for _ in range(batch.problems)]
    return [
        Leaf(np.concatenate([c, p]), rng.integers(0, vocabulary, batch.response))
        for c in contexts
        for p in problems
        for _ in range(batch.samples)
    ]


def make_model(shape: Shape, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
    )
    with measure.device():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=getattr(torch, shape.dtype)
        )
    if measure.device().type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    head.install(model)
    return model.train()


def one_level_batch(groups: Sequence[Sequence[Leaf]]) -> PackedBatch:
    """One row per group, packed as its own forest: what the whole group shares is computed once per group."""
    packed = [forest_batch(group, share="prompts", device="cpu") for group in groups]
    n = packed[0].tokens
    assert all(p.tokens == n for p in packed), "rows of one batch are of one length here"
    ends = torch.stack([torch.from_numpy(pack(group).subtree_end) for group in groups])
    sizes = np.cumsum([0, *(len(group) for group in groups)])
    return replace(
        packed[0],
        input_ids=torch.cat([p.input_ids for p in packed]).to(measure.device()),
        position_ids=torch.cat([p.position_ids for p in packed]).to(measure.device()),
        plan=TreePlan(ends, device=measure.device()),
        rows=torch.cat([p.rows + i * n for i, p in enumerate(packed)]),
        labels=torch.cat([p.labels for p in packed]),
        leaf=torch.cat([p.leaf + int(size) for p, size in zip(packed, sizes, strict=False)]),
        offset=torch.cat([p.offset for p in packed]),
        tokens=n * len(groups),
        unshared=sum(p.unshared for p in packed),
    )


def sides(leaves: list[Leaf], samples: int) -> dict[str, dict[str, Callable[[], list[PackedBatch]]]]:
    """Side -> name of a micro-batch size -> its micro-batches, smallest first."""
    where, whole = measure.device(), len(pack(leaves).token_ids)
    groups = [leaves[i : i + samples] for i in range(0, len(leaves), samples)]

    def forest(n: int) -> list[PackedBatch]:
        parts = split(leaves, whole // n + (n > 1) * max(map(len, leaves)))
        return [forest_batch([leaves[i] for i in p], share="prompts", device=where) for p in parts]

    def one_level(n: int) -> list[PackedBatch]:
        return [one_level_batch(groups[i : i + n]) for i in range(0, len(groups), n)]

    def padded(n: int) -> list[PackedBatch]:
        return [padded_batch(leaves[i : i + n], pad_id=0, device=where) for i in range(0, len(leaves), n)]

    kind = where.type
    return {
        "one level": {f"{n} groups": lambda n=n: one_level(n) for n in ONE_LEVEL[kind] if n <= len(groups)},
        "forest": {f"{n} micro-batches": lambda n=n: forest(n) for n in FOREST[kind]},
        "padded, one batch": {f"{len(leaves)} rows": lambda: padded(len(leaves))},
        "padded": {
            f"{n} rows": lambda n=n: padded(n)
            for n in PADDED[kind]
            if kind == "cuda" or n * max(map(len, leaves)) <= LARGEST_PADDED
        },
    }


def attention_of(side: str) -> str:
    return "sdpa" if side.startswith("padded") else NAME


@dataclass(frozen=True)
class Time:
    seconds: float
    cpu_seconds: float
    loss: float

    @property
    def trusted(self) -> float:
        return self.seconds if torch.cuda.is_available() else self.cpu_seconds


def step(model: PreTrainedModel, batches: Sequence[PackedBatch], labels: int) -> Time:
    """Forward + backward over all micro-batches; gradients accumulate in the model."""
    model.zero_grad(set_to_none=True)
    losses = []
    begin, cpu_begin = measure.clock(), time.process_time()
    for batch in batches:
        at = head.Labels.of(batch.rows, batch.labels, measure.device())
        one = torch.ones(len(batch.labels), device=measure.device())
        job = head.LossJob(at, PolicyObjective("reinforce"), one, one / labels, None, 1.0, 1024)  # type: ignore[arg-type]
        with head.running(model, job):
            loss = model(**model_inputs(batch)).logits
        loss.backward()
        losses.append(loss.detach())
    seconds, cpu_seconds = measure.clock() - begin, time.process_time() - cpu_begin
    return Time(seconds, cpu_seconds, float(torch.stack(losses).sum()))


def operations(shape: Shape, tokens: int, pairs: int, rows: int) -> float:
    """Floating-point operations of forward + backward (twice the forward): layers' matrices, attention, head."""
    matrices = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    matrices += 3 * shape.hidden * shape.intermediate
    attention = pairs * 2 * shape.heads * shape.head_dim
    return 6.0 * (shape.layers * (tokens * matrices + attention) + rows * shape.hidden * shape.vocabulary)


def side_operations(shape: Shape, batches: Sequence[PackedBatch]) -> float:
    tokens = sum(b.tokens for b in batches)
    pairs = sum(int(b.position_ids.sum()) + b.tokens for b in batches)  # a token at depth d sees d + 1 keys
    rows = sum(len(torch.unique(b.rows)) for b in batches)
    return operations(shape, tokens, pairs, rows)


def sweep(
    model: PreTrainedModel, candidates: dict[str, Callable[[], list[PackedBatch]]], labels: int
) -> tuple[str, dict[str, float]]:
    """Seconds of every candidate. With many (similar) micro-batches, a sixteenth of them is timed and scaled up."""
    if len(candidates) == 1:
        return next(iter(candidates)), {}
    found = {}
    for name, make in candidates.items():
        batches = make()
        some = batches[: max(1, len(batches) // 16)]
        step(model, some[:1], labels)
        found[name] = step(model, some, labels).trusted * sum(b.tokens for b in batches)
        found[name] /= sum(b.tokens for b in some)
        print(f"  {name:28s} {found[name]:8.3f} s", flush=True)
    return min(found, key=found.__getitem__), found


def in_child(side: str, name: str, batch: dict[str, int]) -> tuple[measure.Run, measure.Run]:
    """One side in its own process, for its peak memory: (warm-up on a small part, the step)."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    shape = SHAPE[measure.device().type]
    leaves = make_leaves(Load(**batch), shape.vocabulary)
    model = make_model(shape, attention_of(side))
    small = leaves[: batch["samples"]]
    warm = (
        [one_level_batch([small])]
        if side != "forest"
        else [forest_batch(small, share="prompts", device="cpu")]
    )
    if side.startswith("padded"):
        warm = [padded_batch(small[:1], pad_id=0, device="cpu")]
    batches = sides(leaves, batch["samples"])[side][name]()
    return lambda: step(model, warm, 1), lambda: step(model, batches, 1)


def main() -> None:
    kind = measure.device().type
    parser = measure.arguments(__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=BATCH[kind].context, help="tokens of a context")
    parser.add_argument("--trees", type=int, default=BATCH[kind].contexts, help="contexts")
    parser.add_argument("--out", type=Path, help="folder for the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    batch, shape = replace(BATCH[kind], context=args.context, contexts=args.trees), SHAPE[kind]
    leaves = make_leaves(batch, shape.vocabulary)
    labels = sum(len(leaf.response_ids) for leaf in leaves)
    candidates_of = sides(leaves, batch.samples)
    models = {name: make_model(shape, name) for name in (NAME, "sdpa")}
    model_of = {side: models[attention_of(side)] for side in candidates_of}
    dtype = getattr(torch, shape.dtype)
    rate = measure.matmul_rate(4096, shape.hidden, shape.intermediate, dtype)
    print(f"{len(leaves)} sequences, {args.threads} threads; sweep:")
    best, swept, batches = {}, {}, {}
    for side, candidates in candidates_of.items():
        print(f" {side}")
        best[side], swept[side] = sweep(model_of[side], candidates, labels)
        batches[side] = candidates[best[side]]()

    times: dict[str, list[Time]] = {side: [] for side in candidates_of}
    failed: dict[str, str] = {}
    for round_ in range(args.rounds):
        # forest and padded run last on their models in a round: their gradients are compared below
        for side in candidates_of:
            if side in failed or (side == "padded, one batch" and kind == "cpu" and round_ >= 2):
                continue  # takes as long as all others together
            try:
                times[side].append(step(model_of[side], batches[side], labels))
            except torch.cuda.OutOfMemoryError:
                failed[side] = "out of memory"
    gradient = max(
        (a.grad - b.grad).abs().max().item()
        for a, b in zip(models[NAME].parameters(), models["sdpa"].parameters(), strict=True)
        if a.grad is not None and b.grad is not None
    )

    rows: dict[str, dict[str, Any]] = {}
    for side, own in times.items():
        if side in failed:
            rows[side] = {"micro_batch": best[side], "skipped": failed[side]}
            continue
        trusted = statistics.median(t.trusted for t in own)
        computed = side_operations(shape, batches[side])
        if kind == "cuda":
            peak: int | None = measure.cuda_peak_bytes(lambda s=side: step(model_of[s], batches[s], labels))
        elif side in ("forest", "padded, one batch"):
            peak = measure.in_child(
                "benchmarks.training_step", "in_child", side, best[side], asdict(batch)
            ).peak_bytes
        else:
            peak = None
        tokens = sum(b.tokens for b in batches[side])
        rows[side] = {
            "micro_batch": best[side],
            "median_s": statistics.median(t.seconds for t in own),
            "median_cpu_s": statistics.median(t.cpu_seconds for t in own),
            "rounds": [[t.seconds, t.cpu_seconds] for t in own],
            "tokens_computed": tokens,
            "sequence_tokens_per_s": sum(map(len, leaves)) / trusted,
            "computed_tokens_per_s": tokens / trusted,
            "operations": computed,
            "mfu": computed / trusted / rate,
            "peak_bytes": peak,
            "loss": own[-1].loss,
            "sweep_s": swept[side],
        }
    forest = rows["forest"]
    for side, row in rows.items():
        if "skipped" in row:
            print(f"{side:18s} {row['micro_batch']:16s} skipped: {row['skipped']}")
            continue
        clock = "median_cpu_s" if kind == "cpu" else "median_s"
        row["times_forest"] = row[clock] / forest[clock]
        row["operations_times_forest"] = row["operations"] / forest["operations"]
        row["peak_times_forest"] = row["peak_bytes"] / forest["peak_bytes"] if row["peak_bytes"] else None
        print(
            f"{side:18s} {row['micro_batch']:16s} {row['median_s']:8.3f} s {row['median_cpu_s']:8.3f} CPU s"
            f" {row['times_forest']:6.2f}x (operations {row['operations_times_forest']:5.2f}x)"
            f" {row['sequence_tokens_per_s']:9.0f} sequence tokens/s  MFU {row['mfu']:5.1%}"
            + (f"  peak {row['peak_bytes'] / 2**20:7.0f} MiB" if row["peak_bytes"] else "")
        )
    print(f"largest gradient difference, forest and padded: {gradient:.1e}")
    if args.out is not None:
        result = {
            "benchmark": "training_step",
            "hardware": measure.hardware(),
            "versions": measure.versions(),
            "batch": asdict(batch),
            "model": asdict(shape),
            "matmul_operations_per_s": rate,
            "largest_gradient_difference": gradient,
            "sides": rows,
        }
        threads = f"_{args.threads}threads" if kind == "cpu" else ""
        name = f"training_step_{kind}_{batch.contexts}x{batch.context}{threads}.json"
        measure.write(args.out / name, result)


if __name__ == "__main__":
    main()
