"""Measure the times of a step's phases on one core, and hold what `fst plan` predicts against them.

    python -m benchmarks.plan measure [--only NAME ...]       settings that are not in the results yet; each in a process of its own
    python -m benchmarks.plan fit                             the rates of the machine `cpu`, from the settings of FIT alone
    python -m benchmarks.plan check                           the table: predicted against measured, the settings of JUDGED
    python -m benchmarks.plan eight                           an 8B step on eight H200 before and after its findings were mended, predicted

CPU seconds of one thread, the second step of each setting. A product of a fixed shape is timed right before and after it, and seconds are counted
in units of that product's: on a shared machine the same work takes more seconds while others use caches and memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.plan_step import PHASES, Load, MeasuredStep, add_row, configure, folder_of, read_results

Row = tuple[str, tuple[int, int, int, int, int, int], dict[str, Any]]

# name -> model; contexts x tokens, problems x tokens, samples x tokens; keys
FIT: dict[str, Row] = {
    "f1": ("mini", (4, 64, 8, 96, 2, 32), {}),
    "f2": ("mini", (1, 64, 16, 48, 8, 64), {}),
    "f3": ("mini", (4, 256, 8, 48, 4, 32), {}),
    "f4": ("mini", (2, 128, 32, 24, 2, 16), {}),
    "f5": ("mini", (4, 64, 16, 96, 2, 32), {"policy.activation_checkpointing": True}),
    "f6": ("mini", (4, 64, 8, 96, 4, 32), {"policy.lora": {}}),
    "f7": ("mini", (4, 64, 8, 96, 2, 64), {"slow.tokens_per_micro_batch": 1024}),
    "f8": ("mini", (4, 64, 4, 96, 2, 32), {"policy.packing": "padded", "policy.attention": "sdpa"}),
    "f9": ("smollm2", (2, 128, 2, 32, 2, 8), {}),
    "f10": ("smollm2", (2, 64, 2, 32, 1, 32), {}),
    "f11": ("smollm2", (2, 64, 2, 32, 2, 8), {"policy.activation_checkpointing": True}),
}
JUDGED: dict[str, Row] = {
    "mini 4x128 16x64 2x48": ("mini", (4, 128, 16, 64, 2, 48), {}),
    "mini 4x256 16x48 2x32": ("mini", (4, 256, 16, 48, 2, 32), {}),
    "mini 1x32 32x64 8x32": ("mini", (1, 32, 32, 64, 8, 32), {}),
    "mini 2x300 4x64 4x64": ("mini", (2, 300, 4, 64, 4, 64), {}),
    "mini, micro-batch 2048": ("mini", (4, 128, 16, 64, 2, 48), {"slow.tokens_per_micro_batch": 2048}),
    "mini, checkpointing": ("mini", (4, 128, 16, 64, 2, 24), {"policy.activation_checkpointing": True}),
    "mini, LoRA": ("mini", (4, 128, 8, 64, 4, 48), {"policy.lora": {"rank": 8, "alpha": 16}}),
    "mini, exact KL": ("mini", (4, 128, 8, 64, 4, 48), {"slow.kl": "reverse"}),
    "mini, padded": ("mini", (2, 128, 4, 64, 4, 48), {"policy.packing": "padded", "policy.attention": "sdpa"}),
    "mini, one problem": ("mini", (4, 64, 1, 32, 2, 64), {}),
    "smollm2 4x256 2x48 2x16": ("smollm2", (4, 256, 2, 48, 2, 16), {}),
    "smollm2 2x64 4x32 2x32": ("smollm2", (2, 64, 4, 32, 2, 32), {}),
    "smollm2 1x128 4x64 4x16": ("smollm2", (1, 128, 4, 64, 4, 16), {}),
    "smollm2, micro-batch 256": ("smollm2", (2, 64, 4, 32, 2, 24), {"slow.tokens_per_micro_batch": 256}),
    "smollm2, LoRA": ("smollm2", (2, 128, 4, 32, 2, 16), {"policy.lora": {}}),
    "smollm2, no KL": ("smollm2", (2, 128, 4, 32, 2, 16), {"slow.kl": "none"}),
}  # fmt: skip
SETTINGS = FIT | JUDGED
PROBE = (512, 768, 2304)  # rows, inner, columns
REFERENCE = 60e9  # FLOP/s of the probe on the core that seconds are given for


def load_of(name: str) -> Load:
    return Load(*SETTINGS[name][1])


def probe() -> float:
    """FLOP/s of a product of PROBE's shape, per CPU second of one thread."""
    import torch

    n, k, m = PROBE
    a, b, out = torch.randn(n, k), torch.randn(m, k), torch.empty(n, m)
    seconds = []
    for _ in range(12):
        begin = time.process_time()
        torch.mm(a, b.t(), out=out)
        seconds.append(time.process_time() - begin)
    return 2 * n * k * m / statistics.median(seconds[2:])


def measure(name: str) -> dict[str, Any]:
    """CPU seconds of every phase, of the second step, and the probe's rates before and after."""
    from fst_fast.run.environment import prepare_environment

    prepare_environment()
    import torch

    torch.set_num_threads(1)
    model, _, keys = SETTINGS[name]
    step = MeasuredStep(configure(model, load_of(name), keys), load_of(name))
    for _, run in step.phases():
        run()
    rates, seconds = [probe()], {}
    repeats = 3 if model == "mini" else 1
    for _ in range(repeats):
        for phase, run in step.phases():
            begin = time.process_time()
            run()
            seconds.setdefault(phase, []).append(time.process_time() - begin)
        rates.append(probe())
    return {
        "seconds": {p: statistics.median(s) for p, s in seconds.items()},
        "probe": rates,
        "tokens": step.micro_tokens,
    }


# ---------------------------------------------------------------------------------------------------------------- fit and check

TERMS = {  # rate of the machine -> what it divides
    "product32": lambda c: c.products,
    "bandwidth": lambda c: c.stream,
    "operands": lambda c: c.product_bytes,
    "attention": lambda c: c.attention,
    "attention_backward": lambda c: c.attention_backward,
    "exps": lambda c: c.exps,
    "launch": lambda c: c.launches,
}
OF_PHASE = {"sampling": ("prefill", "decode", "verify"), "scoring": ("score",), "forward_backward": ("forward", "backward"), "optimiser": ("optimiser",), "hand_over": ("hand-over",)}  # fmt: skip


def costs(name: str, results: dict[str, Any]) -> dict[str, list[float]]:
    """Phase -> what it asks for, one number for each of TERMS."""
    timed = {t.name: t.cost for t in predicted(name, results).step.phases}
    return {
        phase: [sum(term(timed[n]) for n in names) for term in TERMS.values()]
        for phase, names in OF_PHASE.items()
    }


def predicted(name: str, results: dict[str, Any]) -> Any:
    """The plan of a setting on one core."""
    from fst_fast.plan.advice import plan
    from fst_fast.plan.machines import CPU_CORE
    from fst_fast.plan.shapes import shape_of
    from fst_fast.plan.workload import Assumed

    model, _, keys = SETTINGS[name]
    load = load_of(name)
    config = configure(model, load, keys)
    core = replace(CPU_CORE, memory=24 * 10**9)
    assumed = Assumed(load.context, load.problem, load.response, 0.0, 0.0)
    return plan(config, shape_of(results["models"][model], model), core, 1, assumed)


def normal(row: dict[str, Any]) -> dict[str, float]:
    """Seconds as if the probe ran at REFERENCE."""
    scale = statistics.mean(row["probe"]) / REFERENCE
    return {phase: s * scale for phase, s in row["seconds"].items()}


def fit(results: dict[str, Any]) -> dict[str, float]:
    """The rates of one core that fit the settings of FIT, by least squares of errors relative to the step."""
    from scipy.optimize import nnls

    rows, wanted = [], []
    for name in FIT.keys() & results["rows"].keys():
        seconds, of_phase = normal(results["rows"][name]), costs(name, results)
        step = sum(seconds.values())
        for phase in PHASES:
            weight = 1 / (step * seconds[phase]) ** 0.5
            rows.append([x * weight for x in of_phase[phase]])
            wanted.append(seconds[phase] * weight)
    a = np.array(rows)
    size = np.abs(a).max(0)
    found, _ = nnls(a / size, np.array(wanted))
    return {
        term: (x if term == "launch" else 1 / x if x else 0.0)
        for term, x in zip(TERMS, found / size, strict=True)
    }


def check(results: dict[str, Any], names: Any) -> list[dict[str, Any]]:
    """Of every setting measured seconds (normal), predicted seconds and the error of the step."""
    out = []
    for name in names:
        if name in results["rows"]:
            timed = {t.name: t.seconds for t in predicted(name, results).step.phases}
            mine = {phase: sum(timed[n] for n in parts) for phase, parts in OF_PHASE.items()}
            real = normal(results["rows"][name])
            total, guess = sum(real.values()), sum(mine.values())
            out.append(
                {"name": name, "measured": real, "predicted": mine, "step": total, "error": guess / total - 1}
            )
    return out


# ---------------------------------------------------------------------------------------------------------------- 8B on eight GPUs

QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
# bytes for keys and values from the second step on, when the allocator's reserve counted as used
KV_SECOND_STEP = 20 * 10**9
# hidden states streamed again for every column tile; dW summed every 2,632 rows, not 8,192
HEAD_BYTES_PER_ROW = 80e9 / 16384 + 1.29e6


def eight() -> list[tuple[str, Any, float]]:
    """(what was changed, the plan, seconds of a step with it and all changes above it)."""
    from fst_fast.config import load
    from fst_fast.plan.advice import plan
    from fst_fast.plan.machines import machine
    from fst_fast.plan.memory import Setting
    from fst_fast.plan.shapes import shape_of
    from fst_fast.plan.workload import Assumed

    eager = [f"--rollout.kv_memory_bytes={KV_SECOND_STEP}", "--rollout.cuda_graphs=false"]
    config = load.load(Path(__file__).parents[1] / "configs/paper/math.yaml", eager)
    h200, out = machine("H200"), []
    fused, head, here = ("fused layers in decoding", {"rollout.cuda_graphs": "auto"}), 0.0, None
    with mock.patch.object(Setting, "lean", False):  # the layers of transformers
        for what, change in (
            ("as it was read", {}),
            ("KV budget counts the allocator's reserve", {"rollout.kv_memory_bytes": None}),
            ("head: tiles grouped, 8,192 rows gathered", {}),
            ("rollout.cuda_graphs=true", {"rollout.cuda_graphs": True}),
        ):
            if here is None:
                here = plan(config, shape_of(QWEN3_8B, "Qwen3-8B"), h200, 8, Assumed())
                head = HEAD_BYTES_PER_ROW * here.step.response_tokens / 8 / h200.bandwidth
            here = here.changed(change)
            out.append((what, here, here.step.seconds + (0.0 if len(out) > 1 else head)))
    for what, change in (
        fused,
        ("policy.liger=true", {"policy.liger": True}),
        ("policy.zero_stage=2", {"policy.zero_stage": 2}),
    ):
        here = here.changed(change)
        out.append((what, here, here.step.seconds))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("what", choices=["measure", "fit", "check", "eight", "child"])
    parser.add_argument("--only", nargs="+", default=list(SETTINGS), choices=SETTINGS, metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan_times.json"))
    args = parser.parse_args()
    results = read_results(args.out)
    if args.what == "child":
        print(json.dumps(measure(args.only[0])))
    elif args.what == "eight":
        for what, here, took in eight():
            sampled = sum(t.seconds for t in here.step.phases if t.name in ("prefill", "decode", "verify"))
            print(
                f"{what:45} {took:7.1f} s a step, sampling {sampled:6.1f} s, {here.rollouts / took:5.2f} rollouts/s"
            )
    elif args.what == "fit":
        print({term: float(f"{x:.3g}") for term, x in fit(results).items()})
    elif args.what == "check":
        for names in (FIT, JUDGED):
            rows = check(results, names)
            for row in rows:
                phases = "  ".join(f"{p} {row['predicted'][p]:.2f}/{row['measured'][p]:.2f}" for p in PHASES)
                print(f"{row['name']:28} {row['step']:7.2f} s {row['error']:+6.0%}   {phases}")
            errors = [abs(row["error"]) for row in rows]
            if errors:
                print(
                    f"median error of a step {statistics.median(errors):.1%}, largest {max(errors):.1%}, {len(errors)} settings\n"
                )
    elif args.what == "measure":
        for name in args.only:
            if name in results["rows"] or not (folder_of(SETTINGS[name][0]) / "config.json").is_file():
                continue
            command = [sys.executable, "-m", "benchmarks.plan", "child", "--only", name]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if child.returncode:
                raise SystemExit(f"{name}: {child.stderr[-3000:]}")
            add_row(args.out, name, SETTINGS[name][0], json.loads(child.stdout.splitlines()[-1]))
            print(name, "measured", flush=True)


if __name__ == "__main__":
    main()
