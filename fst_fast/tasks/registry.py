"""Maps a task's name to its implementation.

A spec is a built-in name, `file.py:Class`, `reasoning_gym:NAME`, `verifiers:NAME`, or `data.jsonl` (then args["verify"] is the grader). A new built-in task
is one file and one line in BUILT_IN; a module is imported only when its task is used.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.tasks import gym, verifiers
from fst_fast.tasks.jsonl import JsonlTask
from fst_fast.tasks.tools.builtin import named_tools
from fst_fast.tasks.user import load_object, make_task

BUILT_IN = {
    "star_graph": "fst_fast.tasks.star_graph:StarGraph",
    "list_programs": "fst_fast.tasks.list_programs:ListPrograms",
    "linked_facts": "fst_fast.tasks.linked_facts:LinkedFacts",
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

    problems=False: only `verify` will be used (in a verifying child), so a JSONL file need not be read."""
    where = f"task={spec}"
    if spec in BUILT_IN:
        module, _, name = BUILT_IN[spec].partition(":")
        return make_task(getattr(importlib.import_module(module), name), args, where)
    if spec.startswith(gym.PREFIX):
        return gym.ReasoningGym(spec.removeprefix(gym.PREFIX), **args)
    if spec.startswith(verifiers.PREFIX):
        return verifiers.Verifiers(spec.removeprefix(verifiers.PREFIX), **args)
    if spec.endswith(".jsonl"):
        rest = {name: value for name, value in args.items() if name != "tools"}
        _refuse_unknown_args(rest, where)
        task = JsonlTask(spec, **rest, read=problems)
        if "tools" in args:
            task.tools = named_tools(args["tools"])
        return task
    if ".py" in spec:
        return make_task(load_object(spec, "task"), args, where)
    near = difflib.get_close_matches(spec, BUILT_IN, n=1)
    hint = (
        f"did you mean {near[0]}?"
        if near
        else f"allowed are {', '.join(BUILT_IN)}, file.py:Class, data.jsonl, {gym.PREFIX}NAME or {verifiers.PREFIX}NAME"
    )
    raise UserError(f"task={spec!r} is not known; {hint}")


def _refuse_unknown_args(args: Mapping[str, Any], where: str) -> None:
    allowed = [name for name in inspect.signature(JsonlTask).parameters if name not in ("path", "read")]
    for name in args:
        if name not in allowed:
            raise UserError(
                f"{where}: task_args.{name} is not known for a JSONL task; allowed are {', '.join(allowed)}"
            )
