"""The experiments: curves from run folders, the runner that makes the runs, verdicts on planted curves."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fst_fast.cli import main
from fst_fast.errors import UserError
from fst_fast.experiments import (
    ablations,
    certainty,
    comparison,
    experiments,
    figures,
    methods,
    no_help,
    page,
    plasticity,
    rivals,
    statistics,
    tools,
    worker,
)
from fst_fast.experiments.curves import AXES, Curve, load_curve, stage_ends
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import FAMILIES, FULL, QUICK, Budget, Run
from fst_fast.report.figures import png
from fst_fast.report.load import Cell
from tests.fst_fast import stub_runs
from tests.fst_fast.test_experiment_statistics import sigmoid

SMALL = Budget(steps=4, eval_every=2, eval_problems=2, final_problems=2, seeds=2)


# --- run folders


def write_run(
    folder: Path, rewards: list[float], *, method: str = "rl", seed: int = 0, cost: int = 10
) -> None:
    """A finished run with an evaluation after every step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, object]] = [
        {"kind": "start", "method": method, "seed": seed, "task": "t", "model": "m"}
    ]
    timing = []
    for step, reward in enumerate(rewards):
        cells = {
            name: {"mean": reward, "stderr": 0.0, "n": 4}
            for name in ("neither", "context", "weights", "both")
        }
        counters = {"rollouts": cost * step, "tokens_computed": 100 * step, "tokens_unshared": 300 * step}
        last = step == len(rewards) - 1
        lines.append({"kind": "eval", "step": step, "final": last, "channels": cells, "kl_seed": step / 10, "kl_evolved": step / 20, **counters})  # fmt: skip
        timing.append({"step": step, "seconds": 5.0 + 3.0 * step, "eval_s": 2.0})
    lines.append({"kind": "stage", "after_stage": 1, "stage": 0, "channels": {"both": {"mean": 0.25}}})
    lines.append({"kind": "end", "step": len(rewards) - 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))


def test_a_run_folder_becomes_a_curve_whose_seconds_leave_evaluations_out(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [0.0, 0.3, 0.6])
    curve = load_curve(tmp_path / "run")
    assert curve.cost["steps"].tolist() == [0, 1, 2]
    assert curve.cost["rollouts"].tolist() == [0, 10, 20]
    assert curve.cost["seconds"].tolist() == [0, 1, 2], "3 seconds a step, 2 of them evaluation"
    assert curve.smooth() == pytest.approx([0.15, 0.3, 0.45])
    assert curve.kl.tolist() == [0, 0.05, 0.1]
    assert stage_ends(tmp_path / "run") == {(1, 0): 0.25}


# --- the runner


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    for name in ("train", "export", "evaluate"):
        monkeypatch.setattr(worker, name, getattr(stub_runs, name))
    return Runner(tmp_path / "out", SMALL, list(FAMILIES), 2, say=lambda line: None)


def test_each_run_is_trained_once_and_one_that_failed_is_named_and_goes_on(runner: Runner) -> None:
    first = Run("star_graph", "rl", 0, {"slow.lr": 1e-3})
    unlucky = Run("star_graph", "rl", stub_runs.FAILS_ONCE)
    later = [Run(family, "rl", 0, after=first) for family in ("linked_facts", "formula_choice")]
    with pytest.raises(
        UserError,
        match=r"1 of 2 runs failed, .*seed=1 \(failed with exit code 1\): .*star_graph-rl-seed=1\.log",
    ):
        runner.train([first, unlucky, first])
    assert (runner.out / "logs" / "star_graph-rl-seed=1.log").read_text() == "fst: no luck\n"
    runner.train([first, unlucky, *later])
    asked = [(runner.folder(run) / "asked").read_text() for run in (first, unlucky, *later)]
    assert asked == ["new ", "new resume ", "new ", "new "]
    weights = runner.out / "models" / first.name
    assert weights.is_dir(), "exported once for both"
    assert str(weights) in (runner.folder(later[0]) / "config.yaml").read_text()


def test_a_finished_run_is_evaluated_once_unless_it_was_trained_again(runner: Runner) -> None:
    run = Run("star_graph", "rl", 0)
    runner.train([run])
    runner.evaluate([run, run], "ood")
    runner.evaluate([run], "ood")
    assert runner.evaluation(run, "ood") == {"split": "ood", "asked": 1}
    (runner.folder(run) / "summary.json").touch()
    runner.evaluate([run], "ood")
    assert runner.evaluation(run, "ood")["asked"] == 2


def test_a_run_that_dies_or_raises_does_not_stop_the_others_and_is_named(runner: Runner) -> None:
    runner.workers = 1
    killed, raising, good = (Run("star_graph", "rl", s) for s in (stub_runs.KILLED, stub_runs.RAISES, 0))
    with pytest.raises(UserError, match=r"2 of 3 runs failed, .*seed=2 \(killed by SIGKILL\): .*seed=2\.log"):
        runner.train([killed, raising, good])
    assert (runner.folder(good) / "summary.json").is_file()
    log = (runner.out / "logs" / f"{raising.name}.log").read_text()
    assert "RuntimeError: an unforeseen error" in log


def test_an_interrupted_suite_tells_its_runs_to_stop(runner: Runner) -> None:
    slow, quick = Run("star_graph", "rl", stub_runs.WAITS), Run("star_graph", "rl", 0)
    runner.out.mkdir()
    os.mkfifo(runner.out / "waiting")

    def interrupt(line: str) -> None:
        (runner.out / "waiting").read_text()
        raise KeyboardInterrupt

    runner.say = interrupt  # called when the quick one is done
    with pytest.raises(KeyboardInterrupt):
        runner.train([slow, quick])
    assert (runner.folder(slow) / "told to stop").is_file()


def test_a_killed_fork_server_fails_its_runs_and_another_starts_without_threads_and_with_torch_loaded(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"1 of 1 runs failed, .*seed=5 \(failed with exit code 255\)"):
        runner.train([Run("star_graph", "rl", stub_runs.KILLS_THE_SERVER)])
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # a run has one thread whatever the suite has
    monkeypatch.setattr(worker, "train", stub_runs.describe_process)
    run = Run("star_graph", "rl", 0)
    runner.train([run])
    log = json.loads((runner.out / "logs" / f"{run.name}.log").read_text())
    assert log == {"loaded": True, "threads": 1, "server": 1}


def test_a_folder_of_another_suite_is_refused_by_name(runner: Runner) -> None:
    run = Run("star_graph", "rl", 0)
    runner.train([run])
    runner.budget = Budget(**{**vars(SMALL), "steps": 8})
    with pytest.raises(UserError, match=r"star_graph-rl-seed=0 has another configuration"):
        runner.train([run])


# --- experiments on planted curves

SHOWN = FAMILIES[:3]


def planted(method: str, seed: int, mid: float, top: float, cost: float) -> Curve:
    steps = np.arange(0, 126, 6.0)
    reward = sigmoid(steps, top, mid) + np.random.default_rng([seed, len(method)]).normal(0, 0.01, len(steps))
    cells = {name: Cell(mean=m, stderr=0.01, n=8) for name, m in zip(("neither", "context", "weights", "both"), (0.0, 0.4, 0.1, top), strict=True)}  # fmt: skip
    at = {axis: steps * (cost if axis in ("rollouts", "tokens") else 1.0) for axis in AXES}
    return Curve(method, seed, at, reward, steps / 200 / (4 if method == "fst" else 1), steps / 100, cells)


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    monkeypatch.setattr(statistics, "FIT_DRAWS", 20)
    kinds = {"rl": (60.0, 0.6, 100.0), "fst": (10.0, 0.95, 250.0), "gepa": (5.0, 0.4, 100.0)}
    curves = {
        family: {
            method: [planted(method, seed, *kind) for seed in range(3)] for method, kind in kinds.items()
        }
        for family in SHOWN
    }
    monkeypatch.setattr(comparison, "main_runs", lambda runner: {f: {"rl": [Run(f, "rl", 0)]} for f in SHOWN})
    monkeypatch.setattr(comparison, "train_and_load", lambda runner, runs: curves)
    return Runner(tmp_path, SMALL, list(SHOWN), 1)


def test_planted_curves_get_the_verdicts_that_they_deserve(suite: Runner) -> None:
    results = page.run(["efficiency", "drift", "channels"], suite)
    claims = {c.text: c.holds for r in results.values() for c in r.claims}
    assert len(claims) == 6
    assert all(claims.values())
    numbers = results["efficiency"].numbers["star_graph"]
    assert 0.05 < numbers["ratio"]["steps"]["value"] < 1 / 3
    assert numbers["ratio"]["rollouts"]["value"] == pytest.approx(2.5 * numbers["ratio"]["steps"]["value"])
    assert numbers["ceiling"]["difference"]["low"] > 0.2
    assert results["drift"].numbers["star_graph"]["ratio"]["value"] < 0.1
    written = json.loads((suite.out / "results.json").read_text())
    assert list(written["experiments"]) == ["efficiency", "drift", "channels"]
    html = (suite.out / "report.html").read_text()
    assert html.count("<img") == 3
    assert "does not hold" not in html
    assert "| star_graph |" in page.markdown(results["channels"])


def test_certainty_counts_the_seeds_on_which_fst_is_sooner_and_its_first_phase_finds_something(
    suite: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve(method: str, seed: int) -> Curve:
        kind = {"rl": (60.0, 0.6, 100.0), "fst": (10.0, 0.95, 150.0 if seed > 1 else 9000.0)}[method]
        return replace(planted(method, seed, *kind), first_search=0.3 if seed else 0.1)

    def curves(runner: Runner, runs: Any) -> Any:
        return {f: {m: [curve(m, s) for s in range(6)] for m in of_family} for f, of_family in runs.items()}

    runs = {f: {m: [Run(f, m, 0)] for m in ("rl", "gepa", "fst")} for f in FAMILIES}
    monkeypatch.setattr(certainty, "main_runs", lambda runner: runs)
    monkeypatch.setattr(certainty, "train_and_load", curves)
    found = page.run(["certainty"], suite)["certainty"]
    numbers = found.numbers["star_graph"]
    assert set(numbers["final"]) == {"rl", "fst"}
    assert numbers["ratio_by_seed"]["rollouts"][0] > 1 > max(numbers["ratio_by_seed"]["rollouts"][2:])
    assert found.tables[0].rows[0][-4:] == ["6 of 6", "4 of 6", "4 of 6", "6 of 6"]
    assert found.tables[1].rows[0][-1] == "5 of 6"
    assert [claim.holds for claim in found.claims] == [
        True,
        True,
        True,
        False,
        True,
        False,
        True,
        True,
        False,
    ]


def test_a_level_that_nobody_reaches_is_never_and_not_cheap(
    suite: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RL that is at its best untrained: it does not come back to its peak, and FST either does, or does not."""

    def curve(method: str, seed: int, later: float) -> Curve:
        found = planted(method, seed, 60.0, 0.6, 100.0)
        return replace(found, reward=np.where(found.cost["steps"] > 0, later, 0.8))

    curves = {
        f: {
            "rl": [curve("rl", s, 0.1) for s in range(3)],
            "fst": [curve("fst", s, 0.9 if s == later else 0.1) for s in range(3)],
            "gepa": [curve("gepa", s, 0.1) for s in range(3)],
        }
        for f, later in zip(SHOWN, (0, 1, 9), strict=True)
    }
    monkeypatch.setattr(comparison, "train_and_load", lambda runner, runs: curves)
    found = page.run(["efficiency", "drift"], suite)
    assert [row[2] for row in found["efficiency"].tables[0].rows] == ["never [0.00, never]"] * 2 + [
        "never [never, never]"
    ]
    assert [row[1:] for row in found["drift"].tables[0].rows] == [
        ["never", "0.007 (1 of 3 seeds)", "never [never, never]"],
        ["never", "0.007 (1 of 3 seeds)", "never [never, never]"],
        ["never", "never", "never [never, never]"],
    ]
    assert not any(claim.holds for result in found.values() for claim in result.claims)
    json.loads((suite.out / "results.json").read_text(), parse_constant=pytest.fail)


def test_one_seed_has_no_interval_and_proves_nothing(suite: Runner) -> None:
    suite.budget = replace(SMALL, seeds=1)
    results = page.run(["efficiency", "drift", "channels"], suite)
    assert {claim.holds for result in results.values() for claim in result.claims} == {None}
    assert statistics.bootstrap([0.5], statistics.mean).text() == "0.50"


def test_generalisation_shows_every_method_on_both_splits(
    suite: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tops = {"rl": 0.2, "gepa": 0.3, "fst": 0.7}
    runs = {f: {m: [Run(f, m, seed) for seed in range(3)] for m in tops} for f in SHOWN}
    asked: list[tuple[Run, str]] = []

    def evaluation(run: Run, split: str) -> dict[str, object]:
        shift = {"neither": -0.2, "context": -0.1, "weights": -0.15, "both": 0.0}
        return {"channels": {n: {"mean": tops[run.method] + x + run.seed / 100} for n, x in shift.items()}}

    monkeypatch.setattr(comparison, "main_runs", lambda runner: runs)
    monkeypatch.setattr(suite, "evaluate", lambda some, split: asked.extend((r, split) for r in some))
    monkeypatch.setattr(suite, "evaluation", evaluation)
    found = page.run(["generalisation"], suite)["generalisation"]
    assert len(asked) == 27
    assert {split for _, split in asked} == {"ood"}
    numbers = found.numbers["linked_facts"]
    assert numbers["fst"]["ood"]["mean"] == pytest.approx(0.71)
    assert numbers["fst"]["validation"]["mean"] == pytest.approx(0.95)
    assert numbers["fst_cells"]["neither"]["mean"] == pytest.approx(0.51)
    assert (suite.out / "figures" / "generalisation.png").stat().st_size > 5000


def test_without_a_gain_no_claim_holds(suite: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    same = {
        f: {m: [planted("rl", s, 60.0, 0.6, 100.0) for s in range(3)] for m in ("rl", "fst", "gepa")}
        for f in SHOWN
    }
    for of_family in same.values():
        for c in of_family["fst"]:
            c.cells["both"] = c.cells["context"]
    monkeypatch.setattr(comparison, "train_and_load", lambda runner, runs: same)
    results = [experiments.EXPERIMENTS[name](suite) for name in ("efficiency", "drift", "channels")]
    assert sum(len(r.claims) for r in results) == 6
    assert not any(c.holds for r in results for c in r.claims)


@pytest.mark.parametrize(
    ("after_rl", "after_fst", "holds"),
    [((0.3, 0.3), (0.7, 0.5), [True, True]), ((0.7, 0.6), (0.2, 0.6), [False, False])],
    ids=["as the paper says", "the other way round"],
)
def test_plasticity_is_judged_by_the_mean_over_tasks(
    suite: Runner,
    monkeypatch: pytest.MonkeyPatch,
    after_rl: tuple[float, float],
    after_fst: tuple[float, float],
    holds: list[bool],
) -> None:
    asked: list[Run] = []

    def train(runs: list[Run]) -> None:
        asked.extend(runs)

    def train_and_load(
        runner: Runner, runs: dict[str, dict[str, list[Run]]]
    ) -> dict[str, dict[str, list[Curve]]]:
        runner.train([run for starts in runs.values() for several in starts.values() for run in several])
        tops = {"base": (0.5, 0.5), "after rl": after_rl, "after fst": after_fst}
        return {
            family: {
                name: [planted("rl", seed, 5.0, tops[name][i], 100.0) for seed in range(3)] for name in starts
            }
            for i, (family, starts) in enumerate(runs.items())
        }

    monkeypatch.setattr(plasticity, "strongest_rl", lambda runner: {f: {"slow.lr": f} for f in SHOWN})
    monkeypatch.setattr(plasticity, "train_and_load", train_and_load)
    monkeypatch.setattr(suite, "train", train)
    found = plasticity.plasticity(suite)
    assert [claim.holds for claim in found.claims] == holds
    for i, family in enumerate(SHOWN[1:]):
        assert found.numbers[family]["after fst"]["mean"] == pytest.approx(after_fst[i], abs=0.03)
        for run in (run for run in asked if run.after and run.family == family):
            assert run.changes == {"slow.lr": family}  # the rate that is best for RL from the base
            assert run.after in asked[: asked.index(run)]  # and what it begins with was asked for before
    assert len(found.tables[0].rows) == 9  # three starts: two tasks and their mean
    assert len({run for run in asked if run.after}) == 2 * 2 * suite.budget.seeds


def test_plasticity_needs_a_second_task(suite: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plasticity, "strongest_rl", lambda runner: {f: {} for f in runner.families})
    suite.families = [plasticity.FIRST]
    assert "skipped" in plasticity.plasticity(suite).numbers


def test_the_other_figures_can_be_drawn(suite: Runner) -> None:
    some = [planted("rl", seed, 60.0, 0.6, 100.0) for seed in range(2)]
    draw = figures
    for figure in (
        draw.plasticity({"linked_facts": {"base": some, "after rl": some, "after fst": some}}),
        draw.stages({"rl": some, "fst": some, "fst, distilled": some}, ["a", "b"], 60),
        draw.ablation({"as configured": some, "never there": some}, 0.9),
    ):
        assert png(figure).startswith(b"\x89PNG")


# --- the command


def test_a_dry_run_names_the_runs_and_makes_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["experiment", "all", "--quick", "--dry-run", "--out", str(out)]) == 0
    names = capsys.readouterr().out.split()
    assert len(set(names)) == len(names) > 20
    assert {"star_graph-fst-seed=0", "list_programs-gepa-seed=1"} <= set(names)
    assert not out.exists()


def test_rl_settings_of_an_earlier_suite_replace_the_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = Path(__file__).parents[2] / "benchmarks" / "results" / "experiments.json"
    words = ["experiment", "efficiency", "--seeds", "3", "--out", str(tmp_path), "--dry-run", "--rl-settings"]
    assert main([*words, str(published)]) == 0
    runs = capsys.readouterr().out.split()
    assert len(runs) == len(set(runs)) == 4 * 3 * 3
    assert "list_programs-rl-kl_coef=1e-2-lr=1e-3-seed=2" in runs
    for text, why in (
        (None, "cannot be read"),
        ("[]", "holds no RL settings of"),
        ('{"experiments": {}}', "holds no RL settings of"),
    ):
        file = tmp_path / "given.json"
        if text is not None:
            file.write_text(text)
        assert main([*words, str(file)]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert why in line


def test_sigterm_ends_a_suite_as_ctrl_c_does(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        main(["experiment", "drift", "--dry-run", "--out", str(tmp_path)])
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["experiment", "nothing"], "experiment 'nothing' is not known; allowed are all, efficiency, drift,"),
        (["experiment", "all", "--families", "maze"], "'maze' is not known; allowed are star_graph,"),
        (["experiment", "all", "--seeds", "0"], "0"),
    ],
)
def test_what_cannot_be_run_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_both_budgets_are_fit_for_every_ablation() -> None:
    for budget in (FULL, QUICK):
        for changes in ablations.ABLATIONS.values():
            Run("star_graph", "fst", 0, changes).config(budget, None)


# --- rivals


RIVAL_TOPS = {"rl": 0.3, "e-spl": 0.5, "fst": 0.95, "rl, best context": 0.95}


def rival_curves(tops: dict[str, float]) -> dict[str, dict[str, list[Curve]]]:
    def one(name: str, seed: int) -> Curve:
        curve = planted("rl", seed, 30.0, tops[name], 100.0)
        curve.reward[0] = 0.4 if name == "rl, best context" else 0.0
        return replace(curve, reflections=7.0, first_search=0.25 if name == "fst" else None)

    return {family: {name: [one(name, seed) for seed in range(6)] for name in tops} for family in SHOWN}


def test_rivals_are_compared_seed_by_seed_at_equal_cost(
    suite: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "strongest_rl", lambda runner: {f: {"slow.lr": 1e-3} for f in SHOWN})
    monkeypatch.setattr(rivals, "train_and_load", lambda runner, runs: rival_curves(RIVAL_TOPS))
    found = page.run(["rivals"], suite)["rivals"]
    assert [claim.holds for claim in found.claims] == [True] * 5
    numbers = found.numbers["star_graph"]
    assert numbers["difference"]["e-spl"]["rollouts"]["low"] > 0.1
    assert numbers["difference"]["e-spl"]["p"] == 2 / 2**6
    assert numbers["methods"]["fst"]["reflections"]["mean"] == 7
    assert numbers["first_phase_good"] == {"fst": [True] * 6}, (
        "0.25 is more than half of the best hand-written context's gain"
    )
    assert "rl, best context" not in numbers["difference"], "it is no rival"
    tables = {table.title.split(":")[0].split(",")[0]: table for table in found.tables}
    assert len(tables["Mean reward of FST over a rival's on the way to the same cost"].rows) == 2 * len(SHOWN)
    assert (suite.out / "figures" / "rivals.png").stat().st_size > 5000


def test_a_rival_that_is_better_is_named(suite: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "strongest_rl", lambda runner: {f: {} for f in SHOWN})
    monkeypatch.setattr(
        rivals, "train_and_load", lambda runner, runs: rival_curves({**RIVAL_TOPS, "e-spl": 1.0, "fst": 0.6})
    )
    claims = rivals.rivals(suite).claims
    assert [claim.holds for claim in claims] == [False, False, False, False, True]
    assert "e-spl on star_graph" in claims[0].figure


# --- tools


def test_every_arm_of_the_family_with_a_tool_is_a_configuration() -> None:
    for method, changes in tools.ARMS.values():
        config = Run(tools.FAMILY, method, 0, changes).config(SMALL, None)
        assert bool(config.fast.components) == (changes is not tools.ONE_TEXT)


def test_components_and_one_text_are_compared_at_equal_rollouts(
    suite: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tops = {
        "rl": 0.3,
        "rl, lr=1e-3": 0.5,
        "gepa": 0.6,
        "gepa, one text": 0.5,
        "fst": 0.9,
        "fst, one text": 0.95,
    }
    curves = {
        name: [planted("rl", seed, 30.0, top, 100.0) for seed in range(3)] for name, top in tops.items()
    }
    monkeypatch.setattr(tools, "train_and_load", lambda runner, runs: {tools.FAMILY: curves})
    found = page.run(["tools"], suite)["tools"]
    assert [claim.holds for claim in found.claims] == [True, True, True, True, False]
    assert found.numbers["components_minus_one_text"]["gepa"]["value"] > 0


# --- problems on which no context helps, and a right context that turns around


def test_where_no_context_helps_fst_may_cost_its_fast_phases_and_no_more(
    suite: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curves(top: float, mid: float, later: int) -> dict[str, dict[str, list[Curve]]]:
        arms = {"rl": (1.0, 30.0, 0), "fst": (top, mid, 800), "fst, adaptive": (1.0, 30.0, later)}
        return {
            no_help.FAMILY: {
                arm: [replace(planted("rl", s, mid, top, 100.0), fast_rollouts=(900, n)) for s in range(4)]
                for arm, (top, mid, n) in arms.items()
            }
        }

    monkeypatch.setattr(no_help, "train_and_load", lambda runner, runs: curves(1.0, 30.0, 300))
    assert [claim.holds for claim in no_help.no_help(suite).claims] == [True] * 5
    monkeypatch.setattr(no_help, "train_and_load", lambda runner, runs: curves(0.7, 60.0, 500))
    assert [claim.holds for claim in no_help.no_help(suite).claims] == [False, False, True, True, False]


def test_every_stage_of_a_reversal_is_a_configuration_and_asks_for_its_own_order(suite: Runner) -> None:
    suite.dry_run, suite.rl_settings = True, {family: {} for family in FAMILIES}
    experiments.EXPERIMENTS["reversal"](suite)
    assert [run.method for run in suite.planned[:: suite.budget.seeds]] == ["rl", "fst"]
    for run in suite.planned:
        stages = run.config(suite.budget, None).stages
        assert [stage.task_args["order"] for stage in stages] == ["forward", "backward", "forward"]


def test_every_arm_of_the_control_is_a_configuration() -> None:
    for method, changes in no_help.ARMS.values():
        config = Run(no_help.FAMILY, method, 0, {**no_help.FIXED, **changes}).config(SMALL, None)
        assert config.task_args["fixed"] == "c"


def test_a_setting_of_rl_that_could_not_be_judged_is_not_the_strongest(
    suite: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curves(runner: Runner, runs: Any) -> Any:
        def of(run: Run, good: bool) -> Curve:
            curve = planted("rl", run.seed, 30.0, 0.5 if good else 0.4, 100.0)
            lost = run.changes.get("slow.lr") == methods.RL_RATES[0]
            return replace(curve, reward=np.full_like(curve.reward, np.nan)) if lost else curve

        return {
            family: {name: [of(r, name == "1") for r in each] for name, each in settings.items()}
            for family, settings in runs.items()
        }

    monkeypatch.setattr(methods, "train_and_load", curves)
    suite.rl_settings = None
    assert {rates["slow.lr"] for rates in methods.strongest_rl(suite).values()} == {methods.RL_RATES[1]}
