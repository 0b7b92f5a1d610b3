"""What stands in for wandb, trackio and mlflow, which the test environment does not have: the part of them that run/track.py calls.

Compared with wandb 0.31.0, trackio 0.43.0 and mlflow-skinny 3.17.2 (SQLite and file store): names, arguments, what raises."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeRun:
    id: str
    name: str
    logged: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    finished: int = 0
    broken: bool = False

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.broken:
            raise ConnectionError("the server\nis away")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@dataclass
class Table:
    columns: list[str]
    data: list[list[Any]]
    allow_mixed_types: bool = False


class Module(types.ModuleType):
    """runs: by id (wandb) or by name (trackio)."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: dict[str, FakeRun] = {}
        self.asked: list[dict[str, Any]] = []
        self.Table = Table

    def _open(self, key: str, name: str, asked: dict[str, Any]) -> FakeRun:
        self.asked.append(asked)
        if asked["resume"] == "must" and key not in self.runs:
            raise ValueError(f"Run '{key}' does not exist\nin project '{asked['project']}'")
        return self.runs.setdefault(key, FakeRun(key, name))


class Wandb(Module):
    run: FakeRun | None = None

    def init(self, *, project: str, id: str, name: str, resume: str, dir: str) -> FakeRun:
        return self._open(id, name, {"project": project, "id": id, "resume": resume})


class Trackio(Module):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.current: FakeRun | None = None
        self.context_vars = types.SimpleNamespace(current_run=types.SimpleNamespace(get=lambda: self.current))

    def init(self, *, project: str, name: str, resume: str) -> FakeRun:
        self.current = self._open(name, name, {"project": project, "name": name, "resume": resume})
        return self.current

    def finish(self) -> None:
        assert self.current
        self.current.finish()
        self.current = None


class MlflowException(Exception):
    pass


@dataclass(frozen=True)
class Metric:
    key: str
    value: float
    timestamp: int
    step: int


class Mlflow(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.active: Any = None
        self.exceptions = types.SimpleNamespace(MlflowException=MlflowException)
        self.entities = types.SimpleNamespace(Metric=Metric)

    def active_run(self) -> Any:
        return self.active

    def MlflowClient(self) -> Mlflow:
        return self

    def create_experiment(self, name: str) -> str:
        if name in self.experiments:
            raise MlflowException(f"Experiment '{name}' already exists.")
        self.experiments[name] = str(len(self.experiments) + 1)
        return self.experiments[name]

    def get_experiment_by_name(self, name: str) -> Any:
        found = self.experiments.get(name)
        return types.SimpleNamespace(experiment_id=found) if found else None

    def create_run(self, experiment_id: str, run_name: str) -> Any:
        run_id = f"run{len(self.runs)}"
        self.runs[run_id] = {
            "experiment": experiment_id, "name": run_name, "status": "RUNNING", "metrics": [], "calls": 0, "files": {}, "tags": {}
        }  # fmt: skip
        return self.get_run(run_id)

    def get_run(self, run_id: str) -> Any:
        if run_id not in self.runs:
            raise MlflowException(f"Run with id={run_id} not found")
        info = types.SimpleNamespace(run_id=run_id)
        return types.SimpleNamespace(
            info=info, data=types.SimpleNamespace(tags=dict(self.runs[run_id]["tags"]))
        )

    def update_run(self, run_id: str, status: str) -> None:
        self.get_run(run_id)
        self.runs[run_id]["status"] = status

    def log_batch(self, run_id: str, metrics: list[Metric]) -> None:
        assert len(metrics) <= 1000
        self.runs[run_id]["calls"] += 1
        self.runs[run_id]["metrics"] += metrics

    def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
        self.runs[run_id]["files"][artifact_file] = dictionary

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.runs[run_id]["tags"][key] = value

    def set_terminated(self, run_id: str) -> None:
        self.runs[run_id]["status"] = "FINISHED"
