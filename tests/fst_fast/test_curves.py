"""The curves of the report: fits, the target, running means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fst_fast.report import curves
from fst_fast.report.load import load_runs
from tests.fst_fast.test_report import metrics_of, the_three


def test_the_sigmoid_fit_recovers_the_curve_that_made_the_data() -> None:
    x = np.linspace(0, 600, 13)
    with np.errstate(divide="ignore"):
        y = 0.05 + (0.6 - 0.05) / (1 + (150 / x) ** 1.7)
    fit = curves.fit_sigmoid(curves.Series(x, y, np.zeros_like(x)), 0.05)
    assert isinstance(fit, curves.Fit)
    assert (fit.asymptote, fit.midpoint, fit.exponent) == (
        pytest.approx(0.6, abs=1e-4),
        pytest.approx(150, rel=1e-3),
        pytest.approx(1.7, rel=1e-3),
    )
    assert fit.points == 12
    assert fit.note == ""
    assert fit.rmse < 1e-6


def test_a_fit_that_would_mean_nothing_is_refused_with_the_reason() -> None:
    def series(x: list[float], y: list[float]) -> curves.Series:
        return curves.Series(np.array(x), np.array(y), np.zeros(len(x)))

    x, y = [1.0, 2, 3, 4, 5, 6], [0.1, 0.2, 0.3, 0.35, 0.4, 0.42]
    assert isinstance(curves.fit_sigmoid(series(x, y), 0.05), curves.Fit)
    assert "5 evaluations after the start, at least 6" in str(
        curves.fit_sigmoid(series([0, *x[1:]], y), 0.05)
    )
    assert "same place" in str(curves.fit_sigmoid(series([3.0] * 6, y), 0.05))
    assert "never changed" in str(curves.fit_sigmoid(series(x, [0.05] * 6), 0.05))
    assert "seed context was not evaluated" in str(curves.fit_sigmoid(series(x, y), None))
    straight = curves.fit_sigmoid(series(x, [0.05 + 0.02 * c for c in x]), 0.05)
    assert isinstance(straight, curves.Fit)
    assert straight.note


def test_the_target_is_reached_at_the_first_evaluation_above_it(tmp_path: Path) -> None:
    runs = load_runs(the_three(tmp_path))
    target = curves.peak(runs[1])
    assert target == max(
        line["channels"]["both"]["mean"] for line in metrics_of(tmp_path / "rl") if line["kind"] == "eval"
    )
    reached = curves.cost_to_reach(runs, target)
    first = next(
        line
        for line in metrics_of(tmp_path / "fst")
        if line["kind"] == "eval" and line["channels"]["both"]["mean"] >= target
    )
    assert reached[0].at["steps"] == first["step"]
    assert reached[0].at["rollouts"] == first["rollouts"]
    assert reached[2].at["steps"] is None  # gepa takes none
    assert reached[1].at
    assert curves.cost_to_reach(runs, 2.0)[0].at == {}


def test_the_running_mean_invents_no_values() -> None:
    assert curves.smooth(np.array([0.0, 1, 2, 3, 4]), 3).tolist() == [0, 1, 2, 3, 4]
    assert curves.smooth(np.array([1.0, 0, 0, 0, 2]), 5).tolist() == pytest.approx([1, 1 / 3, 0.6, 2 / 3, 2])
    assert curves.smooth(np.array([]), 3).tolist() == []
