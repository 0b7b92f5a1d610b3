"""A run folder as it grows: what `fst watch` shows, brought up to date by reading what was appended since the last look.

Only reads. A last line that is half written waits for its rest. A resumed run cuts its files back to the checkpoint and writes on: where the bytes
before the last position are no longer those that were read, the file is read again. Curves are averaged into at most POINTS points, so a run of
a hundred thousand steps is as light as a short one; of rollouts.jsonl only the end is read.
"""

from __future__ import annotations

import json
import math
import os
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from fst_fast.config.yaml_text import YamlProblem, read_yaml
from fst_fast.contracts import CELLS
from fst_fast.errors import UserError
from fst_fast.report.lineage import Change, context_diff
from fst_fast.report.pages import cut
from fst_fast.run.environment import wall_clock
from fst_fast.run.folder import CONFIG, FORMAT, LOCK, MARKER
from fst_fast.run.liveness import FOLDER as PROCESSES
from fst_fast.run.metrics import METRICS, ROLLOUTS, TIMING
from fst_fast.run.metrics_schema import VERSION
from fst_fast.run.troubles import KINDS, sentence

POINTS, BARS = 400, 48
TAIL_BYTES = 1 << 20  # of rollouts.jsonl
SHOWN_ROLLOUTS, SHOWN_CONTEXTS = 60, 300
RATE_STEPS = 64  # over which the rate is measured
CHUNK = 8 << 20  # bytes read at a time
MARK = 64  # bytes before the position by which a file is recognised

STEP_COLUMNS = ("reward", "kl", "mismatch_kl", "entropy", "grad_norm", "response_tokens", "length_stopped")
PHASES = {"rollout_s": "rollouts", "verify_s": "verification", "train_s": "update", "fast_s": "fast phase", "eval_s": "evaluation"}  # fmt: skip
UNITS = {"step": "step", "cycle": "fast phase", "timing": "step"}
ROLLOUT_KEYS = (
    "step", "phase", "problem_id", "context_id", "sample", "reward", "advantage", "finish", "prompt", "response", "feedback"
)  # fmt: skip

Json = dict[str, Any]
Floats = NDArray[np.float64]


class Tail:
    """Reads a JSON-lines file from where it stopped. only_end: of a long file, begin TAIL_BYTES before its end."""

    def __init__(self, path: Path, *, only_end: bool = False) -> None:
        self.path, self.only_end = path, only_end
        self.position, self.mark = 0, b""
        self.damaged = 0  # whole lines that are no JSON object

    def read(self) -> tuple[bool, list[Json]]:
        """(whether it begins anew, new records): of at most CHUNK bytes, or one longer line; nothing where there is no more."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except FileNotFoundError:
            again, self.position, self.mark = self.position > 0, 0, b""
            return again, []
        with file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(self.position - len(self.mark), 0))
            again = self.position > 0 and (size < self.position or file.read(len(self.mark)) != self.mark)
            if again:
                self.position, self.mark, self.damaged = 0, b"", 0
            skips = self.only_end and size - self.position > TAIL_BYTES
            file.seek(size - TAIL_BYTES if skips else self.position)
            if skips:
                file.readline()
                self.position = file.tell()
            new = file.read(CHUNK)
            if b"\n" not in new:
                new += file.readline()
        new = new[: new.rfind(b"\n") + 1]
        self.position += len(new)
        self.mark = (self.mark + new)[-MARK:]
        return again, list(self._records(new))

    def _records(self, text: bytes) -> Iterable[Json]:
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                yield record
            elif line.strip():
                self.damaged += 1


class Columns:
    """Numbers by name in the order of the records; NaN where there is none."""

    def __init__(self, *names: str) -> None:
        self.columns = {name: array("d") for name in ("step", *names)}

    def add(self, step: float, values: Mapping[str, Any]) -> None:
        """A step that is repeated, as after a resume, counts as it was done last."""
        while len(self.columns["step"]) and self.columns["step"][-1] > step:
            for column in self.columns.values():
                column.pop()
        for name, column in self.columns.items():
            value = step if name == "step" else values.get(name)
            column.append(float(value) if isinstance(value, int | float) else math.nan)

    def __len__(self) -> int:
        return len(self.columns["step"])

    def arrays(self) -> dict[str, Floats]:
        return {name: np.array(column) for name, column in self.columns.items()}

    def averaged(self, points: int = POINTS) -> dict[str, list[float | None]]:
        """At most so many points: means over neighbouring records, of what was measured; the step of a point is its last one."""
        n = len(self)
        if not n:
            return {name: [] for name in self.columns}
        starts = np.unique(np.arange(min(points, n)) * n // min(points, n))
        ends = np.append(starts[1:], n) - 1
        found = {}
        for name, y in self.arrays().items():
            there = np.isfinite(y)
            count = np.add.reduceat(there.astype(np.float64), starts)
            total = np.add.reduceat(np.where(there, y, 0.0), starts)
            mean = np.divide(total, count, out=np.full(len(starts), np.nan), where=count > 0)
            found[name] = [short(x) for x in (y[ends] if name == "step" else mean)]
        return found


class Follower:
    """The state of one run folder. `snapshot` may be called from several threads. Raises UserError where the folder is no run of this version."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._lock = threading.Lock()
        self._boot = os.urandom(4).hex()
        self._tails = {
            name: Tail(run_dir / name, only_end=name == ROLLOUTS) for name in (METRICS, TIMING, ROLLOUTS)
        }
        self._versions: Counter[str] = Counter()
        self._contexts: Json = {}
        self._contexts_stamp: tuple[int, int] | None = None
        self._diffs: dict[str, list[Change]] = {}  # against the parent, by id, which is a hash of the text
        self._begin_metrics()
        self._begin_timing()
        self._rollouts: deque[Json] = deque(maxlen=SHOWN_ROLLOUTS)
        self._check()

    def snapshot(self, have: Mapping[str, str] | None = None) -> Json:
        """What there is to show, as JSON: always `status`; of curves, contexts and rollouts those whose version is not in `have`."""
        with self._lock:
            self._check()
            self._look()
            found: Json = {"status": self._status()}
            for name, make in (
                ("curves", self._curves),
                ("contexts", self._lineage),
                ("rollouts", self._examples),
            ):
                version = f"{self._boot}.{self._versions[name]}"
                if (have or {}).get(name) != version:
                    found[name] = {"version": version, **make()}
            return found

    def _check(self) -> None:
        marker = self.run_dir / MARKER
        try:
            found = json.loads(marker.read_text(encoding="utf-8"))
            form, metrics = found.get("format", FORMAT), found.get("metrics", VERSION)
        except FileNotFoundError:
            if (self.run_dir / METRICS).is_file():
                return  # a copy
            what = "holds no run of fst" if self.run_dir.is_dir() else "does not exist"
            raise UserError(
                f"run folder {self.run_dir} {what}; name the folder that `fst train --run-dir` writes"
            ) from None
        except NotADirectoryError:
            raise UserError(
                f"run folder {self.run_dir} is a file; name the folder that `fst train --run-dir` writes"
            ) from None
        except (ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{marker} is damaged ({' '.join(str(error).split())[:200]})") from error
        if form != FORMAT or metrics != VERSION:
            raise UserError(
                f"run folder {self.run_dir} has format {form!r} with metrics of version {metrics!r}; this version of fst reads format {FORMAT} and "
                f"metrics of version {VERSION}"
            )

    def _begin_metrics(self) -> None:
        self._start: Json = {}
        self._steps = Columns(*STEP_COLUMNS, "kept")
        self._evals = Columns(*CELLS, "kl_seed", "kl_evolved")
        self._cycles = Columns("best_mean", "seed_mean")
        self._last: dict[str, Json] = {}  # kind -> the newest record
        self._trouble_records: Counter[str] = Counter()
        self._marks: list[Json] = []
        self._ended = False

    def _begin_timing(self) -> None:
        self._seconds = Columns(*PHASES)
        self._clock: deque[tuple[float, float]] = deque(maxlen=RATE_STEPS)
        self._last.pop("timing", None)

    def _look(self) -> None:
        self._versions["curves"] += self._read(METRICS, self._begin_metrics, self._take)
        self._versions["curves"] += self._read(TIMING, self._begin_timing, self._take_timing)
        self._versions["rollouts"] += self._read(ROLLOUTS, self._rollouts.clear, self._rollouts.append)
        self._read_contexts()

    def _read(self, name: str, begin: Callable[[], None], take: Callable[[Json], None]) -> int:
        """Bring one file up to date; 1 where there was something new."""
        tail, new = self._tails[name], 0
        while True:
            again, records = tail.read()
            if again:
                begin()
            for record in records:
                try:
                    take(record)
                except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
                    tail.damaged += 1
            new |= bool(again or records)
            if not records:
                return new

    def _take(self, record: Json) -> None:
        kind, step = record.get("kind"), record.get("step")
        if kind == "start":
            self._start = record
        if not isinstance(step, int):
            return
        self._ended = kind == "end"
        self._last[str(kind)] = record
        self._trouble_records.update((record.get("troubles") or {}).keys())
        if kind == "step":
            groups = record.get("groups")
            kept = {"kept": record["groups_kept"] / groups} if groups and "groups_kept" in record else {}
            self._steps.add(step, record | kept)
        elif kind == "eval":
            means = {name: cell.get("mean") for name, cell in record.get("channels", {}).items()}
            self._evals.add(step, record | means)
        elif kind == "cycle":
            self._cycles.add(step, record)
        elif kind == "stage" and record.get("after_stage") == record.get("stage"):
            self._marks.append({"step": step, "label": f"end of {record.get('task')}"})
        elif kind == "config":
            self._marks.append({"step": step, "label": "continued, something changed"})

    def _take_timing(self, row: Json) -> None:
        if not isinstance(row.get("step"), int) or not isinstance(row.get("seconds"), int | float):
            return
        while self._clock and self._clock[-1][0] >= row["step"]:
            self._clock.pop()
        self._clock.append((row["step"], row["seconds"]))
        self._seconds.add(row["step"], row)
        if "tokens_per_s" in row:
            self._last["timing"] = row
            self._trouble_records.update((row.get("troubles") or {}).keys())

    def _read_contexts(self) -> None:
        path = self.run_dir / "contexts.json"
        try:
            stat = path.stat()
            stamp = (stat.st_mtime_ns, stat.st_size)
            if stamp != self._contexts_stamp:
                self._contexts = json.loads(path.read_text(encoding="utf-8"))
                self._contexts_stamp = stamp
                self._versions["contexts"] += 1
        except FileNotFoundError:
            return
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]})") from error

    def _status(self) -> Json:
        total = self._total_steps()
        step = max((int(r["step"]) for r in self._last.values()), default=0)
        state = "finished" if self._ended else "running" if self._is_running() else "stopped"
        says = {
            "finished": "The run has finished.",
            "running": "The run is going on.",
            "stopped": "No process on this machine writes to this run. If it does not run on another one, --resume continues it.",
        }[state]
        phase, since = self._phase() if state == "running" else (None, None)
        return {
            "run": self.run_dir.resolve().name,
            "state": state,
            "says": says,
            "step": step,
            "steps": total,
            "phase": phase,
            "phase_s": since,
            "seconds": self._clock[-1][1] if self._clock else None,
            "left_s": self._time_left(step, total) if state == "running" else None,
            "start": {key: self._start.get(key) for key in ("method", "task", "model", "seed")},
            "troubles": self._troubles(),
            "damaged": sum(tail.damaged for tail in self._tails.values()),
        }

    def _time_left(self, step: int, total: int | None) -> float | None:
        """At the rate of the last steps, evaluations and fast phases between them included; None while that is not known."""
        if total is None or len(self._clock) < 2 or step >= total:
            return None
        (first, began), (last, now) = self._clock[0], self._clock[-1]
        return (now - began) / (last - first) * (total - step)

    def _total_steps(self) -> int | None:
        try:
            tree = read_yaml((self.run_dir / CONFIG).read_text(encoding="utf-8"))
            return int(tree["slow"]["steps"])
        except (OSError, ValueError, KeyError, TypeError, YamlProblem):
            return None

    def _is_running(self) -> bool:
        """Whether the process that took the lock lives. A lock file older than the process of its number is another process's."""
        try:
            lock = self.run_dir / LOCK
            process = psutil.Process(int(lock.read_text()))
            return (
                process.create_time() <= lock.stat().st_mtime + 1 and process.status() != psutil.STATUS_ZOMBIE
            )
        except (OSError, ValueError, psutil.Error):
            return False

    def _phase(self) -> tuple[str | None, float | None]:
        """What the first process is doing, and for how long."""
        try:
            path = self.run_dir / PROCESSES / "0"
            text, since = path.read_text(encoding="utf-8"), path.stat().st_mtime
        except (OSError, UnicodeDecodeError):
            return None, None
        return text.rpartition(", ")[2] or None, max(0.0, wall_clock().timestamp() - since)

    def _troubles(self) -> list[Json]:
        found = []
        for source, unit in UNITS.items():
            for name, trouble in (self._last.get(source, {}).get("troubles") or {}).items():
                if name in KINDS:
                    kind = KINDS[name]
                    found.append(
                        {"kind": name, "title": kind.title, "says": sentence(name, trouble), "page": kind.page, "count": trouble["count"], "unit": unit}
                    )  # fmt: skip
        return found

    def _curves(self) -> Json:
        evaluation = self._last.get("eval", {})
        step = self._last.get("step", {})
        cycle = self._last.get("cycle", {})
        return {
            "steps": self._steps.averaged(),
            "records": len(self._steps),
            "evals": self._evals.averaged(),
            "cycles": self._cycles.averaged(),
            "seconds": self._bars(),
            "marks": self._marks[-50:],
            "cells": evaluation.get("channels", {}),
            "cells_step": evaluation.get("step"),
            "counters": {
                key: step.get(key)
                for key in ("rollouts", "fast_rollouts", "tokens_computed", "tokens_unshared")
            },
            "speed": self._last.get("timing", {}).get("tokens_per_s"),
            "cycle": {key: cycle.get(key) for key in ("cycle", "proposed", "admitted", "refused")},
            "trouble_records": dict(self._trouble_records),
        }

    def _bars(self) -> Json:
        """Seconds for each step by kind of work, over equal stretches of steps."""
        rows = self._seconds.arrays()
        if not len(self._seconds):
            return {"edges": [], **{name: [] for name in PHASES}}
        first, last = max(int(rows["step"].min()), 1) - 1, max(int(rows["step"].max()), 1)
        edges = np.unique(np.linspace(first, last, min(BARS, last - first) + 1).round())
        at = np.clip(rows["step"], edges[0] + 0.5, edges[-1])
        bins = np.clip(np.searchsorted(edges, at, side="left") - 1, 0, len(edges) - 2)
        spent = {
            name: np.bincount(bins, np.nan_to_num(rows[name]), len(edges) - 1) / np.diff(edges)
            for name in PHASES
        }
        return {
            "edges": edges.tolist(),
            **{name: [short(x) for x in values] for name, values in spent.items()},
        }

    def _lineage(self) -> Json:
        """The population with its diffs, and the newest contexts with the ancestors of the population. Raises UserError where the file is not as
        the trainer writes it."""
        try:
            return self._lineage_of(self._contexts)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.run_dir / 'contexts.json'} is damaged ({type(error).__name__}: {error})"
            ) from error

    def _lineage_of(self, tree: Json) -> Json:
        known: dict[str, Json] = tree.get("contexts", {})
        copies = Counter(id for id in tree.get("population", []) if id in known)
        chains = {id: _chain(known, id) for id in copies}
        kept = dict.fromkeys(id for chain in chains.values() for id in chain)
        newest = sorted(known, key=lambda id: known[id].get("born", 0), reverse=True)
        kept |= dict.fromkeys(newest[: max(0, SHOWN_CONTEXTS - len(kept))])
        return {
            "population": [{"id": id, "copies": n, "chain": chains[id]} for id, n in copies.items()],
            "nodes": {id: self._node(known, id) for id in kept},
            "total": len(known),
        }

    def _node(self, known: Mapping[str, Json], id: str) -> Json:
        context = known[id]
        if id not in self._diffs:
            parent, text = known.get(context.get("parent") or ""), cut(str(context["text"]))
            self._diffs[id] = context_diff(cut(str((parent or context)["text"])), text)
        failures = [
            {"problem_id": f["problem_id"], "feedback": cut(f["feedback"])}
            for f in context.get("failures", [])
        ]
        return {
            **{key: context.get(key) for key in ("parent", "born", "admitted", "mean", "n")},
            "changes": self._diffs[id],
            "failures": failures,
            "reflection": cut(context.get("reflection") or ""),
        }

    def _examples(self) -> Json:
        return {
            "rollouts": [
                {key: cut(value) if isinstance(value := row.get(key), str) else value for key in ROLLOUT_KEYS}
                for row in reversed(self._rollouts)
            ]
        }


def _chain(known: Mapping[str, Json], id: str | None) -> list[str]:
    """From the oldest ancestor to the context; a ring of parents is cut."""
    chain: list[str] = []
    while id is not None and id in known and id not in chain:
        chain.append(id)
        id = known[id].get("parent")
    return chain[::-1]


def short(x: float) -> float | None:
    """Five digits, None where there is no number."""
    return float(f"{x:.5g}") if math.isfinite(x) else None
