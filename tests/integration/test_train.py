"""The whole run on the shipped mini model: every method, what it leaves behind, and that it can be stopped anywhere."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.launch import REPO, one_thread, records

SMALL = [
    "--slow.steps=5", "--slow.problems_per_step=4", "--slow.group_size=4", "--slow.lr=1e-3", "--slow.warmup_steps=0",
    "--fast.population=2", "--fast.cycle_steps=2", "--fast.anchor_size=4", "--fast.children=2", "--fast.samples=1",
    "--fast.rollout_budget=24", "--task=list_programs",
    "--fast.seed_context=write the list after each operation . put the final answer in the box .",
    "--eval.every=2", "--eval.problems=8", "--eval.final_problems=8", "--eval.samples=2", "--eval.kl_problems=4",
    "--checkpoint.every=2", "--rollout.max_response_tokens=40",
]  # fmt: skip


def command(run_dir: Path, *more: str) -> list[str]:
    return [sys.executable, str(REPO / "train.py"), "--run-dir", str(run_dir), *SMALL, *more]


def run(run_dir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(run_dir, *more), capture_output=True, text=True, cwd=REPO, env=one_thread(), check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An unbroken run of method=fst, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder).stdout


def test_a_run_trains_weights_and_contexts_and_leaves_its_figures(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["channels"]) == ["neither", "context", "weights", "both"]
    assert all({"mean", "stderr"} <= set(cell) for cell in summary["channels"].values())
    assert summary["steps"] == 5
    assert summary["rollouts"] == summary["fast_rollouts"] + 5 * 16 - summary["reused_rollouts"]
    assert 0 < summary["fast_rollouts"] <= 3 * 24
    assert 0 < summary["tokens_computed"] < summary["tokens_unshared"]
    assert summary["kl_seed"] > 0
    assert summary["kl_evolved"] > 0
    steps, cycles = records(folder, "step"), records(folder, "cycle")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    assert [c["step"] for c in cycles] == [0, 2, 4]
    assert any(s["grad_norm"] > 0 for s in steps)
    assert "weights: trained weights, seed context" in printed
    contexts = json.loads((folder / "contexts.json").read_text())
    assert len(contexts["population"]) == 2
    assert set(contexts["population"]) <= set(contexts["contexts"])
    assert all(json.loads(line)["prompt"] for line in (folder / "rollouts.jsonl").read_text().splitlines())


def test_cells_left_out_of_the_evaluations_on_the_way_change_nothing_else(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    run(tmp_path / "run", "--eval.cells=[both]")
    assert records(tmp_path / "run", "step") == records(whole[0], "step")
    few, all_four = (records(folder, "eval") for folder in (tmp_path / "run", whole[0]))
    for some, full in zip(few, all_four, strict=True):
        cells = ["neither", "context", "weights", "both"] if some["final"] else ["both"]
        assert some["channels"] == {name: full["channels"][name] for name in cells}
        assert some["kl_evolved"] == full["kl_evolved"]
        assert some["kl_seed"] == (full["kl_seed"] if some["final"] else None)
    assert [some["final"] for some in few].count(False) >= 2


def test_reused_rollouts_are_claimed_in_the_cycle_that_sampled_them(whole: tuple[Path, str]) -> None:
    steps = records(whole[0], "step")
    assert steps[-1]["reused_rollouts"] > 0
    assert steps[0]["ratio_mean"] == pytest.approx(1, abs=1e-3)  # same weights as in the fast phase


def test_the_trainer_recomputes_the_log_probs_that_were_sampled(whole: tuple[Path, str]) -> None:
    first = records(whole[0], "step")[0]
    assert first["groups_kept"] > 0
    assert abs(first["mismatch_kl"]) < 1e-8


def test_metrics_hold_no_wall_clock_and_a_second_run_repeats_them(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    run(tmp_path / "again")
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()


def test_a_run_killed_at_any_step_and_resumed_is_bit_equal_to_an_unbroken_one(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    with subprocess.Popen(
        command(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=REPO,
        env=one_thread(),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(
                r"step 4/", line
            ):  # past the checkpoint of step 2, in the middle of nothing in particular
                process.send_signal(signal.SIGKILL)
                break
    assert not (folder / "summary.json").exists()
    run(folder, "--resume")
    assert (folder / "metrics.jsonl").read_bytes() == (whole[0] / "metrics.jsonl").read_bytes()
    weights = ("checkpoints", "step-000005", "model", "model.safetensors")
    assert folder.joinpath(*weights).read_bytes() == whole[0].joinpath(*weights).read_bytes()


def test_an_exported_model_loads_in_transformers_and_differs_from_the_base(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fst_fast import mini
    from fst_fast.commands.export import export

    out = export(whole[0], tmp_path / "model")
    trained = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(mini.path(), dtype=trained.dtype)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert json.loads((out / "contexts.json").read_text())["population"]
    moved = [not a.equal(b) for a, b in zip(trained.parameters(), base.parameters(), strict=True)]
    assert all(moved)


def test_a_checkpoint_evaluates_to_the_figures_of_its_own_run(whole: tuple[Path, str]) -> None:
    from fst_fast.commands.evaluate import evaluate_run

    measured = evaluate_run(whole[0])
    reported = json.loads((whole[0] / "summary.json").read_text())
    assert measured["channels"]["both"]["mean"] == pytest.approx(
        reported["channels"]["both"]["mean"], abs=1e-9
    )
    assert measured["kl_evolved"] == pytest.approx(reported["kl_evolved"], rel=1e-3)


def test_a_run_is_evaluated_on_another_split_by_the_command(
    whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fst_fast.cli import main

    out = tmp_path / "ood.json"
    words = ["--split", "ood", "--problems", "4", "--samples", "2", "--out", str(out)]
    assert main(["eval", str(whole[0]), *words]) == 0
    found = json.loads(out.read_text())
    assert found["split"] == "ood"
    assert found["channels"]["both"]["n"] == 4
    assert set(found["channels"]) == {"neither", "context", "weights", "both"}
    assert main(["eval", str(whole[0]), "--split", "no"]) == 2
    assert "there is no split 'no'; allowed are train, validation, ood" in capsys.readouterr().err
    assert main(["eval", str(whole[0]), "--out", str(tmp_path / "none" / "x.json")]) == 2
    assert "none is not there" in capsys.readouterr().err


def test_method_rl_leaves_the_contexts_alone(tmp_path: Path) -> None:
    run(tmp_path / "rl", "--method=rl")
    summary = json.loads((tmp_path / "rl" / "summary.json").read_text())
    assert summary["fast_rollouts"] == 0
    assert records(tmp_path / "rl", "cycle") == []
    assert summary["channels"]["weights"] == summary["channels"]["both"]
    assert summary["kl_seed"] > 0


def test_method_gepa_leaves_the_weights_alone(tmp_path: Path) -> None:
    run(tmp_path / "gepa", "--method=gepa")
    summary = json.loads((tmp_path / "gepa" / "summary.json").read_text())
    assert summary["steps"] == 0
    assert summary["rollouts"] == summary["fast_rollouts"] > 0
    assert summary["kl_seed"] == summary["kl_evolved"] == 0
    assert summary["channels"]["context"] == summary["channels"]["both"]


def test_a_padded_run_takes_the_same_first_step_as_a_forest_run(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    run(
        tmp_path / "padded",
        "--policy.packing=padded",
        "--policy.attention=sdpa",
        "--slow.steps=1",
        "--eval.every=0",
    )
    forest, padded = records(whole[0], "step")[0], records(tmp_path / "padded", "step")[0]
    for key in ("loss", "grad_norm", "kl", "entropy", "reward"):
        assert padded[key] == pytest.approx(forest[key], rel=1e-4, abs=1e-6), key
    assert forest["tokens_computed"] < padded["tokens_computed"]


def test_the_mini_base_as_its_own_reflector_with_short_requests_proposes_what_is_scored_and_not_admitted(
    tmp_path: Path,
) -> None:
    """Its replies are begun for it, so they are whole; what it writes is no help."""
    run(
        tmp_path / "run",
        *("--fast.reflector=self", "--fast.reflection_style=short", "--fast.reflection_tokens=48"),
        *("--slow.steps=2", "--eval.every=0"),
    )
    [cycle] = records(tmp_path / "run", "cycle")
    assert cycle["contexts"]
    assert cycle["admitted"] == 0
    assert len(cycle["contexts"]) + sum(cycle["refused"].values()) == cycle["proposed"]
    assert len(records(tmp_path / "run", "step")) == 2


@pytest.mark.parametrize("reflector", ["self", "user"])
def test_a_reflector_that_proposes_nothing_usable_or_fails_costs_its_proposals_only(
    reflector: str, tmp_path: Path
) -> None:
    """The mini base cannot write a fenced instruction; the user's function raises."""
    name = reflector
    if reflector == "user":
        (tmp_path / "mine.py").write_text("def reflect(prompt):\n    raise RuntimeError('no idea')\n")
        name = f"{tmp_path / 'mine.py'}:reflect"
    run(
        tmp_path / "run",
        f"--fast.reflector={name}",
        f"--fast.reflection_style={'full' if reflector == 'self' else 'auto'}",
        "--slow.steps=2",
        "--eval.every=0",
        "--fast.failures_shown=1",
    )
    [cycle] = records(tmp_path / "run", "cycle")
    assert cycle["proposed"] > 0
    assert cycle["admitted"] == 0
    assert sum(cycle["refused"].values()) == cycle["proposed"]
    assert ("error" in cycle["refused"]) == (reflector == "user")
    assert len(records(tmp_path / "run", "step")) == 2
