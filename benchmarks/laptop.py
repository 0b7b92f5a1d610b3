"""Collect runs of configs/laptop: `python benchmarks/laptop.py RUN... --out benchmarks/results/laptop.json` prints them as a table, too.

For each run: its four cells, rollouts, training reward by step, every context of its fast phases, and seconds by kind of work (reflect_s is a
part of fast_s).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from benchmarks.measure import arguments, records

SECONDS = ("fast_s", "reflect_s", "rollout_s", "train_s", "eval_s")
CELLS = ("neither", "context", "weights", "both")


def collect(run: Path) -> dict[str, Any]:
    """What the files of a run folder say. Cells are null where the run has not ended."""
    config = YAML(typ="safe").load((run / "config.yaml").read_text())
    lines, timing = records(run, "metrics"), records(run, "timing")
    steps, cycles, evals = ([r for r in lines if r["kind"] == kind] for kind in ("step", "cycle", "eval"))
    final = next((r for r in evals if r["final"]), None)
    last: dict[str, Any] = (evals or steps or cycles)[-1]
    return {
        "run": run.name,
        "task": Path(config["task"]).stem,
        "method": config["method"],
        "seed": config["seed"],
        "lr": config["slow"]["lr"],
        "rollouts": last.get("rollouts"),
        "fast_rollouts": last.get("fast_rollouts"),
        "cells": final and {name: final["channels"][name] for name in CELLS},
        "steps": [{key: r[key] for key in ("step", "reward", "kl")} for r in steps],
        "fast_phases": [
            {
                key: r[key]
                for key in ("proposed", "admitted", "refused", "fast_rollouts", "seed_mean", "best_mean")
            }
            | {"kept": [c["text"] for c in r["population"]]}
            | {"scored": [{key: c[key] for key in ("text", "admitted", "mean", "n")} for c in r["contexts"]]}
            for r in cycles
        ],
        "seconds": {
            kind: sum(row[kind] for row in timing) if timing and kind in timing[0] else None
            for kind in SECONDS
        },
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [collect(run) for run in args.runs]
    print(
        "| run | task | method | steps | rollouts, fast phase included | neither | context | weights | both |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [f"{100 * row['cells'][name]['mean']:.1f}" if row["cells"] else "-" for name in CELLS]
        counts = [str(len(row["steps"])), f"{row['rollouts']} ({row['fast_rollouts']})"]
        print("|", " | ".join([row["run"], row["task"], row["method"], *counts, *cells]), "|")
    for row in rows:
        spent = {kind: "not measured" if s is None else f"{s:.0f}" for kind, s in row["seconds"].items()}
        print(f"{row['run']}:", ", ".join(f"{kind} {s}" for kind, s in spent.items()))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
