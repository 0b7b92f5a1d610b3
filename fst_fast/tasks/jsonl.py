"""A task from a JSONL file and a function: the shortest way to train on one's own data.

One object a line: {"messages": [{"role", "content"}, ...] or "prompt": text, "answer": anything, and optionally "id", "split", "meta",
"gold": a response that must get reward 1}. The grader is `task_args.verify`: a built-in one (graders/__init__.py), or
`grader.py:function`, function(problem, response), which returns a Verdict, a number in [0, 1], a bool, or {"reward", "feedback", "metrics"}.

Without `split` fields a validation set is chosen by a hash of the ids: the same lines always give the same split, and other orders too
where the lines carry ids.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.graders import BUILT_IN, Function, gold_of, make_grader
from fst_fast.tasks.verdicts import as_verdict

KEYS = ("id", "messages", "prompt", "answer", "split", "meta", "gold")
ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 100
MAX_DIGITS = 4000  # Python refuses to write longer integers
TOO_DEEP = f"is nested too deep; at most {MAX_DEPTH} levels are read"


class JsonlTask:
    """verify: the grader. validation_fraction: share of the lines held out where the file says no split. gold: the response that must get
    reward 1, with {answer} in the place of the line's answer; None: the grader's own, for a function the answer itself; an empty text
    switches this check off, for graders that no fixed response can satisfy. A line's own `gold` goes first.
    Raises UserError, for a bad line with file:line."""

    tools: Sequence[Any] = ()  # task_args.tools, set by the registry

    def __init__(
        self,
        path: str,
        verify: str | Mapping[str, Any] | Sequence[Any] = "",
        validation_fraction: float = 0.1,
        gold: str | None = None,
        *,
        read: bool = True,
    ) -> None:
        if not verify:
            raise UserError(
                f"task={path} needs a grader: set task_args.verify to grader.py:function or one of {', '.join(BUILT_IN)}"
            )
        if not isinstance(validation_fraction, int | float) or not 0 < validation_fraction < 1:
            raise UserError(
                f"task_args.validation_fraction={validation_fraction!r} must be a number between 0 and 1, both excluded"
            )
        if gold is not None and not isinstance(gold, str):
            raise UserError(
                f"task_args.gold={gold!r} must be a text in which {{answer}} stands for the answer, or an empty text"
            )
        self.grader = make_grader(verify)
        self._gold_template = gold
        self._splits: dict[str, list[Problem]] = {}
        self._golds: dict[str, str] = {}
        if read:
            self._read(Path(path), float(validation_fraction))

    def problems(self, split: str) -> Sequence[Problem]:
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

    def _read(self, path: Path, fraction: float) -> None:
        try:
            raw = path.expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"task={path} cannot be read: {error.strerror or error}") from error
        stem = path.stem.encode("utf-8", "replace").decode()  # a file's name need not be text
        rows: list[tuple[Problem, str | None]] = []
        lines: dict[str, int] = {}
        for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                problem, split, gold = _parse(line, default_id=f"{stem}/{number}")
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from error
            if problem.id in lines:
                raise UserError(
                    f"{path}:{number}: the id {problem.id!r:.80} is already that of line {lines[problem.id]}; ids must be unique"
                )
            if rows and (split is None) != (rows[0][1] is None):
                first = next(iter(lines.values()))
                says = "has no split, but line" if split is None else "has a split, but line"
                raise UserError(
                    f"{path}:{number}: {says} {first} {'has' if split is None else 'has none'}; give it to all lines or to none"
                )
            rows.append((problem, split))
            lines[problem.id] = number
            if gold is not None:
                self._golds[problem.id] = gold
        if not rows:
            raise UserError(
                f"task={path} has no problems: the file is empty; one JSON object a line is needed"
            )
        held_out: set[str] = set()
        if rows[0][1] is None:
            if len(rows) < 2:
                raise UserError(
                    f"task={path} has one problem; without split fields at least 2 are needed, one of them for validation"
                )
            ids = sorted(
                (problem.id for problem, _ in rows), key=lambda i: hashlib.sha256(i.encode()).digest()
            )
            held_out = set(ids[: min(max(round(fraction * len(ids)), 1), len(ids) - 1)])
        for problem, split in rows:
            self._splits.setdefault(
                split or ("validation" if problem.id in held_out else "train"), []
            ).append(problem)


def _parse(line: bytes, *, default_id: str) -> tuple[Problem, str | None, str | None]:
    """Problem, split and gold of one line. Raises ValueError that says what is wrong."""
    try:
        row = json.loads(
            line.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_float,
            parse_int=_int,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    _check_values(row)
    if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}; it must be an object")
    for key in row:
        if key not in KEYS:
            raise ValueError(
                f"unknown key {key!r:.80}; allowed are {', '.join(KEYS)} (other data goes into meta)"
            )
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


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"holds {name}, which is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds the number {text[:40]}, which is beyond the range of a float")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"holds a number of {len(text)} digits; at most {MAX_DIGITS} are read")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r:.80} is given twice")
    return row


def _check_values(row: Any) -> None:
    """Refuse what JSON can spell and nothing after it can hold: half a surrogate pair in any text, values nested without end."""
    level = [row]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not is_text(value):
                raise ValueError(f"holds half a surrogate pair in {value!r:.80}, which is not a character")
        if not inner:
            return
        level = inner
    raise ValueError(TOO_DEEP)


def is_text(value: str) -> bool:
    """Whether a string is text that UTF-8 can hold: no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_message_error(messages: Any) -> str | None:
    """What is wrong with a list of chat messages, or None."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        return f"messages={messages!r:.80} must be a list that is not empty"
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return f"messages[{index}] must be an object with the texts 'role' and 'content'"
        if message.get("role") not in ROLES:
            return f"messages[{index}].role={message.get('role')!r:.80} is not known; allowed are {', '.join(ROLES)}"
        if not is_text(message["content"]):
            return f"messages[{index}] holds half a surrogate pair, which is not a character"
    return None
