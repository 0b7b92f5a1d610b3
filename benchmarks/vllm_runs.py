"""Whole runs sampled by vLLM beside the same runs sampled by the own engine: rewards, mismatch, and what slow.mismatch changes.

    python benchmarks/vllm_runs.py run --vllm ENV/bin/vllm [--only mini] [--seeds 0 1 2] [--folder runs/vllm_runs]
    python benchmarks/vllm_runs.py table

    mini           30 steps of FST on the mini world's list programs, on both backends
    mini-bfloat16  the same by rl on a server that computes in bfloat16 while the trainer computes in float32, without and with
                   slow.mismatch=tis: what an importance weight has to mend
    smollm2        10 steps of rl on SmolLM2 (--model, of scripts/fetch_model.py), on both backends

Runs go on one after the other, seed by seed. One that has ended is not run again, one that was interrupted is continued, and
benchmarks/results/vllm_runs.json holds those that have ended, written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, arguments, cpu_environment, records, write

OUT = ROOT / "benchmarks/results/vllm_runs.json"
LAST = 10  # steps whose mean is a run's training reward
CELLS = ("neither", "context", "weights", "both")
COMMON = ["--eval.every=0", "--eval.samples=2", "--checkpoint.every=10", "--slow.problems_per_step=8", "--slow.group_size=8"]  # fmt: skip
MINI = [
    "configs/mini/list_programs.yaml", *COMMON, "--slow.steps=30", "--slow.warmup_steps=2", "--fast.population=2", "--fast.cycle_steps=6",
    "--fast.anchor_size=16", "--fast.rollout_budget=240", "--eval.final_problems=64",
]  # fmt: skip
SMOLLM2 = [
    "configs/laptop/lower_case_smollm2.yaml", *COMMON, "--method=rl", "--slow.steps=10", "--eval.final_problems=20", "--eval.kl_problems=4",
]  # fmt: skip
BFLOAT16 = [*MINI, "--method=rl"]
WORLDS: dict[str, dict[str, tuple[list[str], dict[str, Any] | None]]] = {
    "mini": {"native": (MINI, None), "vllm": (MINI, {})},
    "mini-bfloat16": {
        f"vllm, {mismatch}": ([*BFLOAT16, f"--slow.mismatch={mismatch}"], {"args": ["--dtype=bfloat16"], "max_mismatch": 0.05})
        for mismatch in ("none", "tis")
    },
    "smollm2": {"native": (SMOLLM2, None), "vllm": (SMOLLM2, {})},
}  # fmt: skip


def command(args: argparse.Namespace, world: str, side: str, seed: int, folder: Path) -> list[str]:
    words, server = WORLDS[world][side]
    more = [f"--seed={seed}"]
    if world == "smollm2":
        more.append(f"--model.path={args.model}")
    if server is not None:
        given = {"command": args.vllm, "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}, **server}  # fmt: skip
        given["args"] = ["--enforce-eager", *given.get("args", [])]
        more += ["--rollout.backend=vllm", f"--rollout.backend_args={json.dumps(given)}"]
    resume = ["--resume"] if (folder / "fst-run.json").exists() else []
    return [sys.executable, "train.py", *words, *more, "--run-dir", str(folder), *resume]


def collect(folder: Path) -> dict[str, Any]:
    """What the files of a run that has ended say."""
    lines, timing = records(folder, "metrics"), records(folder, "timing")
    steps = [r for r in lines if r["kind"] == "step"]
    (final,) = (r for r in lines if r["kind"] == "eval" and r["final"])
    curves = ("reward", "mismatch_kl", "mismatch_weight", "mismatch_cut", "probe_mismatch", "grad_norm", "reused_rollouts")  # fmt: skip
    return {
        "reward_last_steps": statistics.mean(r["reward"] for r in steps[-LAST:]),
        "cells": {name: final["channels"][name] for name in CELLS if name in final["channels"]},
        "rollouts": steps[-1]["rollouts"],
        "server_restarts": steps[-1].get("server_restarts"),
        **{name: [r.get(name) for r in steps] for name in curves},
        "seconds": {
            kind: sum(row.get(kind) or 0.0 for row in timing)
            for kind in ("rollout_s", "train_s", "fast_s", "eval_s")
        },
    }


def run(args: argparse.Namespace) -> None:
    found = json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}}
    environment = cpu_environment(args.threads)
    for seed in args.seeds:
        for world in args.only:
            for side in WORLDS[world]:
                name = f"{world}, {side}, seed {seed}"
                if name in found["runs"]:
                    continue
                folder = args.folder.resolve() / name.replace(", ", "-").replace(" ", "")
                folder.parent.mkdir(parents=True, exist_ok=True)
                begun = time.monotonic()
                if not (folder / "summary.json").exists():
                    log = folder.with_name(folder.name + ".log")
                    with log.open("a") as printed:
                        done = subprocess.run(command(args, world, side, seed, folder), cwd=ROOT, env=environment, stdout=printed, stderr=printed, check=False)  # fmt: skip
                    if done.returncode:
                        raise SystemExit(f"{name} ended with {done.returncode}; see {log}")
                took = round(time.monotonic() - begun, 1)
                print(f"{name}: {took} s", flush=True)
                found["runs"][name] = {"world": world, "side": side, "seed": seed, "wall_s": took, "load_average": os.getloadavg()[0], **collect(folder)}  # fmt: skip
                found["settings"] = {
                    w: {s: words[0] for s, words in sides.items()} for w, sides in WORLDS.items()
                }
                found["hardware"] = (
                    f"{os.cpu_count()} cores of {platform.machine()}, {args.threads} threads each for trainer and server"
                )
                write(args.out, found)


def table(args: argparse.Namespace) -> None:
    """Markdown: a row for each world and side, mean and range over its seeds."""

    def spread(values: list[float], form: str) -> str:
        low, high = min(values), max(values)
        return f"{statistics.mean(values):{form}}" + (
            f" ({low:{form}} to {high:{form}})" if len(values) > 1 else ""
        )

    runs = list(json.loads(args.out.read_text())["runs"].values())
    print(
        "| world | side | seeds | reward, last 10 steps | reward, final | mismatch_kl, mean size | weight | probe |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for world, sides in WORLDS.items():
        for side in sides:
            rows = [r for r in runs if (r["world"], r["side"]) == (world, side)]
            if not rows:
                continue
            cell = "both" if "both" in rows[0]["cells"] else "weights"
            # A step that reuses rollouts of older weights has a mismatch on purpose.
            kl = [
                abs(k)
                for r in rows
                for k, before, reused in zip(
                    r["mismatch_kl"], [0, *r["reused_rollouts"]], r["reused_rollouts"], strict=False
                )
                if k is not None and reused == before
            ]
            weights = [w for r in rows for w in r["mismatch_weight"] if w is not None]
            probes = [p for r in rows for p in r["probe_mismatch"] if p is not None]
            shown = (
                f"{statistics.mean(kl):.1e}" if kl else "",
                f"{statistics.mean(weights):.4f}" if weights else "",
                f"{max(probes):.1e}" if probes else "",
            )
            rewards = [r["reward_last_steps"] for r in rows], [r["cells"][cell]["mean"] for r in rows]
            print(
                f"| {world} | {side} | {len(rows)} | {spread(rewards[0], '.3f')} | {spread(rewards[1], '.3f')} | {' | '.join(shown)} |"
            )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--vllm", default="vllm", metavar="PROGRAM")
    parser.add_argument("--model", default="models/smollm2-135m", metavar="FOLDER", help="of smollm2")
    parser.add_argument("--only", nargs="+", choices=WORLDS, default=list(WORLDS), metavar="WORLD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/vllm_runs")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    run(args) if args.what == "run" else table(args)


if __name__ == "__main__":
    main()
