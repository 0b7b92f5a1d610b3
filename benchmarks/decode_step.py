"""A decode step of the rollout engine, compared with the minimal memory traffic: all weights once, every key and value of the forest once.

    python -m benchmarks.decode_step [--sides shared unshared] [--steps N] [--rounds 1] [--out FOLDER]

Random weights. On a GPU the shape of Qwen3-8B in bfloat16, 4 contexts x 1536, 64 problems x 300 under each, 2 samples:
512 sequences at a time. On the CPU a small float32 model, whose figures only show that the benchmark runs.

    shared    the engine: keys and values in a pool, the kernels of fst_kernels
    unshared  every sequence with its own prompt (policy.packing=padded), as many sequences as `batch` below

Reported: seconds until the first tokens (prefill), median ms of later steps, tokens/s of these, the byte floor at 4.3
TB/s (an H200, measured) as a share of a step, peak memory. Without eos, so all sequences run in every step.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks import measure
from fst_fast.policy.attention import NAME
from fst_fast.policy.gpu_forward import unsupported_reason
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.rollout.graphs import StepGraph
from fst_fast.rollout.responses import Responses

BANDWIDTH = 4.3e12  # bytes/s
SHAPES = {
    "cuda": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
    "cpu": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300},
}  # fmt: skip
LOADS = {
    "cuda": {"contexts": 4, "context": 1536, "problems": 64, "problem": 300, "samples": 2, "batch": 128},
    "cpu": {"contexts": 2, "context": 64, "problems": 4, "problem": 16, "samples": 2, "batch": 8},
}
STEPS = {"cuda": 24, "cpu": 4}
SIDES: dict[str, Literal["forest", "padded"]] = {"shared": "forest", "unshared": "padded"}


def make_model(device: torch.device) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[device.type], tie_word_embeddings=False, max_position_embeddings=8192)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def requests(load: dict[str, int]) -> list[Request]:
    rng = np.random.default_rng(0)
    contexts = rng.integers(6, 300, (load["contexts"], load["context"]))
    problems = rng.integers(6, 300, (load["problems"], load["problem"]))
    return [
        Request(str(p), str(c), s, np.concatenate([contexts[c], problems[p]]), seed=(c * load["problems"] + p) * load["samples"] + s)
        for c in range(load["contexts"])
        for p in range(load["problems"])
        for s in range(load["samples"])
    ]  # fmt: skip


def floor_bytes(model: Any, engine: RolloutEngine, some: list[Request], tokens: int, shared: bool) -> float:
    """Minimal bytes read by a decode step, mean over the steps: weights without embeddings, and the keys and values of the sequences."""
    weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    prompts = sum(len(r.prompt_ids) for r in some)
    if shared:
        seen = {r.prompt_ids.tobytes() for r in some}
        contexts = {r.context_id: len(r.prompt_ids) for r in some}
        load = LOADS[measure.device().type]
        prompts = len(contexts) * load["context"] + len(seen) * load["problem"]
    return float(weights + (prompts + len(some) * tokens / 2) * engine.token_bytes())


def measured(model: Any, side: str, some: list[Request], steps: int) -> dict[str, Any]:
    packing = SIDES[side]
    model.set_attn_implementation(NAME if packing == "forest" else "sdpa")
    graph = None if packing == "padded" or unsupported_reason(model) else StepGraph()
    engine = RolloutEngine(model, eos_ids=[], pad_id=0, max_batch=len(some), packing=packing, graph=graph)
    ends: list[float] = []
    draw = Responses.draw

    def timed(self: Responses, *rest: Any) -> Any:
        out = draw(self, *rest)  # copies the tokens to the host, so all queued work is done
        ends.append(time.perf_counter())
        return out

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Responses.draw = timed  # type: ignore[method-assign]
    try:
        began = time.perf_counter()
        out = engine.generate(some, max_response_tokens=steps + 1, temperature=1.0, policy_version=0)
    finally:
        Responses.draw = draw  # type: ignore[method-assign]
    assert all(len(r.response_ids) == steps + 1 for r in out)
    seconds = statistics.median(b - a for a, b in zip(ends[-steps - 1 :], ends[-steps:], strict=False))
    floor = floor_bytes(model, engine, some, steps, packing == "forest") / BANDWIDTH
    on_gpu = measure.device().type == "cuda"
    return {
        "name": side,
        "sequences": len(some),
        "prefill_s": ends[-steps - 1] - began,
        "step_ms": seconds * 1e3,
        "tokens_per_s": len(some) / seconds,
        "floor_ms": floor * 1e3 if on_gpu else None,
        "times_floor": seconds / floor if on_gpu else None,
        "peak_mb": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None,
    }


def main() -> None:
    parser = measure.arguments(__doc__)
    device = measure.device()
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--steps", type=int, default=STEPS[device.type])
    parser.add_argument(
        "--rounds", type=int, default=2, help="rounds per side; the last is reported, the others are warm-up"
    )
    parser.add_argument("--out", type=Path, help="folder for decode_step_cpu.json or decode_step_cuda.json")
    args = parser.parse_args()
    path = None if args.out is None else args.out / f"decode_step_{device.type}.json"
    columns = [
        ("name", "side", ""), ("sequences", "sequences", "d"), ("prefill_s", "prefill s", ".2f"), ("step_ms", "step ms", ".2f"),
        ("tokens_per_s", "tokens/s", ",.0f"), ("floor_ms", "floor ms", ".2f"), ("times_floor", "x floor", ".2f"), ("peak_mb", "peak MB", ",.0f"),
    ]  # fmt: skip
    results = measure.Results("decode_step", columns, path)
    results.about = {"model": SHAPES[device.type], "load": LOADS[device.type], "steps": args.steps}
    model, load = make_model(device), requests(LOADS[device.type])
    for side in args.sides:
        some = load[: LOADS[device.type]["batch"]] if side == "unshared" else load
        try:
            for _ in range(args.rounds):
                row = measured(model, side, some, args.steps)
        except torch.OutOfMemoryError as error:
            row = {"name": side, "skipped": str(error).splitlines()[0]}
        results.add(row)
    print(results.table())


if __name__ == "__main__":
    main()
