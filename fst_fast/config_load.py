"""From a YAML file and dotted command-line overrides to one checked `Config`, or to one sentence that says what is wrong.

YAML is read as YAML 1.2's core schema: `1e-3` is a number, `no` and `on` are text, `1:30` is not 90 minutes; a key written twice is
refused. Overrides to text keys are taken literally, all others as YAML values. The tree is checked strictly (`"3"` is not 3) and every
refusal names the key's path, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fst_fast.config import Config, Section
from fst_fast.errors import UserError

COMMAND_OPTIONS = ("run-dir", "resume", "allow-config-change", "allow-data-change", "dry-run", "debug")
"""Words that `fst train` takes beside the keys: a misspelt one looks like an unknown key."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"line {line}: the key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"line {line}: the key {key} was already given on line {seen[key]}",
                    key_node.start_mark,
                )
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either version of YAML would read as something other than text."""


_Loader.yaml_implicit_resolvers = {}  # SafeLoader's own are those of YAML 1.1
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # decimal only: YAML 1.1 would read 010 as 8


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(str(loader.construct_scalar(node)).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (None: all defaults), apply the overrides in order, check everything.

    overrides: `--slow.lr=1e-3`, or `--slow.lr` followed by `1e-3`. A `--task` that is not the file's leaves the file's task_args behind.
    Raises UserError, one sentence per mistake.
    """
    tree = {} if path is None else read_yaml(path)
    given = list(pairs(overrides))
    if any(key == "task" and _value(key, text) != tree.get("task") for key, text in given):
        tree.pop("task_args", None)  # they are the other task's
    for key, text in given:
        assign(tree, key, _value(key, text))
    return check(tree, "" if path is None else f"{path}: ", {key for key, _ in given})


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist; give the path of a YAML file") from None
    except IsADirectoryError:
        raise UserError(f"config file {path} is a folder; give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not valid YAML: {_yaml_problem(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} holds {_kind(tree)}; it must hold keys such as `method: fst`")
    return tree


def pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(`slow.lr`, `1e-3`) from `--slow.lr=1e-3` or from `--slow.lr`, `1e-3`. Raises UserError."""
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"argument {word!r} is not understood; an override is written --dotted.key=value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} has no value; write --{key}=value")
            text = rest.pop(0)
        yield key, text


def check(tree: Mapping[str, Any], source: str = "", overridden: Collection[str] = ()) -> Config:
    """The tree as a Config. `source` opens the sentence about a key that was not `overridden`. Raises UserError."""
    for key, value in _leaves(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{_where(key, source, overridden)}={value} is refused; allowed: a finite number")
    try:
        text = json.dumps(_with_steps(tree))
    except TypeError as error:
        raise UserError(
            f"{source}{error}; allowed are text, numbers, true, false, null, lists and keys"
        ) from None
    try:
        return Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        sentences = [_sentence(item, source, overridden) for item in error.errors(include_url=False)]
        raise UserError("; ".join(sentences)) from None


def _with_steps(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tree with slow.steps, where stages say it and nobody else does. What is wrong with the stages is said later."""
    stages, slow = tree.get("stages"), tree.get("slow", {})
    if not stages or not isinstance(slow, dict) or "steps" in slow:
        return tree
    try:
        return {**tree, "slow": {**slow, "steps": sum(stage["steps"] for stage in stages)}}
    except (LookupError, TypeError):
        return tree


def dump(config: Config) -> str:
    """The resolved tree as YAML; `load` reads it back to the same Config."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def config_hash(config: Config) -> str:
    """12 hex digits that change with any value of the tree and not with the order in which it was written."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def field_at(key: str) -> FieldInfo | None:
    """The field at a dotted path, None where there is none (also inside free dictionaries)."""
    model: type[Section] = Config
    parts = key.split(".")
    for i, part in enumerate(parts):
        field = model.model_fields.get(part)
        if field is None or i == len(parts) - 1:
            return field
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
            return None
        model = field.annotation
    return None


def _value(key: str, text: str) -> Any:
    field = field_at(key)
    options = _options(field.annotation) if field else ()
    if str in options or (field and get_origin(field.annotation) is Literal and isinstance(options[0], str)):
        return None if type(None) in options and text in ("", "null", "~") else text
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--{key}={text}: the value is not valid YAML: {_yaml_problem(error)}") from None


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key, making the sections above it. Raises UserError where one of these is a plain value."""
    *parents, last = key.split(".")
    node = tree
    for i, part in enumerate(parents):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(
                f"--{key}: {'.'.join(parents[: i + 1])} is {node!r}, which has no keys of its own"
            )
    node[last] = value


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _leaves(value, f"{path}[{i}]")
    else:
        yield path, node


def keys(model: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def suggestion(key: str, also: Sequence[str] = ()) -> str:
    """The existing keys nearest to an unknown one, as the end of a sentence."""
    known = [*also, *keys()]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        last = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == last]
    if not near:
        near = [name for name in known if name.startswith(f"{key.split('.')[0]}.")]
    if len(near) == 1:
        return f"did you mean {near[0]}?"
    return f"known: {', '.join(near or [*also, *Config.model_fields])}"


def _where(key: str, source: str, overridden: Collection[str]) -> str:
    return f"--{key}" if key in overridden else f"{source}{key}"


def _sentence(item: ErrorDetails, source: str, overridden: Collection[str]) -> str:
    parts = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        key = ".".join(parts)
        if key in overridden:
            return f"unknown key --{key}; {suggestion(key, also=COMMAND_OPTIONS)}"
        return f"{source}unknown key {key}; {suggestion(key)}"
    if item["type"] == "value_error":
        return source + item["msg"].removeprefix("Value error, ")
    if item["type"] == "missing":  # an item of a list: the input is the list
        parts.pop()
    key = where = ".".join(parts)
    while (field := field_at(key)) is None:  # inside a list: the field above speaks for it
        key = key.rpartition(".")[0]
    value = json.dumps(item["input"], ensure_ascii=False)
    return f"{_where(where, source, overridden)}={value} is refused; allowed: {_allowed(field)}"


def _options(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    return get_args(annotation) if origin in (Union, types.UnionType, Literal) else (annotation,)


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _allowed(field: FieldInfo) -> str:
    annotation = field.annotation
    if get_origin(annotation) is Literal:
        return " or ".join(json.dumps(option).strip('"') for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        kind, *others = get_args(annotation)
        if others != [...]:
            return f"a list of {len(get_args(annotation))} numbers"
        if isinstance(kind, type) and issubclass(kind, Section):
            return f"a list of sections with the keys {', '.join(kind.model_fields)}"
        return "a list of texts"
    if get_origin(annotation) is dict:
        return "keys with values"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    words = " or ".join(_NAMES[option] for option in _options(annotation))
    bounds = []
    for limit in field.metadata:
        for kind, sign, name in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
            if isinstance(limit, kind):
                bounds.append(f"{sign} {getattr(limit, name):g}")
    return f"{words} {' and '.join(bounds)}".rstrip()


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r}"


def _yaml_problem(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        problem = error.problem or "not readable"
        if problem.startswith("line ") or error.problem_mark is None:
            return problem
        return f"line {error.problem_mark.line + 1}: {problem}"
    return str(error).splitlines()[0]
