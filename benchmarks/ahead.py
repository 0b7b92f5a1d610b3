"""Sampling one step ahead: two processes of which one samples and one trains, against the same two that both sample and then train.

    python -m benchmarks.ahead [--steps 12] [--rounds 2] [--response 48] [--samples 8] [--out benchmarks/results/ahead.json]
    python -m benchmarks.ahead --simulate [--devices 8]      GPUs, predicted: phases as `fst plan` predicts them, played through

The mini model, list programs, method=rl; one thread for each process. Reported: the median seconds of a step after the first two, and what sampling and
training take of one (with ahead they go on side by side).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ROOT, arguments, cpu_environment, ranks, records, write

LEFT_OUT = 2  # first steps
SIDES = {"ahead=0": [], "ahead=1": ["--rollout.ahead=1", "--rollout.sampler_ranks=1"]}
SPREAD, STEPS = 0.1, 600  # of the simulation: standard deviation of the logarithm of a phase's seconds


def run(folder: Path, args: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """One run on two processes: seconds of its steps, and of their halves."""
    argv = [
        sys.executable, "train.py", "--run-dir", str(folder), "--method=rl", "--task=list_programs", f"--slow.steps={args.steps}",
        f"--slow.problems_per_step={args.problems}", f"--slow.group_size={args.samples}", "--slow.lr=1e-5", "--slow.warmup_steps=0",
        f"--rollout.max_response_tokens={args.response}", "--eval.every=0", "--eval.final_problems=1", "--eval.samples=1",
        "--eval.kl_problems=1", "--checkpoint.every=0", f"--seed={args.seed}", *more,
    ]  # fmt: skip
    processes = [
        subprocess.Popen(argv, cwd=ROOT, env=cpu_environment(1) | rank, stdout=subprocess.DEVNULL)
        for rank in ranks(2)
    ]
    try:
        if any(process.wait() for process in processes):
            raise SystemExit(f"a run with {more} failed")
    finally:
        for process in processes:
            process.kill()
    steps = [row for row in records(folder, "timing") if "tokens_per_s" in row]
    took = np.diff([row["seconds"] for row in steps])[LEFT_OUT - 1 :]
    halves = {
        name: statistics.median(row[f"{name}_s"] for row in steps[LEFT_OUT:])
        for name in ("rollout", "verify", "train")
    }
    trained = [row for row in records(folder, "metrics") if row["kind"] == "step"]
    return {
        "step_s": statistics.median(took),
        "all_steps_s": [round(float(s), 4) for s in took],
        **{f"{name}_s": value for name, value in halves.items()},
        "staleness": trained[-1].get("rollout_staleness"),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.rounds):
            for side in list(SIDES)[:: -1 if i % 2 else 1]:
                rows[side].append(run(Path(folder) / f"{side}-{i}", args, SIDES[side]))
    medians = {side: statistics.median(row["step_s"] for row in found) for side, found in rows.items()}
    ratios = [a["step_s"] / b["step_s"] for a, b in zip(*rows.values(), strict=True)]
    return {
        "hardware": f"{os.cpu_count()} cores of {platform.machine()}, one thread for each of two processes",
        "load_average": os.getloadavg(),
        "load": {name: getattr(args, name) for name in ("steps", "problems", "samples", "response", "rounds", "seed")},
        "median_step_s": medians,
        "speedup": statistics.median(ratios),
        "speedup_of_rounds": ratios,
        "rounds": rows,
    }  # fmt: skip


def played(
    sampling: float, training: float, first: float, ahead: int, cycle: int, rng: np.random.Generator
) -> float:
    """Seconds of a step where `ahead` batches may wait, mean over cycles. first: seconds of the batch that all devices sample together."""

    def drawn(mean: float) -> float:
        return float(mean * rng.lognormal(-(SPREAD**2) / 2, SPREAD))

    total = 0.0
    for _ in range(STEPS // cycle):
        ready = [drawn(first)]  # when batch t can be trained
        version = [ready[0]]  # when the weights that batch t is trained from exist
        sampler = trainer = ready[0]
        for t in range(cycle):
            for later in range(len(ready), min(t + ahead, cycle - 1) + 1):
                sampler = max(sampler, version[max(later - ahead, 0)]) + drawn(sampling)
                ready.append(sampler)
            trainer = max(trainer, ready[t]) + drawn(training)
            version.append(trainer)
        total += trainer
    return total / (STEPS // cycle * cycle)


def simulate(devices: int) -> dict[str, Any]:
    """An 8B step (configs/paper/math.yaml) on so many H200, for every division into samplers and trainers by eighths."""
    from benchmarks.plan import QWEN3_8B
    from fst_fast.config import load
    from fst_fast.plan.advice import DEVICE_FRACTION, plan, with_keys
    from fst_fast.plan.machines import machine
    from fst_fast.plan.shapes import shape_of
    from fst_fast.plan.workload import Assumed

    keys = ["--rollout.cuda_graphs=true", "--policy.liger=true"]
    config = load.load(ROOT / "configs/paper/math.yaml", keys)
    shape, h200, cycle = shape_of(QWEN3_8B, "Qwen3-8B"), machine("H200"), config.fast.cycle_steps

    # A sampler holds the base model and the trained weights, and no state of the optimiser.
    room = int(DEVICE_FRACTION * (h200.memory - h200.reserve - 2 * 2 * shape.parameters))
    alone = with_keys(config, {"rollout.kv_memory_bytes": room})

    def halves(devices: int, config: Any = config) -> tuple[float, float, bool]:
        here = plan(config, shape, h200, devices, Assumed())
        sampled = sum(p.seconds for p in here.step.phases if p.name in ("prefill", "decode", "verify"))
        return sampled, here.step.seconds - sampled, here.fits

    sampled, trained, _ = halves(devices)
    rows = []
    for samplers in range(devices // 8, devices, devices // 8):
        sampling, training, fits = halves(samplers, alone)[0], *halves(devices - samplers)[1:]
        row: dict[str, Any] = {
            "samplers": samplers, "trainers": devices - samplers, "sampling_s": sampling, "training_s": training, "trainers_have_memory": fits
        }  # fmt: skip
        for ahead in (1, 2):
            row[f"step_s, ahead={ahead}"] = played(
                sampling, training, sampled, ahead, cycle, np.random.default_rng(0)
            )
        rows.append(row)
    return {
        "predicted": True,
        "hardware": f"{devices} x H200, not measured",
        "keys": keys,
        "cycle_steps": cycle,
        "spread": SPREAD,
        "step_s, ahead=0": sampled + trained,
        "sampling_s": sampled,
        "training_s": trained,
        "divisions": rows,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="of --simulate; a multiple of 8")
    for name, default in (("steps", 12), ("rounds", 2), ("problems", 16), ("samples", 8), ("response", 48), ("seed", 0)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    result = simulate(args.devices) if args.simulate else measure(args)
    if args.out:
        write(args.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
