"""Trackers: numbers and tables arrive, a run goes on where it was, another's run can be written to and stays open."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fst_fast.config import TrackConfig
from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.run.metrics import TABLE_ROWS, MetricsWriter
from fst_fast.run.track import COLUMNS, check_trackers
from tests.fst_fast import fake_trackers
from tests.fst_fast.fake_trackers import FakeRun

KEYS = ("wandb", "trackio", "mlflow")
ROLLOUT = {
    "step": 3,
    "phase": "slow",
    "problem_id": "p",
    "context_id": "c",
    "reward": 0.5,
    "prompt": "solve\n|x|",
    "response": "<b>`3`",
    "feedback": "no",
}
ROW = [3, "slow", "p", "c", None, 0.5, None, None, "solve\n|x|", "<b>`3`", "no"]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = SimpleNamespace()
    for key, kind in (
        ("wandb", fake_trackers.Wandb),
        ("trackio", fake_trackers.Trackio),
        ("mlflow", fake_trackers.Mlflow),
    ):
        setattr(made, key, kind(key))
        monkeypatch.setitem(sys.modules, key, getattr(made, key))
    return made


def write(run: Path, key: str, **how: Any) -> None:
    run.mkdir(exist_ok=True)
    with MetricsWriter(run, track=TrackConfig(**{key: "project"}, **how)) as writer:
        writer.write("start", method="fst")
        writer.write("step", step=3, reward=0.5, kl=None)
        writer.write_rollout(**ROLLOUT)


def numbers(package: Any, key: str, run: str) -> list[tuple[int, dict[str, float]]]:
    """What a run of the tracker was sent: (step, values), tables as (step, columns, rows)."""
    if key == "mlflow":
        return [(m.step, {m.key: m.value}) for m in package.runs[run]["metrics"]]
    return [(step, v) for step, v in package.runs[run].logged if "rollouts" not in v]


def table(package: Any, key: str, run: str) -> tuple[list[str], list[list[Any]]]:
    if key == "mlflow":
        file = package.runs[run]["files"]["rollouts.json"]
        return file["columns"], file["data"]
    [found] = [v["rollouts"] for _, v in package.runs[run].logged if "rollouts" in v][-1:]
    return found.columns, found.data


def is_open(package: Any, key: str, run: str) -> bool:
    return package.runs[run]["status"] == "RUNNING" if key == "mlflow" else not package.runs[run].finished


@pytest.mark.parametrize("key", KEYS)
def test_numbers_and_rollouts_arrive_and_a_resumed_run_goes_on_in_the_same_one(
    tmp_path: Path, packages: Any, key: str
) -> None:
    package = getattr(packages, key)
    for times in (1, 2):
        write(tmp_path / "a", key)
        [run] = package.runs
        assert numbers(package, key, run) == [(3, {"step/reward": 0.5})] * times
        assert table(package, key, run) == (list(COLUMNS), [ROW])
        assert not is_open(package, key, run)
        assert json.loads((tmp_path / "a/track.json").read_text())[key] == run
    write(tmp_path / "b", key)
    assert len(package.runs) == 2


def test_a_run_of_an_earlier_version_keeps_its_identity(tmp_path: Path, packages: Any) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/track.json").write_text('{"id": "0123456789ab"}')
    write(tmp_path / "old", "wandb")
    write(tmp_path / "old", "trackio")
    assert list(packages.wandb.runs) == ["0123456789ab"]
    assert list(packages.trackio.runs) == ["old-012345"]
    assert packages.wandb.asked == [{"project": "project", "id": "0123456789ab", "resume": "allow"}]


@pytest.mark.parametrize("key", KEYS)
def test_a_run_named_by_the_user_is_written_to_and_one_that_is_not_there_is_refused(
    tmp_path: Path, packages: Any, key: str
) -> None:
    package = getattr(packages, key)
    write(tmp_path / "a", key)
    [run] = package.runs
    write(tmp_path / "b", key, attach={key: run})
    assert list(package.runs) == [run]
    assert numbers(package, key, run) == [(3, {"step/reward": 0.5})] * 2
    write(tmp_path / "b", key)  # resumed without being told again
    assert list(package.runs) == [run]
    with pytest.raises(
        UserError, match=rf"track\.{key}='project' with track\.attach\.{key}='nope' cannot be started: .*nope"
    ):
        write(tmp_path / "c", key, attach={key: "nope"})


@pytest.mark.parametrize("key", KEYS)
def test_a_run_that_is_active_in_the_process_is_written_to_and_stays_open(
    tmp_path: Path, packages: Any, key: str
) -> None:
    package = getattr(packages, key)
    if key == "mlflow":
        package.active = package.create_run("0", "mine")
    else:
        package.runs["mine"] = FakeRun("mine", "mine")
        setattr(package, "run" if key == "wandb" else "current", package.runs["mine"])
    write(tmp_path / "a", key)
    [run] = package.runs
    assert numbers(package, key, run) == [(3, {"step/reward": 0.5})]
    assert is_open(package, key, run)


def test_mlflow_gets_names_that_it_takes_few_calls_and_one_entry_in_the_list_of_tables(
    tmp_path: Path, packages: Any
) -> None:
    package = packages.mlflow
    tag = "mlflow.loggedArtifacts"
    package.active = package.create_run("0", "mine")
    package.set_tag("run0", tag, '[{"path": "own.json", "type": "table"}]')
    with MetricsWriter(tmp_path, track=TrackConfig(mlflow="p")) as writer:
        writer.write("step", step=1, metrics={f"f1@{i} ü?": 0.5 for i in range(2001)})
        for step in (1, 2):
            writer.write_rollout(**{**ROLLOUT, "step": step})
            writer.write("eval", step=step, k=4)
    run = package.runs["run0"]
    assert run["calls"] == 3 + 2
    assert run["metrics"][7].key == "step/metrics/f1_7 ü_"
    assert [entry["path"] for entry in json.loads(run["tags"][tag])] == ["own.json", "rollouts.json"]
    assert [row[0] for row in run["files"]["rollouts.json"]["data"]] == [2]


def test_a_table_is_sent_with_an_evaluation_when_it_is_full_and_at_the_end(
    tmp_path: Path, packages: Any
) -> None:
    with MetricsWriter(tmp_path, track=TrackConfig(wandb="p")) as writer:
        writer.write("eval", step=0, k=4)
        for step in range(TABLE_ROWS + 1):
            writer.write_rollout(**{**ROLLOUT, "step": step})
        writer.write("eval", step=TABLE_ROWS + 1, k=4)
        writer.write_rollout(**ROLLOUT)
    [run] = packages.wandb.runs.values()
    sizes = [len(v["rollouts"].data) for _, v in run.logged if "rollouts" in v]
    assert sizes == [TABLE_ROWS, 1, 1]


def test_a_tracker_that_fails_is_named_once_and_the_run_goes_on(tmp_path: Path, packages: Any) -> None:
    notes: list[str] = []
    track = TrackConfig(wandb="p", trackio="q")
    with MetricsWriter(tmp_path, track=track, note=notes.append) as writer:
        packages.trackio.current.broken = True
        for step in range(3):
            writer.write("step", step=step, reward=0.5)
    assert notes == ["warning: Trackio has failed and gets nothing more from this run: the server is away"]
    [run] = packages.wandb.runs.values()
    assert len(run.logged) == 3
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("key", [*KEYS, "tensorboard"])
def test_a_tracker_whose_package_is_missing_is_refused_naming_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if key == "tensorboard" else key, None)
    track = TrackConfig(**{key: True if key == "tensorboard" else "p"})
    for start in (check_trackers, lambda track: MetricsWriter(tmp_path, track=track)):
        with pytest.raises(UserError, match=rf"track.{key} needs a package .*pip install fst-fast\[track\]"):
            start(track)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--track.attach.mlflow=abc"], "track.attach names a run of mlflow, but track.mlflow is off"),
        (["--track.attach.comet=abc"], "track.attach.comet"),
    ],
)
def test_attaching_to_what_is_off_or_unknown_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config_load.load(None, words)
