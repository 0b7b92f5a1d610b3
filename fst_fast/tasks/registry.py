"""Maps a task's name to its implementation.

A spec is a built-in name, `file.py:Class`, `reasoning_gym:NAME`, `verifiers:NAME`, `openenv:URL`, `program`, or rows with args["verify"] as the grader: `hf:NAME`,
`data.jsonl`, `.csv`, `.tsv`, `.parquet`. A new built-in task is one file and one line in BUILT_IN; a module is imported only when its task
is used.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.tasks import gym, openenv, readers, verifiers_env
from fst_fast.tasks.programs import Programs
from fst_fast.tasks.rows import RowTask, check_count
from fst_fast.tasks.tools.builtin import named_tools
from fst_fast.tasks.user import load_object, make_task
from fst_fast.tasks.verifiers_turns import VerifiersEpisodes

BUILT_IN = {
    "star_graph": "fst_fast.tasks.star_graph:StarGraph",
    "list_programs": "fst_fast.tasks.list_programs:ListPrograms",
    "linked_facts": "fst_fast.tasks.linked_facts:LinkedFacts",
    "hidden_facts": "fst_fast.tasks.hidden_facts:HiddenFacts",
    "formula_choice": "fst_fast.tasks.formula_choice:FormulaChoice",
    "mixture": "fst_fast.tasks.mixture:Mixture",
}


def task_spec(config: Config) -> tuple[str, dict[str, Any]]:
    """The arguments of load_task, also in the verifying children: the task, or the mixture of all stages' tasks."""
    if not config.stages:
        return config.task, dict(config.task_args)
    return "mixture", {"tasks": [{"task": s.task, "task_args": dict(s.task_args)} for s in config.stages]}


def load_task(spec: str, args: Mapping[str, Any], *, problems: bool = True) -> Any:
    """Create the Task or Environment that `spec` names, with `args`. Raises UserError for any mistake in them.

    problems=False: rows are not read before problems are asked for; a verifying child never asks for them."""
    where = f"task={spec}"
    if spec in BUILT_IN:
        module, _, name = BUILT_IN[spec].partition(":")
        return make_task(getattr(importlib.import_module(module), name), args, where)
    if spec.startswith(gym.PREFIX):
        return gym.ReasoningGym(spec.removeprefix(gym.PREFIX), **args)
    if spec.startswith(verifiers_env.PREFIX):
        name = spec.removeprefix(verifiers_env.PREFIX)
        loaded: Any = make_task(verifiers_env.VerifiersTask, {"name": name, **args}, where)
        return VerifiersEpisodes(loaded) if loaded.turns else loaded
    if spec.startswith(readers.HUB) or Path(spec).suffix in readers.FILES:
        task = _from_rows(spec, {name: value for name, value in args.items() if name != "tools"})
        if "tools" in args:
            task.tools = named_tools(args["tools"])
        if problems:
            task.read()
        return task
    if spec.startswith(openenv.PREFIX):
        return make_task(openenv.OpenEnv, {**args, "url": spec.removeprefix(openenv.PREFIX)}, where)
    if spec == "program":
        return _program(args, problems=problems)
    if ".py" in spec:
        return make_task(load_object(spec, "task"), args, where)
    near = difflib.get_close_matches(spec, BUILT_IN, n=1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"allowed are {', '.join(BUILT_IN)}, program, file.py:Class, data.jsonl (.csv, .tsv, .parquet), "
        f"{readers.HUB}NAME, {gym.PREFIX}NAME, {verifiers_env.PREFIX}NAME, or {openenv.PREFIX}URL"
    )
    raise UserError(f"task={spec!r} is not known; {hint}")


def check_task_args(config: Config) -> None:
    """Raise UserError for arguments of a task that cannot be right, whatever its data are. Nothing is read; files and environments of the
    user, which would run, are not looked at."""
    parts = [(s.task, s.task_args) for s in config.stages] or [(config.task, config.task_args)]
    for spec, args in parts:
        if ".py" not in f"{spec} {args}" and not spec.startswith(verifiers_env.PREFIX):
            # which may be files and code
            rest = {name: value for name, value in args.items() if name != "tools"}
            load_task(spec, rest, problems=False)


def _program(args: Mapping[str, Any], *, problems: bool) -> Any:
    """An agent program around the inner task that args["task"] and args["task_args"] name."""
    inner, given = args.get("task"), args.get("task_args") or {}
    if not isinstance(inner, str) or not isinstance(given, Mapping):
        raise UserError(
            f"task_args.task={inner!r} of task=program must name the task that has the problems and judges; its arguments are task_args.task_args"
        )
    task = load_task(inner, given, problems=problems)
    rest = {name: value for name, value in args.items() if name not in ("task", "task_args")}
    return make_task(Programs, {"task": task, **rest}, "task=program")


def _from_rows(spec: str, args: Mapping[str, Any]) -> RowTask:
    """A task from a file or from a data set. Its arguments are those of RowTask and of the reader."""
    on_hub = spec.startswith(readers.HUB)
    own = ("config", "train", "validation", "revision", "streaming") if on_hub else ("validation",)
    allowed = [*own, *list(inspect.signature(RowTask).parameters)[2:]]
    for name in args:
        if name not in allowed:
            raise UserError(f"task={spec}: task_args.{name} is not known; allowed are {', '.join(allowed)}")
    reader = {name: args.get(name) for name in own}
    for name, value in reader.items():
        if name == "streaming":
            check_count(name, value, 1)
        elif value is not None and (not isinstance(value, str) or not value):
            raise UserError(f"task_args.{name}={value!r} must be a text that is not empty, or null")
    train, validation = reader.pop("train", None) or "train", reader.pop("validation")
    parts = {"train": train if on_hub else spec} | ({"validation": validation} if validation else {})
    if on_hub:
        data = spec.removeprefix(readers.HUB)
        sources = {
            split: (part, partial(readers.read_hub, data, split=part, **reader))
            for split, part in parts.items()
        }
    else:
        sources = {
            split: (_stem(file), partial(readers.read_file, Path(file))) for split, file in parts.items()
        }
    rest = {name: value for name, value in args.items() if name not in own}
    return RowTask(spec, sources, **rest)


def _stem(file: str) -> str:
    return Path(file).stem.encode("utf-8", "replace").decode()  # a file's name need not be text
