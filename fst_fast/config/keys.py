"""The keys of the tree: which there are, and in words what each allows. Errors and the generated reference speak from here."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from fst_fast.config.schema import Config
from fst_fast.config.section import Section

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def fields(model: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key with its field, a section before its own keys. Keys of a list's sections are written `stages[].task`."""
    for name, field in model.model_fields.items():
        yield prefix + name, field
        if section := section_of(field.annotation):
            yield from fields(section, f"{prefix}{name}.")
        elif section := section_of(element_of(field.annotation)):
            yield from fields(section, f"{prefix}{name}[].")


def keys() -> Iterator[str]:
    """Every dotted key that takes a value of its own: no sections, save optional ones."""
    for key, field in fields():
        if section_of(field.annotation) is not field.annotation:
            yield key


def field_at(key: str) -> FieldInfo | None:
    """The field at a dotted path; None where there is none, also inside free dictionaries."""
    model: type[Section] | None = Config
    field: FieldInfo | None = None
    for part in key.split("."):
        name, bracket, _ = part.partition("[")
        field = model.model_fields.get(name) if model else None
        if field is None:
            return None
        inner = element_of(field.annotation) if bracket else field.annotation
        model = section_of(inner)
        if bracket and model is None:
            return None
    return field


class Texts(NamedTuple):
    """A key that holds texts by name, such as fast.components: what its names and its values may be, in words."""

    names: str
    values: str


def texts_at(key: str) -> Texts | None:
    """The texts by name at a dotted path; None where another kind of value is, or none."""
    field = field_at(key)
    kinds = get_args(field.annotation) if field and get_origin(field.annotation) is dict else ()
    if not kinds or kinds[1] is not str:
        return None
    named = get_args(kinds[0])[1:]  # Annotated[str, Field(description=...)]
    return Texts(named[0].description if named else "text", _NAMES[str])


def split(key: str) -> list[str]:
    """The parts of a dotted key. A name of a text (`texts_at`) is one part, with its dots."""
    parts = key.split(".")
    for i in range(1, len(parts)):
        if texts_at(".".join(parts[:i])):
            return [*parts[:i], ".".join(parts[i:])]
    return parts


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field's type is, or is with null beside it."""
    for option in options(annotation):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def element_of(annotation: Any) -> Any:
    """The type of a list's elements; None for a type that is not a list of any length."""
    kinds = get_args(annotation)
    if get_origin(annotation) is list or (get_origin(annotation) is tuple and kinds[1:] == (...,)):
        return kinds[0]
    return None


def options(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, the values of a Literal, or the type itself."""
    union = get_origin(annotation) in (Union, types.UnionType, Literal)
    return get_args(annotation) if union else (annotation,)


def allowed(field: FieldInfo) -> str:
    """What a field takes, in words: `a whole number >= 1`."""
    return _words(field.annotation, field.metadata)


def _words(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, kinds = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(json.dumps(option).strip('"') for option in kinds)
    if (element := element_of(annotation)) is not None:
        some = any(isinstance(limit, MinLen) for limit in metadata)
        if get_origin(element) is Literal:
            return f"{'one or more' if some else 'any'} of {', '.join(get_args(element))}"
        return f"a list of {_plural(element)}{', at least one' if some else ''}"
    if origin is tuple:
        return f"a list of {len(kinds)} {_plural(kinds[0])}"
    if origin is dict:
        return "texts by name" if kinds[1] is str else "keys with values"
    words = []
    for option in sorted(options(annotation), key=lambda option: section_of(option) is not None):
        if section := section_of(option):
            words.append(f"a section with the keys {', '.join(section.model_fields)}")
        elif get_origin(option) is not None:
            words.append(_words(option, metadata))
        else:
            words.append(f"{_NAMES[option]} {_bounds(metadata) if option in (int, float) else ''}".rstrip())
    return " or ".join(words)


def _plural(element: Any) -> str:
    if section := section_of(element):
        return f"sections with the keys {', '.join(section.model_fields)}"
    if get_origin(element) is Annotated:
        kind, field = get_args(element)
        return _PLURALS[kind] + (
            " that are not empty" if any(isinstance(m, MinLen) for m in field.metadata) else ""
        )
    return _PLURALS[element]


def _bounds(metadata: Sequence[Any]) -> str:
    bounds = []
    for limit in metadata:
        for kind, sign, name in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
            if isinstance(limit, kind):
                bounds.append(f"{sign} {getattr(limit, name):g}")
    return " and ".join(bounds)


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
