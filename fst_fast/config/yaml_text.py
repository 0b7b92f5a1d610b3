"""YAML 1.2 text to plain values and back, by ruamel.yaml.

A plain scalar means what the core schema says (YAML 1.2.2, section 10.3.2): `1e-3` is a number, `no`, `1:30` and `2026-01-01` are text.
ruamel's own tables for version 1.2 also read dates, `1_000` and `0b11`; a configuration must not change with the library that reads it.
Merge keys (`<<: *anchor`) work as in YAML 1.1. An alias is a copy: nothing that is read shares an object with anything else.

Refused, with the line: a repeated key, a key that is not text, tags beyond the core schema, an alias inside its own anchor, and a
document that is larger or deeper than a configuration can be. What is written is quoted such that readers of YAML 1.1 agree.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterable
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, ComposerError, MaxDepthExceededError
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.emitter import Emitter
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver, implicit_resolvers
from ruamel.yaml.scanner import Scanner, ScannerError

MAX_BYTES = 1 << 18
"""Size of a configuration file."""
MAX_DEPTH = 50
"""Levels of lists and keys inside each other."""
MAX_NODES = 10_000
"""Keys and values of one document, after its aliases are resolved."""
MAX_DIGITS = 100
"""Length of a whole number."""

ALLOWED = "allowed are text, numbers, true, false, null, lists and keys"
TOO_DEEP = f"lists and keys are nested deeper than {MAX_DEPTH} levels"
UNRELIABLE = "\x85\u2028\u2029"
"""Line breaks of YAML 1.1 that are ordinary characters in YAML 1.2; ruamel.yaml folds them into spaces."""

_PREFIX = "tag:yaml.org,2002:"
_CORE = {
    "null": (r"null|Null|NULL|~|", "nN~"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
"""Tag -> what a plain scalar looks like, and the characters with which it begins. The first that fits counts."""
_PATTERNS = {tag: re.compile(rf"(?:{pattern})\Z") for tag, (pattern, _) in _CORE.items()}


class YamlProblem(Exception):
    """Why a text is refused, as the end of a sentence: `line 3: the key lr was already given on line 2`."""


def read_yaml(text: str) -> Any:
    """The value of a YAML document; None for one without content. Raises YamlProblem."""
    return _read(text)[0]


def read_argument(text: str) -> Any:
    """The value of one command-line argument. Raises YamlProblem.

    As YAML, save that plain text is taken as it is written: nothing at all, `a  # b`, `---`, two lines, or what begins with # (Markdown)
    or a byte order mark.
    """
    value, root = _read(text)
    if root is None or text.lstrip().startswith(("#", "\ufeff")):
        return text
    if not isinstance(root, ScalarNode) or root.style or text.lstrip().startswith(("!", "&")):
        return value
    return text if isinstance(value, str) or root.value != text.strip(" \t\n") else value


def write_yaml(tree: dict[str, Any]) -> str:
    """A tree of plain values as a YAML document that `read_yaml` reads back to an equal one."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Representer, yaml.Emitter = _EitherVersion, _Representer, _Emitter
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    stream = io.StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def _read(text: str) -> tuple[Any, Node | None]:
    if found := re.search(f"[{UNRELIABLE}]", text):
        code, line = ord(found.group()), text.count("\n", 0, found.start()) + 1
        how = f'write it as "\\u{code:04x}", in double quotes'
        raise YamlProblem(f"line {line}: the character U+{code:04X} is refused; {how}")
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Scanner, yaml.Composer = _CoreSchema, _Scanner, _Composer
    yaml.Constructor = _Constructor
    yaml.max_depth = MAX_DEPTH
    try:
        root = yaml.compose(text)
        return (None if root is None else yaml.constructor.construct_document(root)), root
    except (YAMLError, ValueError) as error:
        raise YamlProblem(_problem(error, text)) from None


def _by_first(rows: Iterable[tuple[str, Any, Iterable[str]]]) -> dict[str, list[tuple[str, Any]]]:
    """Rows of tag, pattern and first characters as ruamel.yaml looks them up: by the first character."""
    table: dict[str, list[tuple[str, Any]]] = {}
    for tag, pattern, first in rows:
        for character in first:
            table.setdefault(character, []).append((tag, pattern))
    return table


_CORE_ROWS = [
    (_PREFIX + tag, _PATTERNS[tag], [*first, ""] if tag == "null" else first)
    for tag, (_, first) in _CORE.items()
]


class _CoreSchema(VersionedResolver):
    """What a plain scalar is, whatever version a %YAML directive names."""

    versioned_resolver = _by_first([*_CORE_ROWS, (_PREFIX + "merge", re.compile(r"<<\Z"), "<")])
    processing_version = (1, 2)


class _EitherVersion(VersionedResolver):
    """What a plain scalar is to a reader of YAML 1.1 or 1.2: such text is quoted."""

    versioned_resolver = _by_first([*(row[1:] for row in implicit_resolvers), *_CORE_ROWS])


class _Scanner(Scanner):
    """Bounds the depth of flow collections: the look-ahead passes any number of brackets, in quadratic time."""

    def fetch_flow_collection_start(self, *args: Any, **kwargs: Any) -> None:
        if self.flow_level > MAX_DEPTH:
            raise ScannerError(None, None, TOO_DEEP, self.reader.get_mark())
        super().fetch_flow_collection_start(*args, **kwargs)

    def scan_flow_scalar_non_spaces(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().scan_flow_scalar_non_spaces(*args, **kwargs)
        except (ValueError, OverflowError):  # of chr()
            said = "an escape names no character; the last one is \\U0010FFFF"
            raise ScannerError(None, None, said, self.reader.get_mark()) from None


class _Composer(Composer):
    """Resolves an alias to a copy of its anchor's node, and counts nodes."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader=loader)
        self.warn_double_anchors = False  # the later one counts from there on
        self.nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._mark = self.parser.peek_event().start_mark
        self._count()
        return super().compose_node(parent, index)

    def return_alias(self, a: Node) -> Node:
        self.nodes -= 1
        return self._copy(a, self.depth + 1)

    def _copy(self, node: Node, depth: int) -> Node:
        self._count()
        if node.end_mark is None:
            raise ComposerError(None, None, f"the alias *{node.anchor} is inside its own anchor", self._mark)
        if depth > MAX_DEPTH:
            raise ComposerError(None, None, TOO_DEEP, self._mark)
        made = copy.copy(node)
        if isinstance(node, SequenceNode):
            made.value = [self._copy(item, depth + 1) for item in node.value]
        elif isinstance(node, MappingNode):
            made.value = [
                (self._copy(key, depth + 1), self._copy(item, depth + 1)) for key, item in node.value
            ]
        return made

    def _count(self) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ComposerError(None, None, f"more than {MAX_NODES:,} keys and values", self._mark)


class _Constructor(SafeConstructor):
    """Plain values only."""

    def flatten_mapping(self, node: Any) -> Any:
        if getattr(node, "merge", None) is None:  # else its keys were checked, and merged ones added
            self._check_keys(node)
        super().flatten_mapping(node)

    def _check_keys(self, node: MappingNode) -> None:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode) or key.tag not in (_PREFIX + "str", _PREFIX + "merge"):
                what = f"the key {key.value[:80]}" if isinstance(key, ScalarNode) else f"a {key.id} as a key"
                raise ConstructorError(None, None, f"{what} is not text", key.start_mark)
            if key.value in seen:
                said = f"the key {key.value} was already given on line {seen[key.value]}"
                raise ConstructorError(None, None, said, key.start_mark)
            seen[key.value] = line

    def construct_yaml_str(self, node: Any) -> str:
        units = self.construct_scalar(node).encode("utf-16-le", "surrogatepass")
        return str(units.decode("utf-16-le", "surrogatepass"))  # joins the pairs of JSON's escapes

    def construct_yaml_null(self, node: Any) -> None:
        self._scalar(node, "null", "null")

    def construct_yaml_bool(self, node: Any) -> bool:
        return self._scalar(node, "bool", "true or false").lower() == "true"

    def construct_yaml_int(self, node: Any) -> int:
        text = self._scalar(node, "int", "a whole number")
        if len(text) > MAX_DIGITS:
            said = f"a whole number of {len(text):,} digits; at most {MAX_DIGITS} are taken"
            raise ConstructorError(None, None, said, node.start_mark)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_yaml_float(self, node: Any) -> float:
        text = self._scalar(node, "float", "a number").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_undefined(self, node: Any) -> None:
        tag = str(node.tag).replace(_PREFIX, "!!")
        said = f"could not determine a constructor for the tag '{tag}'; {ALLOWED}"
        raise ConstructorError(None, None, said, node.start_mark)

    def _scalar(self, node: Any, tag: str, name: str) -> str:
        """The text of a scalar. A tag that is written out can claim it to be what it is not."""
        text: str = self.construct_scalar(node)
        if not _PATTERNS[tag].match(text):
            raise ConstructorError(None, None, f"{text[:80]!r} is not {name}", node.start_mark)
        return text


_Constructor.yaml_constructors = {
    **{
        f"{_PREFIX}{name}": getattr(_Constructor, f"construct_yaml_{name}")
        for name in (*_CORE, "str", "seq", "map")
    },
    _PREFIX + "merge": _Constructor.construct_yaml_str,  # `<<` as a value
    None: _Constructor.construct_undefined,
}


class _Representer(SafeRepresenter):
    def represent_str(self, data: str) -> ScalarNode:
        style = '"' if re.search(f"[{UNRELIABLE}]", data) else None
        return self.represent_scalar(_PREFIX + "str", data, style=style)

    def represent_float(self, data: float) -> ScalarNode:
        text = repr(data)
        return self.represent_scalar(_PREFIX + "float", text if "." in text else text.replace("e", ".0e"))

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Representer.add_representer(str, _Representer.represent_str)
_Representer.add_representer(float, _Representer.represent_float)


class _Emitter(Emitter):
    def choose_scalar_style(self) -> Any:
        """Single quotes where they can hold the text; ruamel.yaml prefers double ones around an apostrophe or a line break."""
        style = super().choose_scalar_style()
        if style == '"' and not self.event.style and self.analysis.allow_single_quoted:
            return style if self.simple_key_context and self.analysis.multiline else "'"
        return style


def _problem(error: YAMLError | ValueError, text: str) -> str:
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}: the character U+{error.character:04X} is refused; write it as an escape, in double quotes"
    if not isinstance(error, MarkedYAMLError):
        return str(error).splitlines()[0]
    problem = TOO_DEEP if isinstance(error, MaxDepthExceededError) else str(error.problem)
    if problem.startswith("but "):  # it goes on from the context
        problem = f"{error.context}, {problem}"
    if r"'\t'" in problem:
        problem += "; indent with spaces"
    where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return where + problem[:200]
