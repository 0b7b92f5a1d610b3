"""One curve under every engine setting: processes, ZeRO stages, micro-batch sizes and launchers change nothing but rounding."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.launch import REPO, one_thread, records

BIN = Path(sys.executable).parent
# 20 steps at a rate at which a weight that differs in its last bits does not yet make another token come out of the sampler.
CURVE = [
    "--slow.steps=20", "--slow.problems_per_step=4", "--slow.group_size=4", "--slow.lr=5e-5", "--slow.warmup_steps=2",
    "--fast.population=2", "--fast.cycle_steps=10", "--fast.anchor_size=4", "--fast.children=2", "--fast.samples=1",
    "--fast.rollout_budget=24", "--task=list_programs",
    "--fast.seed_context=write the list after each operation . put the final answer in the box .",
    "--eval.every=0", "--eval.final_problems=4", "--eval.samples=1", "--eval.kl_problems=2", "--checkpoint.every=0",
]  # fmt: skip


def curve(launcher: list[str], folder: Path, *more: str) -> list[tuple[float, float]]:
    """(loss, reward) of every step."""
    env = {**one_thread(), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*launcher, "train.py", "--run-dir", str(folder), *CURVE, *more],
        capture_output=True, text=True, cwd=REPO, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [(s["loss"], s["reward"]) for s in records(folder, "step")]


def deepspeed() -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(29600 + os.getpid() % 1000)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    steps = curve([sys.executable], tmp_path_factory.mktemp("one") / "run")
    assert len(steps) == 20
    assert sum(loss != 0 for loss, _ in steps) > 10  # a curve, not a line
    return steps


@pytest.mark.parametrize("stage", [1, 3])
def test_two_processes_under_deepspeed_give_the_curve_of_one(
    stage: int, one_process: list[tuple[float, float]], tmp_path: Path
) -> None:
    two = curve(deepspeed(), tmp_path / "run", f"--policy.zero_stage={stage}")
    assert [r for _, r in two] == [r for _, r in one_process]
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in one_process], abs=1e-4)


def test_torchrun_and_small_micro_batches_give_the_curve_of_one_batch(
    one_process: list[tuple[float, float]], tmp_path: Path
) -> None:
    two = curve(
        [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={30700 + os.getpid() % 1000}"],
        tmp_path / "run",
        "--policy.zero_stage=2",
        "--rollout.max_prompt_tokens=200",
        "--slow.tokens_per_micro_batch=300",
        "--slow.head_chunk_rows=64",
    )
    assert [r for _, r in two] == [r for _, r in one_process]
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in one_process], abs=1e-4)


LORA = ["--policy.lora.rank=4", "--slow.lr=3e-4", "--slow.steps=8", "--fast.cycle_steps=4"]


@pytest.fixture(scope="module")
def one_process_with_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    pytest.importorskip("peft")
    steps = curve([sys.executable], tmp_path_factory.mktemp("lora") / "run", *LORA)
    assert sum(loss != 0 for loss, _ in steps) > 4
    return steps


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_train_on_two_processes_as_on_one(
    stage: int, one_process_with_adapters: list[tuple[float, float]], tmp_path: Path
) -> None:
    two = curve(deepspeed(), tmp_path / "run", f"--policy.zero_stage={stage}", *LORA)
    assert [r for _, r in two] == [r for _, r in one_process_with_adapters]
    losses = [loss for loss, _ in one_process_with_adapters]
    assert [loss for loss, _ in two] == pytest.approx(losses, abs=1e-4)


def test_bad_input_under_a_launcher_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [*deepspeed(), "train.py", "--run-dir", str(tmp_path / "run"), "--model.path=/nowhere"],
        capture_output=True, text=True, cwd=REPO, env={**one_thread(), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    sentences = re.findall(r"^fst: .*$", done.stderr + done.stdout, re.MULTILINE)
    assert sentences == [
        "fst: model.path='/nowhere' is neither a folder nor a .gguf file; allowed are a Hugging Face model folder, a .gguf file, 'mini', 'mini_tools', or a model of the Hub (org/name)"
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
