"""Which folders a run may open, and that a refusal leaves them unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fst_fast.errors import UserError
from fst_fast.run import folder
from fst_fast.run.folder import changed_keys, disk_errors, open_run, write_json

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which is slow on a busy machine and has no effect that a process can see."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


CONFIG = "method: fst\nslow:\n  lr: 1.0e-06\n  steps: 10\n"


def start(
    path: Path, *, resume: bool = False, config: str = CONFIG, config_hash: str = "h1"
) -> folder.RunFolder:
    return open_run(path, resume=resume, config_yaml=config, config_hash=config_hash)


def snapshot(path: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in path.rglob("*")}


def refusal(path: Path, **kwargs: object) -> str:
    with pytest.raises(UserError) as caught:
        start(path, **kwargs)  # type: ignore[arg-type]
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_new_run_gets_a_folder_with_marker_and_configuration(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    with start(path) as run:
        assert (run.path, run.resumed) == (path, False)
    assert (path / "config.yaml").read_text() == CONFIG
    assert json.loads((path / "fst-run.json").read_text()) == {"format": 1, "metrics": 1, "config_hash": "h1"}
    assert sorted(p.name for p in path.iterdir()) == ["config.yaml", "fst-run.json", "lock"]


def test_an_empty_folder_and_one_of_an_interrupted_start_are_reused(tmp_path: Path) -> None:
    start(tmp_path).close()
    (tmp_path / "fst-run.json").unlink()
    assert not start(tmp_path).resumed


def test_a_run_is_continued_only_with_resume(tmp_path: Path) -> None:
    start(tmp_path).close()
    before = snapshot(tmp_path)
    assert "already holds a run; continue it with --resume, or choose another --run-dir" in refusal(tmp_path)
    assert snapshot(tmp_path) == before
    with start(tmp_path, resume=True) as run:
        assert run.resumed


def test_a_folder_that_is_not_ours_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for resume in (False, True):
        assert "not a run of fst (it holds thesis.tex)" in refusal(tmp_path, resume=resume)
    assert snapshot(tmp_path) == {"thesis.tex": b"x"}


def test_resume_of_nothing_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    assert "there is no run in" in refusal(tmp_path / "a" / "b", resume=True)
    assert snapshot(tmp_path) == {}


def test_a_file_in_the_place_of_the_folder_or_above_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    assert "is a file" in refusal(tmp_path / "f")
    assert "cannot be written: Not a directory" in refusal(tmp_path / "f" / "run")


def test_another_configuration_is_refused_naming_the_keys(tmp_path: Path) -> None:
    start(tmp_path).close()
    other = CONFIG.replace("1.0e-06", "1.0e-05").replace("  steps: 10\n", "") + "seed: 3\n"
    message = refusal(tmp_path, resume=True, config=other, config_hash="h2")
    assert "slow.lr was 1e-06, is 1e-05; slow.steps was 10, is absent; seed was absent, is 3" in message
    assert (tmp_path / "config.yaml").read_text() == CONFIG
    start(tmp_path, resume=True, config="# the same, written otherwise\n" + CONFIG, config_hash="h2").close()


def test_a_changed_configuration_is_taken_when_allowed_and_named(tmp_path: Path) -> None:
    start(tmp_path).close()
    other = CONFIG.replace("1.0e-06", "1.0e-05")
    assert "--allow-config-change continues with the new one" in refusal(
        tmp_path, resume=True, config=other, config_hash="h2"
    )
    with open_run(
        tmp_path, resume=True, config_yaml=other, config_hash="h2", allow_config_change=True
    ) as run:
        assert run.changes == ["slow.lr was 1e-06, is 1e-05"]
        run.accept()
    assert (tmp_path / "config.yaml").read_text() == other
    with start(tmp_path, resume=True, config=other, config_hash="h2") as run:  # it is the run's own now
        assert run.changes == []


def test_a_key_added_after_the_run_is_no_change_at_its_default(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False, config_yaml="slow: {lr: 1}\nargs: {a: 1}\n", config_hash="old"):
        pass
    defaults = {"slow": {"lr": 5, "new": 0}, "args": {}, "later": []}
    now = "slow: {lr: 1, new: 0}\nargs: {a: 1}\nlater: []\n"
    with open_run(tmp_path, resume=True, config_yaml=now, config_hash="now", defaults=defaults) as folder:
        assert folder.changes == []
    other = now.replace("new: 0", "new: 1")
    with pytest.raises(UserError, match=r"is not that of the run in .*: slow.new was 0, is 1; --allow"):
        open_run(tmp_path, resume=True, config_yaml=other, config_hash="other", defaults=defaults)


@pytest.mark.parametrize(
    ("now", "allowed"),
    [
        ("[{task: a, steps: 1}, {task: b, steps: 2}]", True),
        ("[{task: a, steps: 2}]", False),
        ("[{task: b, steps: 1}, {task: a, steps: 1}]", False),
        ("[]", False),
    ],
)
def test_more_stages_may_follow_and_no_other_change_of_them(tmp_path: Path, now: str, allowed: bool) -> None:
    config = "stages: [{task: a, steps: 1}]\n"
    with open_run(tmp_path, resume=False, config_yaml=config, config_hash="h"):
        pass
    more = {
        "resume": True,
        "config_yaml": f"stages: {now}\n",
        "config_hash": "h2",
        "allow_config_change": True,
    }
    if allowed:
        open_run(tmp_path, **more).close()  # type: ignore[arg-type]
    else:
        with pytest.raises(UserError, match="depends on stages was"):
            open_run(tmp_path, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("method: fst", "method: rl", "method"),
        ("task: star_graph", "task: x", "task"),
        ("{arms: 5}", "{arms: 6}", "task_args.arms"),
        ("path: mini", "path: x", "model.path"),
        ("population: 4", "population: 2", "fast.population"),
        ("seed_context: go", "seed_context: stop", "fast.seed_context"),
        ("seed_context: go", "seed_context: go, components: {system: go}", "fast.components"),
    ],
)
def test_what_the_checkpoints_depend_on_cannot_be_changed(
    tmp_path: Path, old: str, new: str, key: str
) -> None:
    config = CONFIG + (
        "task: star_graph\ntask_args: {arms: 5}\nmodel: {path: mini}\npolicy: {zero_stage: 0}\n"
        "fast: {population: 4, seed_context: go}\n"
    )
    start(tmp_path, config=config).close()
    before = snapshot(tmp_path)
    other = config.replace(old, new).replace("1.0e-06", "1.0e-05")
    with pytest.raises(
        UserError,
        match=f"--resume: what the checkpoints in .* hold depends on {key} was [^;]*; start a new",
    ):
        open_run(tmp_path, resume=True, config_yaml=other, config_hash="h2", allow_config_change=True)
    assert snapshot(tmp_path) == before


def test_true_and_one_are_different_values() -> None:
    assert changed_keys({"a": {"b": 1}}, {"a": {"b": True}}) == ["a.b was 1, is True"]
    assert changed_keys({"a": [1, 2]}, {"a": [1, 2]}) == []


@pytest.mark.parametrize(
    ("name", "text"), [("fst-run.json", "{"), ("fst-run.json", "[]"), ("config.yaml", "a: [")]
)
def test_a_damaged_marker_or_configuration_is_refused(tmp_path: Path, name: str, text: str) -> None:
    start(tmp_path).close()
    (tmp_path / name).write_text(text)
    assert "is damaged" in refusal(tmp_path, resume=True)


def test_a_folder_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    start(tmp_path).close()
    write_json(tmp_path / "fst-run.json", {"format": 2, "config_hash": "h1"})
    assert "format 2" in refusal(tmp_path, resume=True)
    write_json(tmp_path / "fst-run.json", {"format": 1, "metrics": 2, "config_hash": "h1"})
    assert "metrics of version 2, this version of fst reads format 1 and metrics of version 1" in refusal(
        tmp_path, resume=True
    )


def test_a_folder_of_before_the_metrics_had_a_version_is_continued(tmp_path: Path) -> None:
    start(tmp_path).close()
    write_json(tmp_path / "fst-run.json", {"format": 1, "config_hash": "h1"})
    start(tmp_path, resume=True).close()


def test_two_runs_cannot_use_one_folder_and_a_killed_one_does_not_block_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    code = (
        "import signal; from fst_fast.run.folder import open_run; "
        f"run = open_run({str(path)!r}, resume=False, config_yaml={CONFIG!r}, config_hash='h1'); print('open', flush=True); signal.pause()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    assert other.stdout is not None
    assert other.stdout.readline() == "open\n"
    assert f"in use by another run (process {other.pid})" in refusal(path, resume=True)
    other.kill()
    other.wait()
    with start(path, resume=True) as run:
        assert "in use" in refusal(path, resume=True)
        run.close()
        run.close()
    start(path, resume=True).close()


@pytest.mark.parametrize("failing", ["_check_writable", "write_atomic", "write_json"])
def test_a_disk_error_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        with disk_errors(f"{tmp_path}/a/b cannot be written"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, failing, full)
    assert "cannot be written: No space left on device" in refusal(tmp_path / "a" / "b")
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc refuses even the superuser")
def test_an_unwritable_place_is_refused() -> None:
    assert "cannot be written" in refusal(Path("/proc/fst-run"))


def test_json_is_replaced_as_a_whole_and_is_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"reward": 0.5, "name": "größer"})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"reward": float("nan")})

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(UserError, match=r"summary\.json cannot be written: No space left on device"):
        write_json(path, {"reward": 0.6})
    assert json.loads(path.read_text()) == {"reward": 0.5, "name": "größer"}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",  # safetensors
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",  # torch.save
    ],
)
def test_a_full_disk_is_recognised_in_the_errors_of_torch_and_safetensors(text: str) -> None:
    said = "x cannot be written, probably because the disk is full: "
    with pytest.raises(UserError, match=said), disk_errors("x cannot be written"):
        raise RuntimeError(text)


def test_other_system_errors_from_safetensors_are_reported_verbatim() -> None:
    text = "Error while serializing: I/O error: Disk quota exceeded (os error 122)"
    with (
        pytest.raises(UserError, match=r"x cannot be written: Error while .* quota"),
        disk_errors("x cannot be written"),
    ):
        raise RuntimeError(text)


def test_errors_unrelated_to_the_disk_are_not_translated() -> None:
    with pytest.raises(RuntimeError, match="something else"), disk_errors("x cannot be written"):
        raise RuntimeError("something else")


def test_a_changed_configuration_is_written_once_the_rest_of_the_resume_is_accepted(tmp_path: Path) -> None:
    with open_run(tmp_path, resume=False, config_yaml="slow: {lr: 1}\n", config_hash="a"):
        pass
    before = (tmp_path / "config.yaml").read_text(), (tmp_path / "fst-run.json").read_text()
    now = {"config_yaml": "slow: {lr: 2}\n", "config_hash": "b", "allow_config_change": True}
    with open_run(tmp_path, resume=True, **now) as folder:  # type: ignore[arg-type]
        assert folder.changes == ["slow.lr was 1, is 2"]
    assert before == ((tmp_path / "config.yaml").read_text(), (tmp_path / "fst-run.json").read_text())
    with open_run(tmp_path, resume=True, **now) as folder:  # type: ignore[arg-type]
        folder.accept()
    with open_run(tmp_path, resume=True, config_yaml="slow: {lr: 2}\n", config_hash="b") as folder:
        assert folder.changes == []
