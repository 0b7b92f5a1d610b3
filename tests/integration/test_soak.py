"""2,000 steps of a tiny run: memory, open files and child processes stay as they are. `make soak` prints the slopes; 200 steps are a chaos test.

The model has one layer of width 16 and random weights, the task rewards the parity of the response's length, so that almost every step has a
gradient. Nothing else is left out: fast phases with a reflector, verification in children, evaluations, checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fst_fast import mini
from tests.integration import crash

TASK = """
from fst_fast.contracts import Problem, Verdict

class Parity:
    def problems(self, split):
        words = ["goal", "path", "trace", "box", "final", "first", "back", "put"]
        return [Problem(f"{split}/{a}-{b}", [{"role": "user", "content": f"{a} {b}"}], 0) for a in words for b in words]

    def verify(self, problem, response):
        return Verdict(float(len(response) % 2), "odd" if len(response) % 2 else "even")

def reflect(prompt):
    return "```\\nput the final answer in the box " + "." * (len(str(prompt)) % 5 + 1) + "\\n```"
"""
WARM = 0.25  # share of the steps after which nothing may grow any more
EVERY = 10  # steps between two looks
LIMIT_KIB = 4.0  # that memory may grow in a step: 8 MiB over 2,000; a batch or a graph kept by mistake is 10 times as much


def watch(out: str) -> None:
    """Note what this process and its children hold, every few steps."""
    import psutil

    from fst_fast.run import recorder

    step, me = recorder.step, psutil.Process()

    def noting(s: Any, *given: Any, **named: Any) -> None:
        step(s, *given, **named)
        if s.state.step % EVERY == 0:
            children = me.children(recursive=True)
            seen = {
                "step": s.state.step,
                "memory_kib": me.memory_info().rss / 1024,
                "children_memory_kib": sum(child.memory_info().rss for child in children) / 1024,
                "files": me.num_fds(),
                "children": len(children),
                "threads": me.num_threads(),
            }
            with open(out, "a") as file:
                file.write(json.dumps(seen) + "\n")

    recorder.step = noting


def tiny_model(folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(mini.path())
    for key, value in {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "layer_types": ["full_attention"], "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8,
    }.items():  # fmt: skip
        setattr(config, key, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(mini.path()).save_pretrained(folder)
    return folder


def soak(folder: Path, steps: int) -> list[dict[str, float]]:
    """Run that many steps; what was held on the way."""
    (folder / "task.py").write_text(TASK)
    noted = folder / "noted.jsonl"
    argv = [
        "train", "--run-dir", str(folder / "run"), f"--task={folder / 'task.py'}:Parity", f"--model.path={tiny_model(folder / 'model')}",
        f"--fast.reflector={folder / 'task.py'}:reflect", f"--slow.steps={steps}", "--slow.problems_per_step=2", "--slow.group_size=4",
        "--slow.lr=1e-4", "--rollout.max_response_tokens=3", "--fast.population=2", "--fast.cycle_steps=10", "--fast.anchor_size=2",
        "--fast.children=2", "--fast.samples=1", "--fast.rollout_budget=12", "--eval.every=100", "--eval.problems=2", "--eval.final_problems=2",
        "--eval.samples=1", "--eval.kl_problems=1", "--checkpoint.every=50", "--on_nonfinite=skip",
    ]  # fmt: skip
    code, printed = crash.fst(*argv, printed=folder / "out", hook=Watch(str(noted)))
    assert code == 0, printed[-3000:]
    return [json.loads(line) for line in noted.read_text().splitlines()]


class Watch:
    """`watch` with its argument, as a hook that can be sent to the process of the run."""

    def __init__(self, out: str) -> None:
        self.out = out

    def __call__(self) -> None:
        watch(self.out)


def slopes(noted: list[dict[str, float]]) -> dict[str, float]:
    """Growth a step of everything noted, after the warm-up: the least-squares line."""
    warm = noted[int(WARM * len(noted)) :]
    at = [seen["step"] for seen in warm]
    return {
        key: float(np.polyfit(at, [seen[key] for seen in warm], 1)[0]) for key in warm[0] if key != "step"
    }


def check(noted: list[dict[str, float]], limit_kib: float) -> None:
    found = slopes(noted)
    for key in ("files", "children", "threads"):
        warm = [seen[key] for seen in noted[int(WARM * len(noted)) :]]
        assert max(warm) == min(warm), f"{key}: {min(warm)} to {max(warm)}"
    for key in ("memory_kib", "children_memory_kib"):
        assert found[key] < limit_kib, f"{key} grows by {found[key]:.2f} KiB a step"


@pytest.mark.chaos
def test_200_steps_leave_no_file_open_and_no_child_behind(tmp_path: Path) -> None:
    check(soak(tmp_path, 200), limit_kib=20.0)  # too short for memory to settle


@pytest.mark.long
def test_2000_steps_hold_what_the_first_ones_held(tmp_path: Path) -> None:
    noted = soak(tmp_path, 2000)
    seconds = [
        json.loads(line)["seconds"] for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()
    ]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updated = sum(s["kind"] == "step" and s["grad_norm"] not in (0, None) for s in steps)
    print(f"\n2,000 steps in {seconds[-1]:.0f} s, {updated} of them with an update")
    for key, slope in slopes(noted).items():
        print(
            f"{key:22} first {noted[0][key]:10.0f}   last {noted[-1][key]:10.0f}   slope after {WARM:.0%}: {slope:+.4f} a step"
        )
    assert updated > 1000
    check(noted, LIMIT_KIB)
