"""Check whether two trees of this repository compute the same: metrics.jsonl of short runs, byte by byte.

    python scripts/same_metrics.py record OUT [--tree DIR] [--jobs 2]   # train every run below with the code of DIR
    python scripts/same_metrics.py compare OUT_A OUT_B                  # exit code 1 if a record differs

The runs: every configs/mini/*.yaml for 12 steps with each method, and one run through two tasks whose stages end in
distillation. Each uses one thread, so that the order of summation is fixed. metrics.jsonl holds no times; the figures
depend on the machine and on the versions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FAMILIES = ("star_graph", "list_programs", "linked_facts", "formula_choice")
COMMON = (
    "--eval.every=6", "--eval.problems=16", "--eval.final_problems=24", "--checkpoint.every=6", "--slow.problems_per_step=8",
    "--fast.anchor_size=16", "--fast.rollout_budget=320",
)  # fmt: skip
STAGES = 'stages=[{"task": "star_graph", "task_args": {"form": "mini", "arms": 5, "path": 4, "ids": 40}, "steps": 6}, {"task": "list_programs", "steps": 6}]'


def runs() -> dict[str, list[str]]:
    """Name -> the arguments of `fst train`, without the run folder."""
    found = {
        f"{family}-{method}": [
            f"configs/mini/{family}.yaml",
            "--slow.steps=12",
            f"--method={method}",
            *COMMON,
        ]
        for family in FAMILIES
        for method in ("fst", "rl", "gepa")
    }
    staged = ["configs/mini/star_graph.yaml", f"--{STAGES}", "--slow.steps=12", "--slow.distill_steps=2", "--fast.cycle_steps=3", *COMMON]  # fmt: skip
    return found | {"stages-distilled": staged}


def record(out: Path, tree: Path, jobs: int) -> int:
    """Run whatever is missing in `out`; returns the number of failures."""
    out.mkdir(parents=True, exist_ok=True)
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "kernels")]),
    }  # fmt: skip

    def make(item: tuple[str, list[str]]) -> bool:
        name, words = item
        if (out / name / "summary.json").is_file():
            return True
        command = [sys.executable, str(tree / "train.py"), *words, "--run-dir", str(out / name)]
        with open(out / f"{name}.log", "wb") as log:
            code = subprocess.run(command, cwd=tree, env=env, stdout=log, stderr=log).returncode
        print(f"{name}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)
        return code == 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(not good for good in pool.map(make, runs().items()))


def compare(a: Path, b: Path) -> int:
    """Print the first differing record of each run; returns the number of differing runs."""
    different = 0
    for name in runs():
        left, right = ((folder / name / "metrics.jsonl").read_bytes() for folder in (a, b))
        if left == right:
            print(f"{name}: the same, {len(left.splitlines())} records")
            continue
        different += 1
        rows = zip(left.splitlines(), right.splitlines(), strict=False)
        at, pair = next(((i, pair) for i, pair in enumerate(rows) if pair[0] != pair[1]), (-1, None))
        if pair is None:
            print(f"{name}: one has more records than the other")
            continue
        old, new = (json.loads(line) for line in pair)
        keys = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
        print(
            f"{name}: record {at} differs: "
            + "; ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted(keys))
        )
    return different


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("out", type=Path)
    one.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1])
    one.add_argument("--jobs", type=int, default=2)
    two = commands.add_parser("compare")
    two.add_argument("a", type=Path)
    two.add_argument("b", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        return int(record(args.out.resolve(), args.tree.resolve(), args.jobs) > 0)
    return int(compare(args.a, args.b) > 0)


if __name__ == "__main__":
    sys.exit(main())
