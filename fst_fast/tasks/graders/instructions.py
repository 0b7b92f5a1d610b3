"""The grader `instruction_following`: constraints on a response's form that a program can check, as in IFEval (arXiv 2311.07911).

Constraints are the problem's answer, or the grader's argument for all problems: a list of objects with a `kind` and its bounds.

    words, sentences, paragraphs, lines, chars, bullets, sections, placeholders     min, max or exactly: a count
    keywords        all, any, none: lists of words;  count: {word: times}
    case            is: lower, upper or title
    starts, ends    text
    quoted          the whole response is in double quotes
    json            the whole response is a JSON value
    no_commas
    language        is: an ISO 639-1 code (package langdetect, extra `tasks`)
    repeat_prompt   the response begins with the problem's last message, word for word
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.tasks.readers import import_package

COUNTED: dict[str, tuple[str, Callable[[str], int]]] = {
    "words": ("words", lambda text: len(text.split())),
    "sentences": ("sentences", lambda text: _matches(r"[^.!?]*[\w][^.!?]*(?:[.!?]+|$)", text)),
    "paragraphs": ("paragraphs", lambda text: len([p for p in re.split(r"\n\s*\n", text) if p.strip()])),
    "lines": ("lines that are not empty", lambda text: sum(bool(line.strip()) for line in text.splitlines())),
    "chars": ("characters", len),
    "bullets": ("bullet points", lambda text: _matches(r"(?m)^\s*(?:[-*+•]|\d+[.)])\s+\S", text)),
    "sections": ("headed sections", lambda text: _matches(r"(?m)^#{1,6}\s+\S", text)),
    "placeholders": ("placeholders in square brackets", lambda text: _matches(r"\[[^\[\]\n]+\]", text)),
}
"""kind -> what is counted, and how."""

_BOUNDS = ("min", "max", "exactly")
_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(COUNTED, _BOUNDS),
    "keywords": ("all", "any", "none", "count"),
    "case": ("is",),
    "starts": ("text",),
    "ends": ("text",),
    "quoted": (),
    "json": (),
    "no_commas": (),
    "language": ("is",),
    "repeat_prompt": (),
}


@dataclass(frozen=True)
class InstructionFollowing:
    """Reward: the share of the constraints that the response meets, or 1 only for all of them (`strict`)."""

    constraints: Sequence[Mapping[str, Any]] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.constraints is not None and (wrong := find_error(self.constraints)):
            raise ValueError(wrong)

    def __call__(self, problem: Problem, response: str) -> Verdict:
        constraints = problem.answer if self.constraints is None else self.constraints
        if wrong := find_error(constraints):
            return Verdict(None, f"problem {problem.id}: {wrong}")
        text = response.strip()
        wrongs = [said for constraint in constraints if (said := violation(constraint, text, problem))]
        share = 1 - len(wrongs) / len(constraints)
        reward = float(share == 1) if self.strict else share
        return Verdict(reward, " ".join(wrongs), {"constraints_met": share})


def find_error(constraints: Any) -> str | None:
    """What is wrong with a list of constraints, or None."""
    if isinstance(constraints, str | Mapping) or not isinstance(constraints, Sequence) or not constraints:
        return "constraints must be a list that is not empty"
    for i, constraint in enumerate(constraints):
        kind = constraint.get("kind") if isinstance(constraint, Mapping) else None
        if kind not in _KEYS:
            return f"constraints[{i}].kind={kind!r} is not known; allowed: {', '.join(_KEYS)}"
        extra = [key for key in constraint if key not in ("kind", *_KEYS[kind])]
        if extra or (_KEYS[kind] and not any(key in constraint for key in _KEYS[kind])):
            return f"constraints[{i}] ({kind}) has the keys {list(constraint)}; allowed besides kind: {', '.join(_KEYS[kind]) or 'none'}"
        for key in _BOUNDS:
            if key in constraint and (
                isinstance(constraint[key], bool)
                or not isinstance(constraint[key], int)
                or constraint[key] < 0
            ):
                return f"constraints[{i}].{key}={constraint[key]!r} must be a whole number >= 0"
        if kind == "case" and constraint["is"] not in ("lower", "upper", "title"):
            return f"constraints[{i}].is={constraint['is']!r}; allowed: lower, upper, title"
    return None


def violation(constraint: Mapping[str, Any], text: str, problem: Problem) -> str:
    """What the response did wrong, "" if it meets the constraint."""
    kind = constraint["kind"]
    if kind in COUNTED:
        what, count = COUNTED[kind]
        return _count(what, count(text), constraint)
    match kind:
        case "keywords":
            return _keywords(constraint, text)
        case "case":
            form = constraint["is"]
            good = {
                "lower": text == text.lower(),
                "upper": text == text.upper(),
                "title": text == text.title(),
            }[form]
            return "" if good else f"The whole response must be in {form} case."
        case "starts":
            good = text.startswith(constraint["text"])
            return "" if good else f"The response must begin with {constraint['text']!r}."
        case "ends":
            good = text.endswith(constraint["text"])
            return "" if good else f"The response must end with {constraint['text']!r}."
        case "quoted":
            good = len(text) > 1 and text[0] == text[-1] == '"'
            return "" if good else "The whole response must be in double quotes."
        case "json":
            return _json(text)
        case "no_commas":
            return f"The response must have no comma, it has {text.count(',')}." if "," in text else ""
        case "language":
            return _language(constraint["is"], text)
        case _:
            good = text.startswith(str(problem.messages[-1]["content"]).strip())
            return "" if good else "The response must first repeat the request, word for word."


def _matches(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def _count(what: str, n: int, bounds: Mapping[str, Any]) -> str:
    if "exactly" in bounds and n != bounds["exactly"]:
        return f"The response must have exactly {bounds['exactly']} {what}, it has {n}."
    if n < bounds.get("min", 0):
        return f"The response must have at least {bounds['min']} {what}, it has {n}."
    if "max" in bounds and n > bounds["max"]:
        return f"The response must have at most {bounds['max']} {what}, it has {n}."
    return ""


def _keywords(constraint: Mapping[str, Any], text: str) -> str:
    def times(word: str) -> int:
        return _matches(rf"(?i)(?<!\w){re.escape(word)}(?!\w)", text)

    said = [f"The word {word!r} is missing." for word in constraint.get("all", ()) if not times(word)]
    said += [f"The word {word!r} is not allowed." for word in constraint.get("none", ()) if times(word)]
    said += [
        f"The word {word!r} must occur {n} times, it occurs {times(word)} times."
        for word, n in constraint.get("count", {}).items()
        if times(word) != n
    ]
    some = constraint.get("any", ())
    if some and not any(map(times, some)):
        said.append(f"One of the words {', '.join(some)} must occur.")
    return " ".join(said)


def _json(text: str) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"The whole response must be a JSON value: {error}."
    return ""


def _language(code: str, text: str) -> str:
    langdetect = import_package("langdetect", "the constraint language", "tasks")
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    try:
        found = str(langdetect.detect(text)).partition("-")[0]
    except langdetect.LangDetectException:
        return f"The response must be in the language {code}; none was recognised."
    return "" if found == code else f"The response must be in the language {code}, it is in {found}."
