"""The Python API: `fst_fast.train(...)`. `fst train` (cli.py) calls the same trainer, with the same configuration and refusals."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fst_fast import mini
from fst_fast.config import Config
from fst_fast.config import load as config_load
from fst_fast.contracts import Context
from fst_fast.errors import UserError
from fst_fast.run.callbacks import Callback
from fst_fast.run.environment import prepare_environment, wall_clock


@dataclass(frozen=True)
class Result:
    """A run, as it is when `train` returns.

    run_dir: its folder. summary: what summary.json holds, None where a signal stopped the run before its last step. contexts: the
    population, the best first; a context may occur twice. lineage: of every context that the run has scored, by id, as in contexts.json.
    metrics: kind of record ("step", "cycle", "eval") -> name such as "reward" or "channels/both/mean" -> float64 [records of this kind],
    NaN where nothing was measured.
    """

    run_dir: Path
    summary: dict[str, Any] | None
    contexts: list[Context]
    lineage: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, NDArray[np.float64]]]


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    run_dir: str | Path | None = None,
    task: str | type | None = None,
    model: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    allow_config_change: bool = False,
    allow_data_change: bool = False,
    **changes: Any,
) -> Result:
    """Train a run to its last step.

    config: a Config, a tree of keys, the path of a YAML file, or None for the mini star graph. task: as the key `task`, or a class that
    is defined in a Python file (graders run in processes of their own, which import it from there). model: as `model.path`. changes: keys of
    the configuration; a mapping changes some keys of a section: `train(seed=1, slow={"steps": 20})`. run_dir: folder of the run, by default a
    new one under runs/. resume: continue the run in `run_dir`. allow_config_change, allow_data_change: continue even if the
    configuration, or the task's problems, changed.
    Raises fst_fast.UserError on bad input, before anything is written.
    """
    prepare_environment()
    from fst_fast import trainer  # loads torch

    resolved = resolve_config(config, task=task, model=model, changes=changes)
    if run_dir is None:
        if resume:
            raise UserError("resume=True needs run_dir, the folder of the run to continue")
        run_dir = Path("runs") / f"{Path(resolved.task).stem}-{wall_clock():%Y%m%d-%H%M%S-%f}"
    folder = Path(run_dir)
    summary = trainer.train(
        resolved,
        folder,
        resume=resume,
        allow_config_change=allow_config_change,
        allow_data_change=allow_data_change,
        callbacks=callbacks,
    )
    return read_result(folder, summary)


def resolve_config(
    config: Config | Mapping[str, Any] | str | Path | None,
    *,
    task: str | type | None = None,
    model: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Config:
    """The checked configuration that `train` runs. Raises UserError."""
    if config is None:
        config = mini.default_config()
    if isinstance(config, Config):
        tree = config.model_dump(mode="json", exclude_unset=True)
    elif isinstance(config, Mapping):
        tree = dict(config)
    else:
        tree = config_load.read_file(Path(config))
    if task is not None:
        name = task if isinstance(task, str) else _task_spec(task)
        if name != tree.get("task", Config.model_fields["task"].default):
            tree.pop("task_args", None)  # they are the other task's
        tree["task"] = name
    tree = merged(tree, changes or {})
    if model is not None:
        given = tree.get("model")
        section = dict(given) if isinstance(given, Mapping) else {}
        if section.get("path") != str(model):
            section.pop("revision", None)  # it is the other model's
        tree["model"] = {**section, "path": str(model)}
    return config_load.check(tree)


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with `changes`, section by section; task_args and other free dictionaries are replaced as a whole."""
    out = dict(tree)
    for key, value in changes.items():
        section = (
            key in Config.model_fields and isinstance(out.get(key), Mapping) and not key.endswith("_args")
        )
        out[key] = merged(out[key], value) if section and isinstance(value, Mapping) else value
    return out


def _task_spec(task: type) -> str:
    """`file.py:Class` of a class. Raises UserError where it is not defined at the top of a file."""
    try:
        file = inspect.getsourcefile(task)
    except TypeError:
        file = None
    if not inspect.isclass(task) or file is None or "." in task.__qualname__ or not Path(file).is_file():
        raise UserError(
            f"task={task!r}: a task is a name, a text such as my_task.py:MyTask, or a class at the top level of a Python file, from "
            "which the processes that run its grader can import it"
        )
    return f"{file}:{task.__qualname__}"


def read_result(run_dir: Path, summary: dict[str, Any] | None) -> Result:
    """Read a run's folder."""
    lineage: dict[str, dict[str, Any]] = {}
    population: list[Context] = []
    file = run_dir / "contexts.json"
    if file.is_file():
        tree = json.loads(file.read_text(encoding="utf-8"))
        lineage = tree["contexts"]
        found = {key: Context(key, c["text"], c["parent"], c["born"]) for key, c in lineage.items()}
        population = [found[context_id] for context_id in tree["population"]]
    return Result(run_dir, summary, population, lineage, read_metrics(run_dir))


def read_metrics(run_dir: Path) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The numbers of metrics.jsonl as arrays, see `Result.metrics`."""
    from fst_fast.run.metrics import METRICS, numbers_of

    rows: dict[str, list[dict[str, float]]] = {}
    with open(run_dir / METRICS, encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            kind = line.pop("kind")
            numbers = {
                name.removeprefix("/"): value for name, value in numbers_of(line, "", missing=np.nan).items()
            }
            rows.setdefault(kind, []).append(numbers)
    return {
        kind: {
            name: np.array([row.get(name, np.nan) for row in records])
            for name in dict.fromkeys(name for row in records for name in row)
        }
        for kind, records in rows.items()
    }
