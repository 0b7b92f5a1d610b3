"""What was not measured is null from the writer to every reader, and the writer keeps to the schema of metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import fst_fast
from fst_fast.experiments.curves import Curve, load_curve
from fst_fast.experiments.result import mean_stderr, plus_minus
from fst_fast.report import curves, figures, write_report
from fst_fast.report.load import Step, load_runs
from fst_fast.run.metrics import numbers_of
from fst_fast.run.metrics_schema import VERSION, AnyRecord, check_record, json_schema

ROOT = Path(__file__).parents[2]
TASK = """
from fst_fast import Problem, Verdict

class Unclear:
    def problems(self, split):
        return [Problem(f"{split}{i}", [{"role": "user", "content": f"path from {i} to 2 ?"}], None) for i in range(8)]

    def verify(self, problem, response):
        return Verdict(None, "nobody can tell")
"""
OF_TRAINING = ("loss", "kl", "entropy", "grad_norm", "ratio_mean", "clipped_fraction", "mismatch_kl")


def records_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unjudged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run whose grader can judge nothing, so that nothing is trained; with its result."""
    folder = tmp_path_factory.mktemp("unjudged")
    (folder / "unclear.py").write_text(TASK)
    return fst_fast.train(
        run_dir=folder / "run",
        task=f"{folder}/unclear.py:Unclear",
        slow={"steps": 2, "problems_per_step": 4},
        fast={"anchor_size": 4, "cycle_steps": 1, "rollout_budget": 40, "samples": 1, "children": 2},
        eval={"every": 1, "problems": 2, "final_problems": 2, "samples": 1, "kl_problems": 1},
    )


def test_a_run_in_which_nothing_was_judged_has_null_and_no_false_zero(unjudged: Any) -> None:
    records = records_of(unjudged.run_dir)
    for record in records:
        check_record(record)
    steps, cycles, evals = ([r for r in records if r["kind"] == kind] for kind in ("step", "cycle", "eval"))
    assert (len(steps), len(cycles), len(evals)) == (2, 2, 3)
    for step in steps:
        assert {name: step[name] for name in (*OF_TRAINING, "reward", "reward_std")} == dict.fromkeys(
            (*OF_TRAINING, "reward", "reward_std")
        )
        assert step["unjudged"] == 4 * 8
        assert step["groups_kept"] == 0
        assert step["response_tokens"] > 0, "this was measured"
    for cycle in cycles:
        assert (cycle["best_mean"], cycle["seed_mean"]) == (None, None)
        assert {c["mean"] for c in cycle["population"]} == {None}
    cell = {"mean": None, "stderr": None, "pass_at_k": None, "n": 0, "k": 1}
    for line in evals:
        assert set(map(str, line["channels"].values())) == {str(cell)}
        assert line["kl_seed"] == 0.0, "the weights have not moved: this is known without a reward"


def test_every_reader_copes_with_what_is_not_there(unjudged: Any, tmp_path: Path) -> None:
    step, evaluation = unjudged.metrics["step"], unjudged.metrics["eval"]
    for name in ("reward", "kl", "grad_norm"):
        assert step[name].shape == (2,)
        assert np.isnan(step[name]).all()
    assert np.isnan(evaluation["channels/both/mean"]).all()
    assert (evaluation["channels/both/n"] == 0).all()
    assert unjudged.summary["channels"]["both"]["mean"] is None

    page = write_report([unjudged.run_dir], tmp_path).read_text()
    assert "not evaluated" in page
    [run] = load_runs([unjudged.run_dir])
    assert not len(curves.training(run, "steps"))
    assert isinstance(figures.cells([run], [run.evals[-1].channels]), str)
    curve = load_curve(unjudged.run_dir)
    assert np.isnan(curve.cell("both"))
    assert np.isnan(curve.peak())


def test_what_was_not_measured_is_drawn_as_a_gap(tmp_path: Path) -> None:
    rewards = [0.1, None, 0.3, None, None, 0.2, 0.4, None]
    kl = [0.5, 0.5, None, 0.5, 0.5, 0.5, 0.5, 0.5]
    lines: list[dict[str, Any]] = [{"kind": "start", "method": "rl", "seed": 0, "task": "t", "model": "m"}]
    lines += [
        {"kind": "step", "step": i, "reward": r, "kl": k, "groups": 4, "groups_kept": 0 if i == 3 else 2}
        for i, (r, k) in enumerate(zip(rewards, kl, strict=True))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [run] = load_runs([tmp_path])
    series = curves.training(run, "steps")
    gaps = [r is None for r in rewards]
    assert np.isnan(series.y).tolist() == gaps
    assert series.x.tolist() == list(range(8))
    assert np.isnan(curves.smooth(series.y, 3)).tolist() == gaps
    assert curves.smooth(series.y, 3)[5:7].tolist() == pytest.approx([0.3, 0.3])
    assert np.isnan(curves.diagnostic(run, "kl").y).tolist() == [i in (2, 3) for i in range(8)]

    drawn = figures.training([run])
    assert not isinstance(drawn, str)
    ax = drawn.axes[0]
    line, dots = ax.get_lines()[0], ax.get_lines()[1]
    assert np.isnan(line.get_ydata()).tolist() == gaps
    assert dots.get_marker() == "."
    assert dots.get_xdata().tolist() == [0, 2], "points between two gaps, which a line does not show"
    assert ax.get_ylim()[1] > 0.4
    drawn = figures.diagnostics([run])
    assert not isinstance(drawn, str)


def test_zeros_that_earlier_versions_wrote_for_nothing_are_read_as_gaps() -> None:
    old = {"step": 1, "groups": 8, "groups_kept": 0, "reward": 0.0, **dict.fromkeys(OF_TRAINING, 0.0)}
    step = Step.model_validate(old)
    assert (step.kl, step.entropy, step.grad_norm, step.reward) == (None, None, None, 0.0)
    assert Step.model_validate({**old, "groups_kept": 1}).kl == 0.0


def test_experiments_take_a_gap_for_a_gap() -> None:
    at = {"steps": np.arange(4.0)}
    nan = np.full(4, np.nan)
    curve = Curve("rl", 0, at, np.array([0.1, np.nan, 0.5, 0.3]), nan, nan, {})
    assert curve.peak() == pytest.approx(0.4)
    assert curve.cost_to_reach("steps", 0.4) == 2
    assert mean_stderr([0.5, float("nan")]) == {"mean": None, "stderr": None}
    assert plus_minus(mean_stderr([float("nan")])) == "not measured"
    assert mean_stderr([0.5, 0.7])["mean"] == pytest.approx(0.6)


def test_trackers_leave_null_out_and_arrays_have_nan() -> None:
    record = {"step": 1, "kl": None, "channels": {"both": {"mean": None, "n": 0}}, "task": "t"}
    assert numbers_of(record, "x") == {"x/step": 1.0, "x/channels/both/n": 0.0}
    assert str(numbers_of(record, "x", missing=float("nan"))["x/channels/both/mean"]) == "nan"


GOOD: dict[str, Any] = {"kind": "end", "step": 3}


@pytest.mark.parametrize(
    "record",
    [
        {**GOOD, "more": 1},
        {"kind": "end"},
        {"kind": "ended", "step": 3},
        {**GOOD, "step": None},
        {**GOOD, "step": 3.0},
        {**GOOD, "step": -1},
        {"step": 3},
    ],
)
def test_the_schema_refuses_what_it_does_not_know(record: dict[str, Any]) -> None:
    assert check_record(GOOD).step == 3
    with pytest.raises(ValidationError):
        check_record(record)


def test_the_docs_describe_every_kind_and_field() -> None:
    page = (ROOT / "docs/run_folder.md").read_text()
    missing = []
    for model in AnyRecord.__origin__.__args__:  # type: ignore[attr-defined]
        kind = model.model_fields["kind"].annotation.__args__[0]
        missing += [kind] * (f"| `{kind}` |" not in page)
        missing += [
            f"{kind}.{name}" for name in model.model_fields if name != "kind" and f"`{name}`" not in page
        ]
    assert not missing
    assert f"version {VERSION}" in page
    assert json_schema()["$id"].endswith(f"/{VERSION}")
