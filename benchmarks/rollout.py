"""Rollouts: the forest engine against transformers.generate (left-padded, sdpa, its own best batch size), in one run, on random weights.

    python benchmarks/rollout.py [--threads 1] [--repeats 3] [--out benchmarks/results/rollout.json]

Default load: 4 contexts x 256 tokens, 16 problems x 48 tokens, 8 samples of every (context, problem), 64 new tokens each, no eos: 512
samples. transformers gets every sample as a sequence of its own in batches of the size that is fastest on one context's 128 samples.
Repeats alternate between the two; the figures are medians, in wall-clock and in CPU seconds (the ones to trust where others use the machine).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_fast.policy import attention
from fst_fast.rollout.engine import Request, RolloutEngine

VOCABULARY = 200


def small_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def load(
    contexts: int, context_tokens: int, problems: int, problem_tokens: int, samples: int
) -> list[Request]:
    rng = np.random.default_rng(0)
    context_ids = rng.integers(0, VOCABULARY, (contexts, context_tokens))
    problem_ids = rng.integers(0, VOCABULARY, (problems, problem_tokens))
    return [
        Request(
            str(p),
            str(c),
            s,
            np.concatenate([context_ids[c], problem_ids[p]]),
            seed=(c * problems + p) * samples + s,
        )
        for c in range(contexts)
        for p in range(problems)
        for s in range(samples)
    ]


def forest(
    model: Qwen3ForCausalLM, requests: list[Request], new_tokens: int, max_batch: int
) -> RolloutEngine:
    model.set_attn_implementation(attention.NAME)
    engine = RolloutEngine(model, eos_ids=[], pad_id=0, max_batch=max_batch, packing="forest")
    rollouts = engine.generate(requests, max_response_tokens=new_tokens, temperature=1.0, policy_version=0)
    assert all(len(r.response_ids) == new_tokens for r in rollouts)
    return engine


def transformers_generate(
    model: Qwen3ForCausalLM, requests: list[Request], new_tokens: int, batch: int
) -> None:
    model.set_attn_implementation("sdpa")
    for begin in range(0, len(requests), batch):
        ids = torch.as_tensor(np.stack([r.prompt_ids for r in requests[begin : begin + batch]]))
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + new_tokens


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def medians(runs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(r[0] for r in runs), statistics.median(r[1] for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=256, help="of the forest engine")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[32, 64, 128], help="tried for transformers"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rollout.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = small_model()
    requests = load(4, 256, 16, 48, args.samples)
    first = requests[: len(requests) // 4]
    transformers_generate(model, first[:4], 2, 4)  # warm-up
    forest(model, first[:4], 2, 4)
    tried = {
        b: seconds(lambda b=b: transformers_generate(model, first, args.new_tokens, b)) for b in args.batches
    }
    best = min(tried, key=lambda b: tried[b][1])

    ours, theirs, step = [], [], []
    for _ in range(args.repeats):
        ours.append(seconds(lambda: forest(model, requests, args.new_tokens, args.max_batch)))
        theirs.append(seconds(lambda: transformers_generate(model, requests, args.new_tokens, best)))
        # Decoding alone: 128 sequences, a long run less a short one.
        long, short = (
            seconds(lambda n=n: forest(model, requests[::4], n, 128)) for n in (args.new_tokens, 2)
        )
        step.append(
            ((long[0] - short[0]) / (args.new_tokens - 2), (long[1] - short[1]) / (args.new_tokens - 2))
        )
    engine = forest(model, requests, args.new_tokens, args.max_batch)

    (a, a_cpu), (b, b_cpu), (c, c_cpu) = medians(ours), medians(theirs), medians(step)
    result = {
        "load": {
            "contexts": [4, 256],
            "problems": [16, 48],
            "samples": args.samples,
            "new_tokens": args.new_tokens,
        },
        "model": {"hidden": 128, "layers": 4, "heads": [4, 2], "vocabulary": VOCABULARY, "dtype": "float32"},
        "seconds": "pairs of wall-clock and CPU seconds",
        "forest": {"seconds": ours, "samples_per_s": len(requests) / a, "max_batch": args.max_batch},
        "transformers": {
            "seconds": theirs,
            "samples_per_s": len(requests) / b,
            "batch": best,
            "seconds_one_context_by_batch": tried,
        },
        "speedup": b / a,
        "speedup_cpu": b_cpu / a_cpu,
        "ms_per_step_of_128": c * 1e3,
        "ms_per_step_of_128_cpu": c_cpu * 1e3,
        "tokens_computed": engine.tokens_computed,
        "tokens_unshared": engine.tokens_unshared,
        "threads": args.threads,
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "load_average_1min": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"forest        {a:6.2f} s, {a_cpu:6.2f} s CPU  {len(requests) / a:7.1f} samples/s  (max_batch {args.max_batch})"
    )
    print(
        f"transformers  {b:6.2f} s, {b_cpu:6.2f} s CPU  {len(requests) / b:7.1f} samples/s  (batch {best} of {args.batches})"
    )
    print(f"speed-up {b / a:.2f}x, by CPU time {b_cpu / a_cpu:.2f}x")
    print(f"{c * 1e3:.1f} ms, {c_cpu * 1e3:.1f} ms CPU per decode step of 128 sequences; {args.out}")


if __name__ == "__main__":
    main()
