"""Load objects that the user names as `file.py:name`: a task, a grader, a reflector.

The file becomes a module in sys.modules named by a hash of its path. So the same file is the same module in the trainer
and in every verifying child, and objects of its classes can be pickled between them. The file's folder is appended to
sys.path, as if the file were run as a script, so that it can import its neighbours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fst_fast.contracts import Task
from fst_fast.errors import UserError


def load_object(spec: str, key: str) -> Any:
    """The object `name` of `file.py:name`. key: the configuration key that holds the spec, for the messages. Raises UserError."""
    file, _, name = spec.rpartition(":")
    if not file:
        file, name = spec, ""
    if not file.endswith(".py"):
        raise UserError(f"{key}={spec!r} is not of the form file.py:name")
    module = load_module(Path(file), f"{key}={spec}")
    if not name or not hasattr(module, name):
        own = [
            k
            for k, v in vars(module).items()
            if getattr(v, "__module__", None) == module.__name__ and not k.startswith("_")
        ]
        there = f"it defines {', '.join(own)}" if own else "it defines no class or function"
        missing = (
            f"{file} has no {name!r}" if name else f"the name after {file} is missing: write {file}:name"
        )
        raise UserError(f"{key}={spec}: {missing}; {there}")
    return getattr(module, name)


def load_module(file: Path, where: str) -> ModuleType:
    path = file.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{where}: there is no file {path}")
    name = "fst_user_" + hashlib.sha256(str(path).encode()).hexdigest()[:12]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{where}: {file} cannot be imported: {describe(error, path)}") from error
    return module


def describe(error: BaseException, path: Path | None = None) -> str:
    """`KeyError: 'x' (my_task.py:12)`: the error and the innermost line of the user's file in its traceback."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError):
        return " ".join(text.split())
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if path is None or Path(f.filename) == path]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return " ".join(text.split())[:500] + place


def make_task(cls: Any, args: Mapping[str, Any], where: str) -> Task:
    """Instantiate the class with task_args and check the result. Raises UserError."""
    if not inspect.isclass(cls):
        raise UserError(
            f"{where} is {_kind(cls)}; it must be a class with the methods problems(split) and verify(problem, response)"
        )
    plays = callable(getattr(cls, "step", None))
    needed = ("start(problem)", "step(state, response)") if plays else ("verify(problem, response)",)
    for call in ("problems(split)", *needed):
        method = call.partition("(")[0]
        if not callable(getattr(cls, method, None)):
            raise UserError(f"{where}: the class has no method {call}")
    signature = inspect.signature(cls)
    try:
        signature.bind(**args)
    except TypeError as error:
        allowed = ", ".join(str(p) for p in signature.parameters.values()) or "none"
        raise UserError(
            f"{where}: task_args={dict(args)} do not fit ({error}); allowed are: {allowed}"
        ) from error
    task: Task = call_user(
        lambda: cls(**args), f"{where}: the task cannot be made with task_args={dict(args)}"
    )
    return task


def call_user(call: Callable[[], Any], what_failed: str) -> Any:
    """Run the user's code; any exception becomes a UserError of one sentence."""
    try:
        return call()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what_failed}: {describe(error)}") from error


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if not inspect.isroutine(value) else "a function"
