"""A checkpoint is complete or absent: after a kill, a full disk, a flipped bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fst_fast.errors import UserError
from fst_fast.run import checkpoint
from fst_fast.run.checkpoint import begin, commit, find_damage, latest, log_sizes

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, which is slow on a busy machine and has no effect that a process can see. The test of the order of
    writes records the calls."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def save(run: Path, step: int, *, text: str = "weights", keep_last: int = 2, keep_every: int = 0) -> Path:
    tmp = begin(run, step)
    (tmp / "zero").mkdir()
    (tmp / "model.bin").write_text(f"{text} of {step}")
    (tmp / "zero" / "rank0.bin").write_text(f"optimiser of {step}")
    return commit(run, tmp, step, keep_last=keep_last, keep_every=keep_every)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def quiet_latest(run: Path) -> Path | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return latest(run)


def test_a_run_without_checkpoints_has_no_latest(tmp_path: Path) -> None:
    assert quiet_latest(tmp_path) is None
    begin(tmp_path, 1)
    assert quiet_latest(tmp_path) is None


def test_the_newest_keep_last_checkpoints_stay_whole(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        assert save(tmp_path, step) == tmp_path / "checkpoints" / f"step-{step:06d}"
    assert names(tmp_path) == ["latest", "step-000040", "step-000060"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000060\n"
    assert quiet_latest(tmp_path) == tmp_path / "checkpoints" / "step-000060"
    assert all(find_damage(tmp_path / "checkpoints" / name) is None for name in names(tmp_path)[1:])


def test_keeping_one_checkpoint_is_not_possible(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        save(tmp_path, 20, keep_last=1)


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        ("model.bin", b"Weights of 40", "model.bin has the wrong SHA-256"),
        ("model.bin", b"weights", "model.bin has 7 bytes instead of 13"),
        ("zero/rank0.bin", None, "zero/rank0.bin is missing"),
        ("manifest.json", b'{"format": 1', "manifest.json is damaged"),
        ("manifest.json", b"[]", "manifest.json is damaged"),
        (
            "manifest.json",
            b'{"format": 9, "files": {}}',
            "manifest.json has format 9, this version of fst reads 2",
        ),
        ("manifest.json", None, "manifest.json cannot be read (No such file or directory)"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_the_file(
    tmp_path: Path, file: str, data: bytes | None, said: str
) -> None:
    save(tmp_path, 20)
    broken = save(tmp_path, 40)
    if data is None:
        (broken / file).unlink()
    else:
        (broken / file).write_bytes(data)
    with pytest.warns(UserWarning, match="is skipped") as caught:
        assert latest(tmp_path) == tmp_path / "checkpoints" / "step-000020"
    assert str(caught[0].message) == f"checkpoint {broken} is skipped: {said}"


def test_without_a_complete_checkpoint_the_run_refuses_to_start_over(tmp_path: Path) -> None:
    (save(tmp_path, 20) / "model.bin").write_text("")
    (save(tmp_path, 40) / "model.bin").unlink()
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(
            UserError,
            match=r"no checkpoint in .* is whole \(2 tried; the last one: model.bin has 0 bytes instead of 13\)",
        ),
    ):
        latest(tmp_path)


def test_a_checkpoint_says_what_wrote_it(tmp_path: Path) -> None:
    who = {"config_hash": "abc", "processes": 2, "versions": {"torch": "2.13.0"}}
    folder = commit(tmp_path, begin(tmp_path, 20), 20, keep_last=2, written_by=who)
    assert checkpoint.written_by(folder) == who


def test_every_mth_step_is_kept_for_good_beside_the_newest(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        save(tmp_path, step, keep_every=30)
    assert names(tmp_path) == ["latest", *(f"step-{step:06d}" for step in (30, 60, 80, 90))]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 20)
    (save(tmp_path, 40) / "model.bin").write_text("")
    save(tmp_path, 40)
    assert quiet_latest(tmp_path) == tmp_path / "checkpoints" / "step-000040"


def test_a_checkpoint_that_is_written_again_stays_where_nothing_has_changed(tmp_path: Path) -> None:
    folder = save(tmp_path, 20).stat().st_ino
    assert save(tmp_path, 20).stat().st_ino == folder
    assert names(tmp_path) == ["latest", "step-000020"]


def test_a_checkpoint_is_replaced_where_its_files_or_the_logs_have_changed(tmp_path: Path) -> None:
    final = save(tmp_path, 20, text="first")
    save(tmp_path, 20, text="second")
    assert (final / "model.bin").read_text() == "second of 20"
    (tmp_path / "timing.jsonl").write_text("a step that took another time\n")
    save(tmp_path, 20, text="second")
    assert log_sizes(tmp_path, 20) == {"timing.jsonl": (tmp_path / "timing.jsonl").stat().st_size}
    assert names(tmp_path) == ["latest", "step-000020"]
    assert quiet_latest(tmp_path) == final


@pytest.mark.parametrize("point", ["save.manifest", "save.cleanup", "save.rename", "save.latest"])
def test_a_replacement_that_is_killed_leaves_the_old_or_the_new_one_even_if_it_is_the_only_one(
    tmp_path: Path, point: str
) -> None:
    save(tmp_path, 20, text="first")
    code = f"""
import os
from pathlib import Path
from fst_fast.run import checkpoint, faults
os.fsync = lambda _: None
faults.arm()
tmp = checkpoint.begin(Path({str(tmp_path)!r}), 20)
(tmp / "model.bin").write_text("second of 20")
checkpoint.commit(Path({str(tmp_path)!r}), tmp, 20, keep_last=2)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FST_FAULT": f"{point}:1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = quiet_latest(tmp_path)
    assert found is not None
    old = point in ("save.manifest", "save.cleanup")
    assert (found / "model.bin").read_text() == f"{'first' if old else 'second'} of 20"
    save(tmp_path, 20, text="third")
    assert names(tmp_path) == ["latest", "step-000020"]


def test_checkpoints_of_later_steps_are_deleted_when_a_step_is_repeated(tmp_path: Path) -> None:
    for step in (20, 40, 60):
        save(tmp_path, step, keep_last=3)
    save(tmp_path, 30)
    assert names(tmp_path) == ["latest", "step-000020", "step-000030"]
    assert quiet_latest(tmp_path) == tmp_path / "checkpoints" / "step-000030"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert quiet_latest(tmp_path) == tmp_path / "checkpoints" / "step-1000000"


KILLED_AT = {
    "before the manifest": "checkpoint._write_manifest",
    "inside the manifest": "checkpoint._fsync_file",
    "before the rename": "os.rename",
    "before latest": "checkpoint.write_atomic",
    "inside latest": "os.replace",
    "before an old one goes": "checkpoint._set_aside",
    "while an old one goes": "shutil.rmtree",
}


@pytest.mark.parametrize("stage", KILLED_AT)
def test_kill_9_at_any_stage_of_a_save_leaves_a_whole_checkpoint_and_the_next_save_works(
    tmp_path: Path, stage: str
) -> None:
    save(tmp_path, 20)
    save(tmp_path, 40)
    code = f"""
import os, shutil
from pathlib import Path
from fst_fast.run import checkpoint
os.fsync = lambda _: None
run = Path({str(tmp_path)!r})
tmp = checkpoint.begin(run, 60)
(tmp / "model.bin").write_text("weights of 60")
{KILLED_AT[stage]} = lambda *args, **kwargs: os.kill(os.getpid(), 9)
checkpoint.commit(run, tmp, 60, keep_last=2)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    if stage == "while an old one goes":  # it must have lost its name before its first file goes
        assert "step-000020" not in names(tmp_path)
    found = quiet_latest(tmp_path)
    expected = (
        "step-000060" if stage in ("before an old one goes", "while an old one goes") else "step-000040"
    )
    assert found == tmp_path / "checkpoints" / expected
    assert (found / "model.bin").read_text() == f"weights of {int(expected[-2:])}"
    save(tmp_path, 60)
    assert names(tmp_path) == ["latest", "step-000040", "step-000060"]
    assert quiet_latest(tmp_path) == tmp_path / "checkpoints" / "step-000060"
    assert begin(tmp_path, 80).name == ".tmp-step-000080"
    assert names(tmp_path) == [".tmp-step-000080", "latest", "step-000040", "step-000060"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors from /proc")
def test_all_is_on_the_disk_before_the_rename_and_the_rename_before_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    name_of = lambda fd: os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path / "checkpoints"))  # noqa: E731
    rename, replace = os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("fsync " + name_of(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    save(tmp_path, 20)
    tmp = "fsync /.tmp-step-000020"
    written = [f"{tmp}/model.bin", f"{tmp}/zero/rank0.bin", f"{tmp}/manifest.json", f"{tmp}/zero", tmp]
    assert events == [*written, "rename", "fsync ", f"fsync /.tmp-latest-{os.getpid()}", "replace", "fsync "]


@pytest.mark.parametrize("where", ["_fsync_file", "fsync_folder", "write_atomic", "_hashes"])
def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save(tmp_path, 20)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, where, full)
        with pytest.raises(
            UserError, match=r"the checkpoint of step 40 cannot be written to .*: No space left on device"
        ):
            save(tmp_path, 40)
    assert ".tmp-step-000040" not in names(tmp_path)
    found = quiet_latest(tmp_path)
    assert found is not None
    assert find_damage(tmp_path / "checkpoints" / "step-000020") is None
    save(tmp_path, 40)
    assert quiet_latest(tmp_path) == tmp_path / "checkpoints" / "step-000040"


def test_a_disk_with_no_room_for_another_checkpoint_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 20)
    monkeypatch.setattr(
        checkpoint.shutil, "disk_usage", lambda _: checkpoint.shutil._ntuple_diskusage(100, 90, 10)
    )  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="does not fit on the disk"):
        begin(tmp_path, 40)
    assert names(tmp_path) == ["latest", "step-000020"]
