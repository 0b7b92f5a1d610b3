"""metrics.jsonl, timing.jsonl and rollouts.jsonl: one strict JSON object a line, on the disk as soon as it is written.

metrics.jsonl holds nothing of the clock, so that two runs of one seed, or a broken and an unbroken run, can be compared byte by byte; what
the clock says goes to timing.jsonl. A checkpoint's manifest keeps the sizes of the files, and a resumed run cuts them back: what was
written between the checkpoint and the kill is written again, and nothing stands there twice.
Trackers (track.py) get the numbers of every record as well; the files do not depend on them.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fst_fast.config import TrackConfig
from fst_fast.errors import UserError
from fst_fast.run.checkpoint import log_sizes
from fst_fast.run.faults import reach
from fst_fast.run.folder import disk_errors
from fst_fast.run.track import COLUMNS, Tracker, open_trackers

METRICS, TIMING, ROLLOUTS = FILES = ("metrics.jsonl", "timing.jsonl", "rollouts.jsonl")
TABLE_ROWS = 256  # of a tracker's table, at most; one is sent with every evaluation


class MetricsWriter:
    """resume_at_step: the step of the checkpoint from which the run goes on, None to start from nothing (also where a resumed run has no
    checkpoint yet). Only rank 0 has a writer. Raises UserError where the files are shorter than the checkpoint says, where the disk
    refuses, and where a tracker's package is missing. note: says that a tracker has failed; nothing more is sent to it, and the run goes on.

    last_seconds: `seconds` of the last record of timing.jsonl that stayed: the run's time so far."""

    def __init__(
        self,
        run_dir: Path,
        *,
        resume_at_step: int | None = None,
        track: TrackConfig | None = None,
        note: Callable[[str], None] = warnings.warn,
    ) -> None:
        sizes = {} if resume_at_step is None else log_sizes(run_dir, resume_at_step)
        self._files = {name: _open_at(run_dir / name, sizes.get(name, 0)) for name in FILES}
        self._trackers = open_trackers(run_dir, track or TrackConfig(), resume_step=resume_at_step)
        self._note = note
        self._rows: list[list[Any]] = []  # of the next table
        timings = (run_dir / TIMING).read_text().splitlines()
        self.last_seconds = float(json.loads(timings[-1])["seconds"]) if timings else 0.0

    def write(self, kind: str, /, **fields: Any) -> None:
        """One record of metrics.jsonl. Raises ValueError, naming the key, for a number that is not finite."""
        reach("metrics")
        self._append(METRICS, {"kind": kind, **fields})
        self._track(kind, fields)

    def write_timing(self, **fields: Any) -> None:
        """One record of timing.jsonl."""
        self._append(TIMING, fields)
        self._track("timing", fields)

    def write_rollout(self, **fields: Any) -> None:
        """One record of rollouts.jsonl."""
        self._append(ROLLOUTS, fields)
        if self._trackers:
            self._rows.append([fields.get(name) for name in COLUMNS])
            if len(self._rows) >= TABLE_ROWS:
                self._send_table()

    def close(self) -> None:
        """Close the files and let the trackers send what they have. May be called twice."""
        for file in self._files.values():
            file.close()
        self._send_table()
        self._each_tracker(lambda tracker: tracker.close())
        self._trackers = []

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        line = json.dumps(_plain(record, name), allow_nan=False, ensure_ascii=False)
        data = memoryview(line.encode("utf-8", "replace") + b"\n")
        file = self._files[name]
        with disk_errors(f"{file.name} cannot be written"):
            while data:
                data = data[file.write(data) :]

    def _track(self, kind: str, fields: Mapping[str, Any]) -> None:
        if self._trackers and fields.get("step") is not None:
            values = numbers_of({key: value for key, value in fields.items() if key != "step"}, kind)
            self._each_tracker(lambda tracker: tracker.log(int(fields["step"]), values))
            if kind == "eval":
                self._send_table()

    def _send_table(self) -> None:
        rows, self._rows = self._rows, []
        if rows:
            self._each_tracker(lambda tracker: tracker.table(int(rows[-1][0]), rows))

    def _each_tracker(self, do: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                do(tracker)
            except Exception as error:  # noqa: BLE001  # a server that is away for a while must not end a run
                self._trackers.remove(tracker)
                self._note(
                    f"warning: {type(tracker).__name__} has failed and gets nothing more from this run: "
                    f"{' '.join(str(error).split())[:300]}"
                )


def _open_at(path: Path, position: int) -> Any:
    """Unbuffered: one record is one write, and a kill loses nothing that was written."""
    with disk_errors(f"{path} cannot be written"):
        file = open(path, "ab", buffering=0)  # noqa: SIM115
        size = file.seek(0, os.SEEK_END)
        if size < position:
            file.close()
            raise UserError(
                f"{path} has {size} bytes, the checkpoint was written when it had {position}; the run cannot be continued"
            )
        file.truncate(position)
        file.seek(position)
    return file


def _plain(value: Any, at: str) -> Any:
    """The value as JSON has it: numpy numbers become Python's. Raises ValueError or TypeError naming the key."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(
                f"{at} is {value}: a metric must be a finite number, or None where there is none"
            )
        return value
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item, f"{at}: {key}" if at in FILES else f"{at}.{key}")
            for key, item in value.items()
        }
    if isinstance(value, Sequence):
        return [_plain(item, f"{at}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{at} is a {type(value).__name__}, which JSON does not have")


def numbers_of(fields: Mapping[str, Any], prefix: str, *, missing: float | None = None) -> dict[str, float]:
    """The numbers of a record under names like `eval/channels/both/mean`; texts and lists have no curve and are left out.

    missing: what stands for a number that was not measured (null); None: it is left out too."""
    found: dict[str, float] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}/{key}", missing=missing)
        elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
            found[f"{prefix}/{key}"] = float(value)
        elif value is None and missing is not None:
            found[f"{prefix}/{key}"] = missing
    return found
