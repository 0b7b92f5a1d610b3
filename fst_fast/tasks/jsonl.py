"""JSONL: one JSON object a line, read strictly; and what any value of a row must be.

A line is refused by file and line number where JSON can spell what nothing after it can hold: a key twice, NaN, a number beyond a float,
half a surrogate pair, values nested without end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
MAX_DEPTH = 100
MAX_DIGITS = 4000  # Python refuses to write longer integers
TOO_DEEP = f"is nested too deep; at most {MAX_DEPTH} levels are read"


def read_jsonl(path: Path) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """(line, `file:line`, object) of every line that is not blank. Raises UserError."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        yield number, f"{path}:{number}", row


def read_bytes(path: Path) -> bytes:
    """The bytes of a file without a byte order mark. Raises UserError."""
    try:
        return path.expanduser().read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"task={path} cannot be read: {error.strerror or error}") from error


def _parse(line: bytes) -> Mapping[str, Any]:
    """Raises ValueError that says what is wrong."""
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
    if not isinstance(row, dict):
        raise ValueError(f"is a JSON {type(row).__name__}; it must be an object")
    return row


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


def check_values(row: Any) -> None:
    """Refuse, by ValueError, what is not JSON's or cannot be kept: other types, NaN, half a surrogate pair, values nested without end."""
    level = [row]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                if not is_text(value):
                    raise ValueError(
                        f"holds half a surrogate pair in {value!r:.80}, which is not a character"
                    )
            elif isinstance(value, float):
                if not math.isfinite(value):
                    raise ValueError(f"holds {value}, which is not a number")
            elif value is not None and not isinstance(value, int):
                raise ValueError(
                    f"holds a value of type {type(value).__name__}; text, numbers, lists and objects are taken"
                )
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
