"""The record of a run: strict, on the disk at once, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fst_fast.config import TrackConfig
from fst_fast.errors import UserError
from fst_fast.run import checkpoint
from fst_fast.run.metrics import FILES, MetricsWriter, numbers_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_record_is_one_line_on_the_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write("step", step=1, reward=0.5, groups=[1, 2], refused={"long": 1}, kl=None)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"kind": "step", "step": 1, "reward": 0.5, "groups": [1, 2], "refused": {"long": 1}, "kl": null}\n'
    )
    writer.write_timing(step=1, seconds=2.5)
    writer.write_rollout(step=1, response="ein Weg \u2192 dort\nund \ud800")
    assert lines(tmp_path / "timing.jsonl") == [{"step": 1, "seconds": 2.5}]
    assert "ein Weg \u2192 dort\\nund ?" in (tmp_path / "rollouts.jsonl").read_text()
    writer.close()
    writer.close()


def test_what_was_written_survives_kill_9(tmp_path: Path) -> None:
    code = (
        "import os, pathlib; from fst_fast.run.metrics import MetricsWriter; "
        f"MetricsWriter(pathlib.Path({str(tmp_path)!r})).write('end', step=3); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert lines(tmp_path / "metrics.jsonl") == [{"kind": "end", "step": 3}]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loss": float("nan")}, "metrics.jsonl: loss is nan"),
        ({"channels": {"both": {"mean": float("inf")}}}, "metrics.jsonl: channels.both.mean is inf"),
        (
            {"population": [{"mean": 0.1}, {"mean": np.float32("nan")}]},
            r"metrics.jsonl: population\[1\].mean is nan",
        ),
    ],
)
def test_a_number_that_is_not_finite_is_refused_by_name_and_writes_nothing(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    writer = MetricsWriter(tmp_path)
    with pytest.raises(ValueError, match=said):
        writer.write("step", step=1, **fields)
    with pytest.raises(TypeError, match=r"metrics\.jsonl: when is a object"):
        writer.write("step", when=object())
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write("step", step=np.int64(3), reward=np.float32(0.5), final=np.bool_(True))
    assert lines(tmp_path / "metrics.jsonl") == [{"kind": "step", "step": 3, "reward": 0.5, "final": True}]


def record(writer: MetricsWriter, step: int) -> None:
    writer.write("step", step=step, reward=step / 7)
    writer.write_timing(step=step, seconds=10.0 * step)
    writer.write_rollout(step=step, response="ä" * step)


def save(run: Path, step: int) -> None:
    checkpoint.commit(run, checkpoint.begin(run, step), step, keep_last=2)


def test_a_resumed_run_leaves_the_files_of_an_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for path in (whole, broken):
        path.mkdir()
    with MetricsWriter(whole) as writer:
        for step in range(6):
            record(writer, step)
    with MetricsWriter(broken) as writer:
        for step in range(5):
            if step == 3:
                save(broken, step)
            record(writer, step)
    with open(broken / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "st')  # cut off by the kill
    with MetricsWriter(broken, resume_at_step=3) as writer:
        assert writer.last_seconds == 20.0
        for step in range(3, 6):
            record(writer, step)
    assert [(broken / name).read_bytes() for name in FILES] == [(whole / name).read_bytes() for name in FILES]


def test_a_run_without_a_checkpoint_starts_its_files_again(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            assert writer.last_seconds == 0.0
            record(writer, 1)
    assert [len(lines(tmp_path / name)) for name in FILES] == [1, 1, 1]


def test_files_shorter_than_the_checkpoint_says_are_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        record(writer, 1)
        save(tmp_path, 1)
    (tmp_path / "timing.jsonl").write_text("")
    with pytest.raises(
        UserError, match=r"timing.jsonl has 0 bytes, the checkpoint was written when it had \d+"
    ):
        MetricsWriter(tmp_path, resume_at_step=1)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: "):
        MetricsWriter(tmp_path).write("end", step=1)


def test_numbers_of_a_record_get_names_and_texts_are_left_out() -> None:
    fields = {
        "k": 4,
        "final": True,
        "text": "x",
        "channels": {"both": {"mean": np.float64(0.5), "list": [1]}},
        "kl": None,
    }
    assert numbers_of(fields, "eval") == {"eval/k": 4.0, "eval/channels/both/mean": 0.5}


def test_tensorboard_events_are_written_and_purged_on_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = TrackConfig(tensorboard=True)
    with MetricsWriter(tmp_path, track=track) as writer:
        for step in (1, 2, 3):
            if step == 3:
                save(tmp_path, 2)
            writer.write("step", step=step, reward=0.1 * step)
    with MetricsWriter(tmp_path, resume_at_step=2, track=track) as writer:
        writer.write("step", step=3, reward=0.9)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("step/reward")
    assert [(e.step, round(e.value, 3)) for e in events] == [(1, 0.1), (2, 0.2), (3, 0.9)]


def test_without_a_tracker_torch_is_not_imported() -> None:
    code = "import sys, fst_fast.run.metrics, fst_fast.run.console, fst_fast.run.checkpoint; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n", done.stderr


def test_tensorboard_shows_rollouts_as_text_and_can_write_where_events_are_already(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track = TrackConfig(tensorboard=True, attach={"tensorboard": str(tmp_path / "events")})
    with MetricsWriter(tmp_path, track=track) as writer:
        writer.write_rollout(step=3, reward=0.5, prompt="a | b\n`c`", response="<script>x</script>")
    assert not (tmp_path / "tensorboard").exists()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    [name] = [tag for tag in events.Tags()["tensors"] if "rollouts" in tag]
    [text] = events.Tensors(name)[0].tensor_proto.string_val
    assert b"| 0.5 |" in text
    assert b"a &#124; b<br>&#96;c&#96; | &lt;script>x&lt;/script>" in text
