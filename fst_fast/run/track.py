"""Experiment trackers: TensorBoard, Weights & Biases, trackio. Each is imported only if configured.

Trackers hold copies; metrics.jsonl is the record. A resumed run continues under the id stored in RUN/track.json. After
a resume W&B and trackio may receive steps twice; the values are the same.
"""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from fst_fast.config import TrackConfig
from fst_fast.errors import UserError
from fst_fast.run.folder import write_json


class Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None) -> None:
        # purge_step hides earlier records of the steps that are run again.
        purge = None if resume_step is None else resume_step + 1
        self._writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter(
            str(folder), purge_step=purge
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, run_dir: Path, project: str) -> None:
        self._run = _package("wandb", "wandb").init(
            project=project,
            id=_identity(run_dir),
            name=run_dir.resolve().name,
            resume="allow",
            dir=str(run_dir),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    def __init__(self, run_dir: Path, project: str) -> None:
        name = f"{run_dir.resolve().name}-{_identity(run_dir)[:6]}"
        self._run = _package("trackio", "trackio").init(project=project, name=name, resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_trackers(run_dir: Path, config: TrackConfig, *, resume_step: int | None) -> list[Tracker]:
    """The configured trackers. Raises UserError if a package is missing or a tracker fails to start."""
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(run_dir / "tensorboard", resume_step))
    if config.wandb:
        trackers.append(_start("wandb", config.wandb, lambda: Wandb(run_dir, config.wandb or "")))
    if config.trackio:
        trackers.append(_start("trackio", config.trackio, lambda: Trackio(run_dir, config.trackio or "")))
    return trackers


def check_trackers(config: TrackConfig) -> None:
    """Raise UserError if the package of a configured tracker is missing, before anything is written."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb, "trackio": config.trackio}
    modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
    for key, asked in wanted.items():
        if asked:
            _package(modules[key], key)


def _start(key: str, project: str, make: Any) -> Tracker:
    try:
        tracker: Tracker = make()
    except UserError:
        raise
    except Exception as error:  # no network, no login: each package has its own exceptions
        raise UserError(
            f"track.{key}={project!r} cannot be started: {' '.join(str(error).split())[:300]}"
        ) from error
    return tracker


def _package(module: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"track.{key} needs a package that is not installed ({error}); install it with: pip install fst-fast[track]"
        ) from error


def _identity(run_dir: Path) -> str:
    path = run_dir / "track.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:12]})
    return str(json.loads(path.read_text())["id"])
