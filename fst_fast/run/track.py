"""Experiment trackers: TensorBoard, Weights & Biases, trackio, MLflow. Each is imported only if configured.

Trackers hold copies; metrics.jsonl is the record. Every tracker gets the numbers of every record and, as a table, the rollouts of rollouts.jsonl.
A tracker writes to the run that track.attach names, else to the one that is active in this process, else to that of RUN/track.json (a resumed run),
else to a new one; a run that was active stays open at the end. After a resume W&B, trackio and MLflow may receive steps twice; the values are
the same.
"""

from __future__ import annotations

import importlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from fst_fast.config import TrackConfig
from fst_fast.errors import UserError
from fst_fast.run.environment import wall_clock
from fst_fast.run.folder import write_json

COLUMNS = (
    "step", "phase", "problem_id", "context_id", "sample", "reward", "advantage", "finish", "prompt", "response", "feedback"
)  # fmt: skip
"""Of the tables; a prompt begins with its context."""
TABLE = "rollouts"
METRICS_PER_CALL = 1000  # of MLflow
PACKAGES = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
}

Rows = Sequence[Sequence[Any]]


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def table(self, step: int, rows: Rows) -> None:
        """rows: of COLUMNS."""

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None) -> None:
        # purge_step hides earlier records of the steps that are run again.
        purge = None if resume_step is None else resume_step + 1
        self._writer = _package("tensorboard").SummaryWriter(str(folder), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def table(self, step: int, rows: Rows) -> None:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *([_markdown(cell) for cell in row] for row in rows)]
        self._writer.add_text(TABLE, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, run_dir: Path, project: str, attach: str | None) -> None:
        self._package = _package("wandb")
        active = None if attach else self._package.run
        self._own = active is None
        self._run = active or self._package.init(
            project=project,
            id=attach or _stored(run_dir, "wandb") or _identity(run_dir),
            name=run_dir.resolve().name,
            resume="must" if attach else "allow",
            dir=str(run_dir),
        )
        _store(run_dir, "wandb", self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, step: int, rows: Rows) -> None:
        data = self._package.Table(
            columns=list(COLUMNS), data=[list(row) for row in rows], allow_mixed_types=True
        )
        self._run.log({TABLE: data}, step=step)

    def close(self) -> None:
        if self._own:
            self._run.finish()


class Trackio:
    def __init__(self, run_dir: Path, project: str, attach: str | None) -> None:
        self._package = _package("trackio")
        active = None if attach else self._package.context_vars.current_run.get()
        self._own = active is None
        name = attach or _stored(run_dir, "trackio") or f"{run_dir.resolve().name}-{_identity(run_dir)[:6]}"
        self._run = active or self._package.init(
            project=project, name=name, resume="must" if attach else "allow"
        )
        _store(run_dir, "trackio", self._run.name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, step: int, rows: Rows) -> None:
        data = self._package.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        self._run.log({TABLE: data}, step=step)

    def close(self) -> None:
        if self._own:
            self._package.finish()  # that of the run itself would leave it active


class Mlflow:
    """Through the client, which leaves alone what is active in the process."""

    def __init__(self, run_dir: Path, experiment: str, attach: str | None) -> None:
        self._package = _package("mlflow")
        self._client = self._package.MlflowClient()
        active = None if attach else self._package.active_run()
        self._own = active is None
        found = attach or (active.info.run_id if active else _stored(run_dir, "mlflow"))
        if found:
            self._client.update_run(found, status="RUNNING")
        else:
            found = self._client.create_run(
                self._experiment(experiment), run_name=run_dir.resolve().name
            ).info.run_id
        self._id = str(found)
        _store(run_dir, "mlflow", self._id)

    def _experiment(self, name: str) -> str:
        try:
            return str(self._client.create_experiment(name))
        except self._package.exceptions.MlflowException:
            # it exists: perhaps for years, perhaps since a moment ago
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * wall_clock().timestamp())
        metrics = [
            self._package.entities.Metric(re.sub(r"[^\w\-. :/]", "_", name)[:250], value, now, step)
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), METRICS_PER_CALL):
            self._client.log_batch(self._id, metrics=metrics[start : start + METRICS_PER_CALL])

    def table(self, step: int, rows: Rows) -> None:
        """The newest rows replace the table: the tag that lists the tables of a run holds few."""
        file = f"{TABLE}.json"
        self._client.log_dict(self._id, {"columns": list(COLUMNS), "data": [list(row) for row in rows]}, file)
        tag = "mlflow.loggedArtifacts"
        listed = json.loads(self._client.get_run(self._id).data.tags.get(tag, "[]"))
        if not any(entry["path"] == file for entry in listed):
            self._client.set_tag(self._id, tag, json.dumps([*listed, {"path": file, "type": "table"}]))

    def close(self) -> None:
        if self._own:
            self._client.set_terminated(self._id)


def open_trackers(run_dir: Path, config: TrackConfig, *, resume_step: int | None) -> list[Tracker]:
    """The configured trackers. Raises UserError if a package is missing or a tracker fails to start."""
    trackers: list[Tracker] = []
    attach = config.attach
    if config.tensorboard:
        folder = Path(attach.tensorboard or run_dir / "tensorboard")
        trackers.append(TensorBoard(folder, resume_step))
    makers: dict[str, Callable[[Path, str, str | None], Tracker]] = {
        "wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow
    }  # fmt: skip
    for key, make in makers.items():
        if name := getattr(config, key):
            try:
                trackers.append(make(run_dir, name, getattr(attach, key)))
            except UserError:
                raise
            except Exception as error:
                # no network, no login, no such run: each package has its own exceptions
                run = f" with track.attach.{key}={getattr(attach, key)!r}" if getattr(attach, key) else ""
                raise UserError(
                    f"track.{key}={name!r}{run} cannot be started: {' '.join(str(error).split())[:300]}"
                ) from error
    return trackers


def check_trackers(config: TrackConfig) -> None:
    """Raise UserError if the package of a configured tracker is missing, before anything is written."""
    for key in PACKAGES:
        if getattr(config, key):
            _package(key)


def _package(key: str) -> ModuleType:
    try:
        return importlib.import_module(PACKAGES[key])
    except ImportError as error:
        raise UserError(
            f"track.{key} needs a package that is not installed ({error}); install it with: pip install fst-fast[track]"
        ) from error


def _identity(run_dir: Path) -> str:
    """A name for the run that no other has."""
    return _stored(run_dir, "id") or _store(run_dir, "id", uuid.uuid4().hex[:12])


def _stored(run_dir: Path, key: str) -> str | None:
    path = run_dir / "track.json"
    return json.loads(path.read_text()).get(key) if path.exists() else None


def _store(run_dir: Path, key: str, value: str) -> str:
    path = run_dir / "track.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get(key) != value:
        write_json(path, {**known, key: value})
    return value


def _markdown(cell: Any) -> str:
    """Text of a model in a cell of a table."""
    text = "" if cell is None else str(cell)
    for char, shown in (("&", "&amp;"), ("<", "&lt;"), ("|", "&#124;"), ("`", "&#96;"), ("\n", "<br>")):
        text = text.replace(char, shown)
    return text
