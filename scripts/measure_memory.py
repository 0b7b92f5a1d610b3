"""Measure the peak memory of every phase of a step on the CPU, beside what `fst plan` predicts of it.

    python scripts/measure_memory.py [--only NAME ...] [--out benchmarks/results/plan_memory.json]

Each setting runs in processes of its own, as many as it names, and is measured in its second step; results are written after every setting, and
one that is there already is not repeated. A figure is the resident anonymous memory of one process (the largest of several) above what it had
after the same step of the shipped model in small: libraries, compiled kernels and their caches are no part of it. The allocator gives freed blocks of
64 KiB and more back at once, so that what is kept for later hides no peak; the kernel counts the peak (VmHWM, reset before every phase).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import ranks, reset_peak, resident
from benchmarks.plan_step import PHASES, Load, MeasuredStep, add_row, configure, folder_of, read_results

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
SMALL = Load(context=32, problems=2, problem=16, samples=2, response=4)
LONG = {"problems": 8, "samples": 4}  # x 4 contexts of 256 tokens: 6,656 forest tokens
SHORT = {"problems": 2, "samples": 2, "response": 16}  # 1,664 forest tokens

# name -> (model, load, keys of the configuration, processes)
SETTINGS: dict[str, tuple[str, dict[str, int], dict[str, Any], int]] = {
    "mini": ("mini", LONG, {}, 1),
    "mini, micro-batch 2048": ("mini", LONG, {"slow.tokens_per_micro_batch": 2048}, 1),
    "mini, checkpointing": ("mini", LONG, {"policy.activation_checkpointing": True}, 1),
    "mini, LoRA": ("mini", LONG, {"policy.lora": {}}, 1),
    "mini, bfloat16": ("mini", LONG, {"model.dtype": "bfloat16"}, 1),
    "mini, ZeRO-2, 2 processes": ("mini", LONG, {"policy.zero_stage": 2}, 2),
    "mini, ZeRO-3, 2 processes": ("mini", LONG, {"policy.zero_stage": 3}, 2),
    "mini, bfloat16, micro-batch 2048": ("mini", LONG, {"model.dtype": "bfloat16", "slow.tokens_per_micro_batch": 2048}, 1),
    "mini, bfloat16, ZeRO-1, 2 processes": ("mini", LONG, {"model.dtype": "bfloat16", "policy.zero_stage": 1, "slow.tokens_per_micro_batch": 2048}, 2),
    "mini, bfloat16, ZeRO-2, 2 processes": ("mini", LONG, {"model.dtype": "bfloat16", "policy.zero_stage": 2, "slow.tokens_per_micro_batch": 2048}, 2),
    "mini, bfloat16, ZeRO-3, 2 processes": ("mini", LONG, {"model.dtype": "bfloat16", "policy.zero_stage": 3, "slow.tokens_per_micro_batch": 2048}, 2),
    "mini, padded": ("mini", {**LONG, "problems": 2}, {"policy.packing": "padded", "policy.attention": "sdpa"}, 1),
    "smollm2": ("smollm2", SHORT, {}, 1),
    "smollm2, micro-batch 512": ("smollm2", SHORT, {"slow.tokens_per_micro_batch": 512}, 1),
    "smollm2, checkpointing": ("smollm2", SHORT, {"policy.activation_checkpointing": True}, 1),
    "smollm2, LoRA": ("smollm2", SHORT, {"policy.lora": {}}, 1),
    "smollm2, exact KL": ("smollm2", SHORT, {"slow.kl": "reverse"}, 1),
    "smollm2, ZeRO-1": ("smollm2", SHORT, {"policy.zero_stage": 1}, 1),
    "smollm2, ZeRO-3": ("smollm2", {**SHORT, "problems": 1}, {"policy.zero_stage": 3}, 1),
    "smollm2, bfloat16, ZeRO-1": ("smollm2", {**SHORT, "problems": 1}, {"model.dtype": "bfloat16", "policy.zero_stage": 1}, 1),
}  # fmt: skip


def measure(model: str, load: Load, keys: dict[str, Any]) -> dict[str, Any]:
    """Phase -> (peak, before) in bytes, of the second step, and the tokens of its micro-batches."""
    from fst_fast import distributed

    distributed.init()
    small = MeasuredStep(configure("mini", SMALL, keys), SMALL)
    for _ in range(2):
        for _, run in small.phases():
            run()
    del small, run
    gc.collect()
    nothing = resident()["RssAnon"]
    step = MeasuredStep(configure(model, load, keys), load)
    found: dict[str, list[int]] = {}
    for _ in range(2):
        for phase, run in step.phases():
            gc.collect()
            before = resident()["RssAnon"]
            reset_peak()
            run()
            now = resident()
            peak = max(now["VmHWM"] - now["RssFile"] - now["RssShmem"], now["RssAnon"])
            found[phase] = [peak - nothing, before - nothing]
    everywhere = distributed.all_gather(found)
    peaks = {p: [max(f[p][i] for f in everywhere) for i in (0, 1)] for p in PHASES}
    return {"peaks": peaks, "micro_batches": step.micro_tokens}


def run(name: str) -> dict[str, Any]:
    processes = SETTINGS[name][3]
    command, pipe = [sys.executable, __file__, "--child", name], subprocess.PIPE
    children = [
        subprocess.Popen(command, env=os.environ | GIVE_BACK | own, stdout=pipe, stderr=pipe, text=True)
        for own in (ranks(processes) if processes > 1 else [{}])
    ]
    outputs = [child.communicate() for child in children]
    for child, (_, wrong) in zip(children, outputs, strict=True):
        if child.returncode:
            raise SystemExit(f"{name}: {wrong[-3000:]}")
    result: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return result


def compared(name: str, path: Path) -> str:
    """A line: of the largest phase and of all others, GB measured and predicted."""
    from fst_fast.plan.memory import Setting, memory
    from fst_fast.plan.shapes import shape_of
    from fst_fast.plan.workload import Assumed, works

    results = read_results(path)
    row = results["rows"][name]
    load, processes = Load(**row["load"]), row["processes"]
    config = configure("mini", load, row["keys"])
    [work, *_] = works(config, Assumed(load.context, load.problem, load.response, 0.0), processes)
    phases = memory(
        Setting(shape_of(results["models"][row["model"]], name), config, processes, gpu=False), work
    )
    peak, guess = max(top for top, _ in row["peaks"].values()), max(p.total for p in phases)
    each = "  ".join(
        f"{phase} {top / 1e6:.0f}/{p.total / 1e6:.0f}"
        for (phase, (top, _)), p in zip(row["peaks"].items(), phases, strict=True)
    )
    return f"{name:32} {peak / 1e6:7.0f} MB measured {guess / 1e6:7.0f} predicted {guess / peak - 1:+6.1%}   {each}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_memory.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, load, keys, _ = SETTINGS[args.child]
        print(json.dumps(measure(model, Load(**load), keys)))
        return
    for name in args.only:
        model, load, keys, processes = SETTINGS[name]
        rows = read_results(args.out)["rows"]
        if name not in rows and (folder_of(model) / "config.json").is_file():
            row = {"model": model, "load": load, "keys": keys, "processes": processes, **run(name)}
            add_row(args.out, name, model, row)
            rows[name] = row
        if name in rows:
            print(compared(name, args.out), flush=True)
        else:
            print(f"{name}: {folder_of(model)} is not there")


if __name__ == "__main__":
    main()
