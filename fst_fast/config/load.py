"""From a YAML file and dotted command-line overrides to one checked `Config`, or to one sentence that says what is wrong.

Overrides to text keys are taken literally, others as YAML values (`yaml_text`). A key that holds a list takes a single value, too. The tree
is checked strictly (`"3"` is not 3) and every refusal names the key's path, the value and what is allowed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from fst_fast.config.keys import (
    allowed,
    element_of,
    field_at,
    options,
    section_of,
    split,
    suggestion,
    texts_at,
)
from fst_fast.config.schema import Config
from fst_fast.config.section import Section
from fst_fast.config.yaml_text import (
    ALLOWED,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NODES,
    TOO_DEEP,
    YamlProblem,
    read_argument,
    read_yaml,
    write_yaml,
)
from fst_fast.errors import UserError, one_line

COMMAND_OPTIONS = ("run-dir", "resume", "allow-config-change", "allow-data-change", "dry-run", "debug")
"""Words that `fst train` takes beside the keys: a misspelt one looks like an unknown key."""
MAX_VALUES = MAX_NODES // 3
"""Values of one tree, such that what `dump` writes, keys and defaults included, is not too large for `load`."""
MISTAKES_SHOWN = 5
LONG = "a task can read what is long from a file of its own"
TOO_LARGE = f"the configuration is larger than {MAX_BYTES >> 10} KiB; {LONG}"


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (None: all defaults), apply the overrides in order, check everything.

    overrides: `--slow.lr=1e-3`, or `--slow.lr` followed by `1e-3`. Each changes the key that it names and no other, with two exceptions: a
    `--task` that is not the file's leaves the file's task_args behind, a `--model.path` its model.revision. Raises UserError, one sentence per mistake.
    """
    tree = {} if path is None else read_file(path)
    given = list(pairs(overrides))
    task = [text for key, text in given if key == "task"][-1:]
    if task and task[0] != tree.get("task", Config.model_fields["task"].default):
        tree.pop("task_args", None)
    model = tree.get("model")
    if isinstance(model, dict) and any(
        key == "model.path" and text != model.get("path") for key, text in given
    ):
        model.pop("revision", None)
    for key, text in given:
        assign(tree, key, _value(key, text))
    return check(tree, "" if path is None else f"{path}: ", {key for key, _ in given})


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a file with nothing but comments is an empty mapping. Raises UserError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise _refusal(f"config file {path} does not exist; give the path of a YAML file") from None
    except IsADirectoryError:
        raise _refusal(f"config file {path} is a folder; give the path of a YAML file") from None
    except OSError as error:
        raise _refusal(f"config file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        said = f"config file {path} cannot be read: line {line} is not UTF-8; save the file as UTF-8"
        raise _refusal(said) from None
    if len(data) > MAX_BYTES:
        raise _refusal(f"config file {path}: {TOO_LARGE}")
    if not text.strip():
        raise _refusal(f"config file {path} is empty; it must hold keys such as `method: fst`, or a comment")
    try:
        tree = read_yaml(text)
    except YamlProblem as problem:
        raise _refusal(f"config file {path} is not valid YAML: {problem}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        kind = "a list" if isinstance(tree, list) else f"the single value {_cut(repr(tree))}"
        raise _refusal(f"config file {path} holds {kind}; it must hold keys such as `method: fst`")
    return tree


def pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(`slow.lr`, `1e-3`) from `--slow.lr=1e-3` or from `--slow.lr`, `1e-3`. Raises UserError."""
    rest = list(overrides)[::-1]
    while rest:
        word = rest.pop()
        key, equals, text = word[2:].partition("=")
        if not word.startswith("--") or not all(key.split(".")):
            said = f"argument {_cut(repr(word))} is not understood; an override is written --dotted.key=value"
            raise _refusal(said)
        if not equals:
            if not rest or rest[-1].startswith("--"):
                raise _refusal(f"--{key} has no value; write --{key}=value")
            text = rest.pop()
        yield key, text


def check(tree: Mapping[str, Any], source: str = "", overridden: Collection[str] = ()) -> Config:
    """The tree as a Config. `source` opens the sentence about a key that was not `overridden`. Raises UserError."""
    where = _Where(source, overridden)
    _check_values(tree, where)
    text = json.dumps(_with_steps(_with_lists(tree, Config, where.single)))
    if len(text) > MAX_BYTES:
        raise _refusal(f"{source}{TOO_LARGE}")
    try:
        return Config.model_validate_json(text, strict=True)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        sentences = list(dict.fromkeys(_sentence(item, where) for item in mistakes[:MISTAKES_SHOWN]))
        if len(mistakes) > MISTAKES_SHOWN:
            sentences.append(f"and {len(mistakes) - MISTAKES_SHOWN:,} more")
        raise _refusal("; ".join(sentences)) from None


def dump(config: Config) -> str:
    """The resolved tree as YAML; `load` reads it back to the same Config. Raises UserError for one that is too large for that."""
    text = write_yaml(config.model_dump(mode="json"))
    if len(text.encode()) > MAX_BYTES:
        raise _refusal(TOO_LARGE)
    return text


def config_hash(config: Config) -> str:
    """12 hex digits that change with any value of the tree and not with the order in which it was written."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class _Where:
    """How a sentence names a key: by its file, or as the command line gave it. single: keys of lists of values that got a single one."""

    def __init__(self, source: str, overridden: Collection[str]) -> None:
        self.source = source
        self.overridden = overridden
        self.single: set[str] = set()

    def given(self, key: str) -> bool:
        """Whether the command line gave the key, one above it or one below it."""
        return any(
            key == k or key.startswith((f"{k}.", f"{k}[")) or k.startswith(f"{key}.") for k in self.overridden
        )

    def name(self, key: str) -> str:
        return f"--{_cut(key)}" if self.given(key) else self.source + _cut(key)


def _value(key: str, text: str) -> Any:
    """What an override's text means, which depends on the key's type."""
    if texts_at(".".join(split(key)[:-1])):
        return text
    field = field_at(key)
    kinds = options(field.annotation) if field else ()
    if type(None) in kinds and text in ("", "null", "~"):
        return None
    if str in kinds or any(isinstance(kind, str) for kind in kinds):
        return text
    if field and not text.strip():
        raise _refusal(f"--{key} has no value; allowed: {allowed(field)}")
    element = element_of(field.annotation) if field else None
    if element is not None and section_of(element) is None and not _is_list(text):
        return text  # one text, as literal as for a key that holds a text
    try:
        return read_argument(text)
    except YamlProblem as problem:
        raise _refusal(f"--{key}={_cut(text)}: the value is not valid YAML: {problem}") from None


def _is_list(text: str) -> bool:
    return text.lstrip().startswith(("[", "- ")) or text in ("null", "~")


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key, making the sections above it. Raises UserError where one of these is a plain value."""
    *parents, last = split(key)
    node = tree
    for i, part in enumerate(parents):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            above = ".".join(parents[: i + 1])
            raise _refusal(f"--{_cut(key)}: {_cut(above)} is {_shown(node)}, which has no keys of its own")
    node[last] = value


def _check_values(tree: Mapping[str, Any], where: _Where) -> None:
    """Refuse what JSON, YAML or a number of 64 bits cannot hold."""
    count = 0

    def visit(node: Any, key: str, depth: int) -> None:
        nonlocal count
        count += 1
        if depth > MAX_DEPTH:
            raise _refusal(f"{where.name(key)}: {TOO_DEEP}")
        if count > MAX_VALUES:
            raise _refusal(f"{where.source}the configuration has more than {MAX_VALUES:,} values; {LONG}")
        if isinstance(node, Mapping):
            for name, value in node.items():
                if not isinstance(name, str):
                    raise _refusal(f"{where.name(key)} has the key {name!r}, which is not text")
                inner = f"{key}.{name}" if key else name
                refuse_halves(name, inner)
                visit(value, inner, depth + 1)
        elif isinstance(node, list | tuple):
            for i, value in enumerate(node):
                visit(value, f"{key}[{i}]", depth + 1)
        elif isinstance(node, str):
            refuse_halves(node, key)
        elif isinstance(node, float):
            if not math.isfinite(node):
                raise _refusal(f"{where.name(key)}={node} is refused; allowed: a finite number")
        elif node is not None and not isinstance(node, int):
            raise _refusal(f"{where.name(key)} is of type {type(node).__name__}; {ALLOWED}")
        elif isinstance(node, int) and abs(node) >= 2**63:
            field = field_at(key)
            if field and int in options(field.annotation):
                said = f"{where.name(key)}={_shown(node)} is refused; allowed: a whole number of 64 bits"
                raise _refusal(said)

    def refuse_halves(text: str, key: str) -> None:
        if found := re.search("[\ud800-\udfff]", text):
            half = f"U+{ord(found.group()):04X}, which is half a character"
            raise _refusal(f"{where.name(key)} holds {half}; allowed: text in UTF-8")

    visit(tree, "", 1)


def _with_lists(
    tree: Mapping[str, Any], model: type[Section], single: set[str], prefix: str = ""
) -> dict[str, Any]:
    """The tree, with lists of one where a key that holds a list has a single value. Their keys are added to `single`."""
    whole = dict(tree)
    for name, value in tree.items():
        field = model.model_fields.get(name)
        if field is None:
            continue
        section, element = section_of(field.annotation), element_of(field.annotation)
        if section and isinstance(value, Mapping):
            whole[name] = _with_lists(value, section, single, f"{prefix}{name}.")
        elif element is None or value is None or isinstance(value, list | tuple):
            continue
        elif section_of(element) is None:
            whole[name] = [value]
            single.add(prefix + name)
        elif isinstance(value, Mapping):
            whole[name] = [value]
    return whole


def _with_steps(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with slow.steps, where stages say it and nobody else does. What is wrong with the stages is said later."""
    stages, slow = tree.get("stages"), tree.get("slow", {})
    if not stages or not isinstance(slow, dict) or "steps" in slow:
        return tree
    try:
        return {**tree, "slow": {**slow, "steps": sum(stage["steps"] for stage in stages)}}
    except (LookupError, TypeError):
        return tree


def _sentence(item: ErrorDetails, where: _Where) -> str:
    key = ""
    for part in item["loc"]:
        if isinstance(part, str):
            key += f".{part}" if key else part
        elif key not in where.single:
            key += f"[{part}]"
    if item["type"] == "value_error":
        return where.source + item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        if where.given(key):
            return f"unknown key --{_cut(key)}; {suggestion(key, also=COMMAND_OPTIONS)}"
        return f"{where.source}unknown key {_cut(key)}; {suggestion(key)}"
    if field := field_at(key):
        speaks = allowed(field)
    elif texts := texts_at(".".join(map(str, item["loc"][:-1]))):
        speaks = texts.values
    elif texts := texts_at(above := ".".join(map(str, item["loc"][:-2]))):
        # refused is a name, before "[key]"
        return f"{where.name(above)} has the key {_shown(item['loc'][-2])}; allowed: {texts.names}"
    else:  # an element of a list: the field speaks for it
        field = field_at(key.partition("[")[0])
        if field is None:  # behind the key stands a type that the value might have had
            key = key.partition("[")[0].rpartition(".")[0]
            field = field_at(key)
        assert field is not None, item
        speaks = allowed(field)
    if item["type"] == "missing":
        return f"{where.name(key)} is missing; allowed: {speaks}"
    return f"{where.name(key)}={_shown(item['input'])} is refused; allowed: {speaks}"


def _shown(value: Any) -> str:
    return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _refusal(sentence: str) -> UserError:
    return UserError(one_line(sentence))
