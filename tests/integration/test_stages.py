"""A run through several tasks, and context distillation at a stage's end: what is measured, and that a kill changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.mini import default_config
from fst_fast.mini.world import best_context
from fst_fast.run.metrics_schema import check_record
from tests.integration.crash import train, train_two
from tests.integration.launch import records

STAGES = "--stages=[{task: star_graph, task_args: {form: mini, arms: 5, path: 4, ids: 40}, steps: 4}, {task: linked_facts, steps: 4}]"
LAST = ("checkpoints", "step-000008", "model", "model.safetensors")
REFLECTOR = """
from fst_fast.mini.world import best_context

def reflect(prompt):
    facts = "facts" in prompt.failures[0].problem
    return "```\\n" + best_context("linked_facts" if facts else "star_graph") + "\\n```"
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a run whose contexts do get better."""
    reflector = tmp_path_factory.mktemp("reflector") / "best.py"
    reflector.write_text(REFLECTOR)
    return [
        STAGES, "--slow.steps=8", "--slow.distill_steps=2", "--checkpoint.every=1", f"--fast.reflector={reflector}:reflect",
        "--fast.seed_context=solve the problem .", "--fast.samples=4", "--fast.anchor_size=4", "--fast.rollout_budget=64",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, staged: list[str]) -> Path:
    run_dir = tmp_path_factory.mktemp("stages") / "run"
    code, printed = train(run_dir, *staged)
    assert code == 0, printed
    assert "stage 2 of 2: linked_facts, steps 5 to 8" in printed
    return run_dir


def test_the_data_follow_the_stages_and_each_end_is_measured_on_all_tasks_so_far(unbroken: Path) -> None:
    ends = records(unbroken, "stage")
    assert [(r["after_stage"], r["stage"], r["task"], r["step"]) for r in ends] == [
        (0, 0, "star_graph", 4), (1, 0, "star_graph", 8), (1, 1, "linked_facts", 8),
    ]  # fmt: skip
    assert json.loads((unbroken / "summary.json").read_text())["stages"] == [
        {k: v for k, v in r.items() if k not in ("kind", "time")} for r in ends[1:]
    ]
    for line in (unbroken / "rollouts.jsonl").read_text().splitlines():
        rollout = json.loads(line)
        first = rollout["step"] < 4 + (rollout["phase"] == "slow")
        assert rollout["problem_id"].startswith("0/star_graph" if first else "1/linked_facts")
    assert [r["stage"] for r in records(unbroken, "eval")] == [0, 0, 0, 1, 1]
    for line in (unbroken / "metrics.jsonl").read_text().splitlines():
        check_record(json.loads(line))


def test_distillation_moves_the_weights_under_the_seed_context_and_contexts_begin_anew(
    unbroken: Path,
) -> None:
    steps = records(unbroken, "step")
    assert [bool(s.get("distilled")) for s in steps] == [False, False, True, True] * 2
    first, then = steps[2:4]
    assert first["kl"] > then["kl"] > 0.01, "towards the teacher from the first step on"
    assert then["grad_norm"] > 0.01
    assert [c["step"] for c in records(unbroken, "cycle")] == [0, 4]
    before, after = ({c["text"] for c in r["population"]} for r in records(unbroken, "cycle"))
    assert best_context("star_graph") in before
    assert after <= {"solve the problem .", best_context("linked_facts")}, (
        "nothing of the first stage is carried over"
    )


@pytest.mark.parametrize(
    "fault",
    [
        "backward:3",
        pytest.param("backward:7", marks=pytest.mark.chaos),
        pytest.param("save.rename:4", marks=pytest.mark.chaos),
    ],
)
def test_a_run_killed_in_a_distillation_or_between_stages_continues_bit_equal(
    unbroken: Path, staged: list[str], tmp_path: Path, fault: str
) -> None:
    code, printed = train(tmp_path / "run", *staged, fault=fault)
    assert code == -9, printed
    code, printed = train(tmp_path / "run", *staged, "--resume")
    assert code == 0, printed
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    assert tmp_path.joinpath("run", *LAST).read_bytes() == unbroken.joinpath(*LAST).read_bytes()


@pytest.mark.chaos
@pytest.mark.parametrize("stage", [0, 3])
def test_two_processes_distil_as_one_does(
    unbroken: Path, staged: list[str], tmp_path: Path, stage: int
) -> None:
    codes, printed = train_two(tmp_path / "run", *staged, f"--policy.zero_stage={stage}")
    assert codes == [0, 0], printed
    one, two = records(unbroken, "step"), records(tmp_path / "run", "step")
    assert [s["reward"] for s in one[:3]] == [s["reward"] for s in two[:3]]
    assert two[2]["kl"] == pytest.approx(one[2]["kl"], rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([STAGES, "--slow.steps=9"], "slow.steps=9 is not the sum of the stages' steps, 8; leave slow.steps out"),
        (["--slow.distill_steps=2", "--method=rl"], "slow.distill_steps=2 needs evolved contexts and weights that move"),
        (["--slow.distill_steps=60"], "slow.distill_steps=60 leaves no step for the rest of the run of 60 steps"),
        ([STAGES, "--slow.steps=8", "--slow.distill_steps=4"], "leaves no step for the rest of a stage of 4 steps"),
    ],
)  # fmt: skip
def test_stages_and_distillation_that_cannot_be_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_load.load(default_config(), overrides)
