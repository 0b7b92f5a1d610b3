"""The recipe knobs that a resumed run must take up where they were: what dynamic sampling draws, the schedule, the refreshed reference."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.integration.crash import fst, same, train, train_two
from tests.integration.launch import records
from tests.integration.test_guard import spoil

KNOBS = (
    "--slow.objective=gspo", "--slow.dynamic_sampling=2", "--slow.lr_schedule=cosine", "--slow.lr_min_ratio=0.1", "--slow.reference.every=2",
    "--slow.kl_coef=0.1", "--slow.mismatch=tis", "--slow.mask_overlong=true", "--eval.every=0",
)  # fmt: skip


def checked(folder: Path) -> None:
    """The knobs have acted, and the reference is in the checkpoint."""
    steps = records(folder, "step")
    assert [s["lr"] / steps[0]["lr"] for s in steps] == pytest.approx([1, 0.8681, 0.55, 0.2319], rel=1e-3)
    kls = [s["kl"] for s in steps]
    assert max(kls[0], kls[2]) < 1e-9 < 1e-6 < min(kls[1], kls[3]), "refreshed after two steps"
    assert not (folder / "checkpoints" / "step-000002" / "reference").exists()
    assert (folder / "checkpoints" / "step-000003" / "reference" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "more",
    [(), pytest.param(("--policy.lora={rank: 4}", "--slow.lr=1e-2"), marks=pytest.mark.chaos)],
    ids=["weights", "LoRA"],
)
def test_a_killed_run_with_all_knobs_continues_bit_equal(more: tuple[str, ...], tmp_path: Path) -> None:
    how = (*KNOBS, "--slow.reward_clip=[0, 0.9]", "--checkpoint.keep_last=3", *more)
    code, printed = train(tmp_path / "whole", *how)
    assert code == 0, printed
    checked(tmp_path / "whole")
    assert more or sum(s["refill_rounds"] for s in records(tmp_path / "whole", "step")) > 0
    code, printed = train(tmp_path / "run", *how, fault="optimiser:4")
    assert code == -signal.SIGKILL, printed
    code, printed = train(tmp_path / "run", *how, "--resume")
    assert code == 0, printed
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.chaos
def test_two_processes_under_zero_3_with_offloaded_parameters_continue_bit_equal(tmp_path: Path) -> None:
    how = (
        *KNOBS,
        "--policy.zero_stage=3",
        "--policy.offload_optimizer=true",
        "--policy.offload_parameters=true",
    )
    codes, printed = train_two(tmp_path / "whole", *how)
    assert codes == [0, 0], printed
    checked(tmp_path / "whole")
    codes, printed = train_two(tmp_path / "run", *how, fault="optimiser:4", limit_s=60)
    assert -signal.SIGKILL in codes, printed
    codes, printed = train_two(tmp_path / "run", *how, "--resume")
    assert codes == [0, 0], printed
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.chaos
def test_a_dumped_step_is_replayed_with_its_refreshed_reference(tmp_path: Path) -> None:
    code, printed = train(tmp_path / "run", *KNOBS, "--slow.reference.every=1", hook=spoil)
    assert code == 2, printed
    [dump] = (tmp_path / "run" / "dumps").iterdir()
    assert (dump / "reference" / "model.safetensors").is_file()
    code, printed = fst("replay", str(dump), printed=tmp_path / "replay.out")
    assert code == 0, printed
    assert re.search("^the same numbers$", printed, re.MULTILINE)


def shape_on_one_process() -> None:
    """A shaping function that fails on the second of two processes."""
    import os

    os.environ["SHAPE_FAILS"] = "1" if os.environ["RANK"] == "1" else ""


@pytest.mark.chaos
def test_a_shaping_function_that_fails_on_one_process_ends_all_with_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "shape.py").write_text(
        "import os\n\ndef shape(problem, rollouts):\n    return [1 / (os.environ['SHAPE_FAILS'] == '') for r in rollouts]\n"
    )
    codes, printed = train_two(
        tmp_path / "run", f"--slow.reward_shaping={tmp_path}/shape.py:shape", hook=shape_on_one_process
    )
    assert codes == [2, 2], printed
    assert len(re.findall(r"^fst: .*the function failed: ZeroDivisionError", printed, re.MULTILINE)) >= 1
