"""Collect finished runs of configs/laptop: `python benchmarks/laptop.py RUN... --out benchmarks/results/laptop.json` prints them as a table, too.

For each run: its four cells, rollouts with the fast phase's included, the contexts at the end, and seconds by kind of work.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

SECONDS = ("fast_s", "reflect_s", "rollout_s", "train_s", "eval_s")
CELLS = ("neither", "context", "weights", "both")


def collect(run: Path) -> dict[str, Any]:
    """What summary.json, timing.jsonl, contexts.json and config.yaml of a run folder say."""
    summary = json.loads((run / "summary.json").read_text())
    config = YAML(typ="safe").load((run / "config.yaml").read_text())
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    kept = json.loads((run / "contexts.json").read_text()) if (run / "contexts.json").is_file() else None
    return {
        "run": run.name,
        "task": Path(config["task"]).stem,
        "method": config["method"],
        "seed": config["seed"],
        "steps": summary["steps"],
        **{key: summary[key] for key in ("rollouts", "fast_rollouts", "reused_rollouts", "tokens_computed", "kl_seed", "kl_evolved")},
        "cells": {name: summary["channels"][name] for name in CELLS},
        "contexts": [kept["contexts"][i]["text"] for i in dict.fromkeys(kept["population"])] if kept else [],
        "seconds": {"all": timing[-1]["seconds"], **{kind: sum(row.get(kind) or 0.0 for row in timing) for kind in SECONDS}},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [collect(run) for run in args.runs]
    print("| task | method | steps | rollouts, fast phase included | neither | context | weights | both |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = " | ".join(f"{100 * row['cells'][name]['mean']:.1f}" for name in CELLS)
        print(
            f"| {row['task']} | {row['method']} | {row['steps']} | {row['rollouts']} ({row['fast_rollouts']}) | {cells} |"
        )
    for row in rows:
        print(
            f"{row['run']}: "
            + ", ".join(f"{kind} {seconds:.0f}" for kind, seconds in row["seconds"].items()),
            row["contexts"],
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
