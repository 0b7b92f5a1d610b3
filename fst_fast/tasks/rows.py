"""A task from rows: JSONL, CSV or Parquet files, or a Hugging Face data set, and a grader. The shortest way to train on one's own data.

A row has the keys of columns.py: "messages": [{"role", "content"}, ...] or "prompt": text, "answer": anything, and optionally "id", "split",
"meta", "gold": a response that must get reward 1. Rows of another shape are mapped with `task_args.columns`. The grader is
`task_args.verify`: a built-in one (graders/__init__.py), or `grader.py:function`.

The validation split is, in this order: what `task_args.validation` names (a second file, a split of the data set); the rows whose `split`
says so; the rows whose messages and answer hash below `validation_fraction`. The hash knows nothing of other rows: a data set that grows
moves no problem from one side to the other, and equal rows are on the same side.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.columns import KEYS, make_columns, make_filter
from fst_fast.tasks.graders import BUILT_IN, Function, gold_of, make_grader
from fst_fast.tasks.jsonl import check_values, find_message_error
from fst_fast.tasks.readers import Rows
from fst_fast.tasks.verdicts import as_verdict


class _Read(NamedTuple):
    problem: Problem
    split: str | None  # where the row says one
    place: str


class RowTask:
    """A task from rows. Raises UserError, for a bad row with its place.

    sources: the rows of "train" and, where they are given apart, of "validation", each with the prefix of the ids of rows that have none.
    They are read when problems are first asked for; `notes` then holds what a person should know of them.

    task_args: verify: the grader. columns, filter: see columns.py. validation_fraction: share of the rows held out where nothing else says
    which. gold: the response that must get reward 1, with {answer} in the place of the row's answer; None: the grader's own, for a function
    the answer itself; an empty text switches this check off, for graders that no fixed response can satisfy. A row's own `gold` goes first.
    shuffle: seed of a random order; None: the data's. limit: problems taken at most of each source, after filter and shuffle."""

    tools: Sequence[Any] = ()  # task_args.tools, set by the registry

    def __init__(
        self,
        name: str,
        sources: Mapping[str, tuple[str, Callable[[], Rows]]],
        *,
        verify: str | Mapping[str, Any] | Sequence[Any] = "",
        columns: Mapping[str, Any] | None = None,
        filter: str | None = None,
        validation_fraction: float = 0.1,
        gold: str | None = None,
        shuffle: int | None = None,
        limit: int | None = None,
    ) -> None:
        if not verify:
            raise UserError(
                f"task={name} needs a grader: set task_args.verify to grader.py:function or one of {', '.join(BUILT_IN)}"
            )
        check_fraction(validation_fraction)
        if gold is not None and not isinstance(gold, str):
            raise UserError(
                f"task_args.gold={gold!r} must be a text in which {{answer}} stands for the answer, or an empty text"
            )
        check_count("shuffle", shuffle, 0)
        check_count("limit", limit, 1)
        self.name, self.grader, self.notes = name, make_grader(verify), list[str]()
        self._sources = sources
        self._map = None if columns is None else make_columns(columns)
        self._keep = None if filter is None else make_filter(filter)
        self._fraction, self._gold_template = float(validation_fraction), gold
        self._shuffle, self._limit = shuffle, limit
        self._splits: dict[str, list[Problem]] = {}
        self._golds: dict[str, str] = {}

    def problems(self, split: str) -> Sequence[Problem]:
        self.read()
        return self._splits.get(split, [])

    def verify(self, problem: Problem, response: str) -> Verdict:
        return as_verdict(self.grader(problem, response))

    def gold(self, problem: Problem) -> str | None:
        """A response that must get reward 1, None where there is none."""
        if problem.id in self._golds:
            return self._golds[problem.id]
        template = self._gold_template
        if template is None and not isinstance(self.grader, Function):
            return gold_of(self.grader, problem)
        template = "{answer}" if template is None else template
        if not template:
            return None
        answer = (
            problem.answer
            if isinstance(problem.answer, str)
            else json.dumps(problem.answer, ensure_ascii=False)
        )
        return template.replace("{answer}", answer)

    def read(self) -> None:
        """Read the rows, unless that is done. Raises UserError."""
        if self._splits:
            return
        places: dict[str, str] = {}
        found = {split: self._read_source(*source, places) for split, source in self._sources.items()}
        if len(found) > 1:
            splits = {split: [row.problem for row in rows] for split, rows in found.items()}
        elif found["train"][0].split is None:
            splits = divide([row.problem for row in found["train"]], self._fraction, f"task={self.name}")
        else:
            splits = {}
            for row in found["train"]:
                splits.setdefault(str(row.split), []).append(row.problem)
        self._note_overlap(splits)
        self._splits = splits

    def _read_source(self, prefix: str, rows: Callable[[], Rows], places: dict[str, str]) -> list[_Read]:
        """The problems of one source. places: where each id has been met so far."""
        found: list[_Read] = []
        count = 0
        for number, place, row in rows():
            count += 1
            try:
                if self._keep and not self._keep(row):
                    continue
                problem, split, gold = _parse(self._map(row) if self._map else row, f"{prefix}/{number}")
                if problem.id in places:
                    raise ValueError(
                        f"the id {problem.id!r:.80} is already that of {places[problem.id]}; ids must be unique"
                    )
                if split is not None and len(self._sources) > 1:
                    raise ValueError("has a split, but task_args.validation names the validation split")
                if found and (split is None) != (found[0].split is None):
                    has, other = ("no split", "has one") if split is None else ("a split", "has none")
                    raise ValueError(
                        f"has {has}, but {found[0].place} {other}; give it to all rows or to none"
                    )
            except ValueError as error:
                raise UserError(f"{place}: {error}") from error
            found.append(_Read(problem, split, place))
            places[problem.id] = place
            if gold is not None:
                self._golds[problem.id] = gold
            if self._shuffle is None and len(found) == self._limit:
                break
        if not found:
            why = f"task_args.filter keeps none of its {count} rows" if count else "there are no rows"
            raise UserError(f"task={self.name} has no problems: {why}")
        if self._shuffle is None:
            return found
        order = np.random.default_rng([self._shuffle, len(found)]).permutation(len(found))
        return [found[i] for i in order[: self._limit]]

    def _note_overlap(self, splits: Mapping[str, list[Problem]]) -> None:
        trained = {_text(p.messages): p.id for p in splits.get("train", [])}
        held_out = splits.get("validation", [])
        both = [p.id for p in held_out if _text(p.messages) in trained]
        if both:
            self.notes.append(
                f"warning: task={self.name}: {len(both)} of {len(held_out)} validation problems have the messages of a training problem, "
                f"{both[0]!r:.80} the first of them"
            )


def check_count(name: str, value: Any, least: int) -> None:
    """Raise UserError unless the argument is null or a whole number of at least `least`."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise UserError(f"task_args.{name}={value!r} must be a whole number of at least {least}, or null")


def check_fraction(value: Any) -> None:
    """Raise UserError unless task_args.validation_fraction is a number in (0, 1)."""
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise UserError(
            f"task_args.validation_fraction={value!r} must be a number between 0 and 1, both excluded"
        )


def checked_range(given: Any) -> tuple[float, float]:
    """task_args.reward_range. Raises UserError."""
    numbers = isinstance(given, list | tuple) and all(isinstance(x, int | float) for x in given)
    if not numbers or len(given) != 2 or not -math.inf < given[0] < given[1] < math.inf:
        raise UserError(f"task_args.reward_range={given!r} must be two finite numbers, the lower one first")
    return float(given[0]), float(given[1])


def divide(problems: Sequence[Problem], fraction: float, name: str) -> dict[str, list[Problem]]:
    """Training and validation problems by the hash of their messages and answer; of each at least one. Raises UserError for fewer than two."""
    if len(problems) < 2:
        raise UserError(
            f"{name} has one problem; without a validation split at least 2 are needed, one of them for validation"
        )
    places = [_hash(problem) for problem in problems]
    order = np.argsort(places, kind="stable")
    count = sum(place < fraction for place in places)
    held_out = set(order[: min(max(count, 1), len(problems) - 1)].tolist())
    splits: dict[str, list[Problem]] = {"train": [], "validation": []}
    for i, problem in enumerate(problems):
        splits["validation" if i in held_out else "train"].append(problem)
    return splits


def _parse(row: Mapping[str, Any], default_id: str) -> tuple[Problem, str | None, str | None]:
    """Problem, split and gold of a row. Raises ValueError that says what is wrong."""
    for key in row:
        if key not in KEYS:
            raise ValueError(
                f"unknown key {key!r:.80}; allowed are {', '.join(KEYS)} (other data goes into meta, or task_args.columns maps it)"
            )
    check_values(dict(row))
    if "answer" not in row:
        raise ValueError("the key 'answer' is missing")
    if ("messages" in row) == ("prompt" in row):
        raise ValueError("exactly one of 'messages' and 'prompt' is needed")
    if "prompt" in row and (not isinstance(row["prompt"], str) or not row["prompt"].strip()):
        raise ValueError(f"prompt={row['prompt']!r:.80} must be a text that is not empty")
    messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
    wrong = find_message_error(messages)
    if wrong:
        raise ValueError(wrong)
    meta = row.get("meta", {})
    if not isinstance(meta, dict):
        raise ValueError(f"meta={meta!r:.80} must be an object")
    for key in ("id", "split", "gold"):
        if key in row and (not isinstance(row[key], str) or not row[key]):
            raise ValueError(f"{key}={row[key]!r:.80} must be a text that is not empty")
    return (
        Problem(row.get("id", default_id), tuple(messages), row["answer"], meta),
        row.get("split"),
        row.get("gold"),
    )


def _hash(problem: Problem) -> float:
    """A number in [0, 1) that depends on the messages and the answer alone."""
    digest = hashlib.sha256(_text([problem.messages, problem.answer]).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
