"""A fingerprint of the problems that a task gave, so that a resumed run cannot go on with other ones unnoticed.

It covers what the run reads of a problem: id, messages, answer and meta. A split whose problems are held in memory (a list, a JSONL file) is hashed whole; of one
that makes its problems when they are asked for, or reads them from elsewhere, the number of problems and the first `STREAMED` are. The hash does not depend on
the process: no `hash()`, no addresses, dictionaries in the order of their keys.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from fst_fast import distributed
from fst_fast.contracts import Problem
from fst_fast.data.stages import Stage
from fst_fast.errors import UserError
from fst_fast.tasks.mixture import in_memory

STREAMED = 512
"""Problems hashed of a split that is not in memory."""

Fingerprint = list[dict[str, dict[str, Any]]]
"""One entry per stage: split -> {"problems": their number, "hashed": how many of them, "sha256": hex}."""


def fingerprint(stages: Sequence[Stage]) -> Fingerprint:
    """The fingerprint of what every stage trains and evaluates on."""
    return [{"train": of_problems(s.train), "validation": of_problems(s.validation)} for s in stages]


def shared_fingerprint(stages: Sequence[Stage]) -> Fingerprint:
    """The fingerprint of the data. Raises UserError where another process has been given other problems. All processes call it."""
    everywhere = distributed.all_gather(fingerprint(stages))
    for rank, other in enumerate(everywhere):
        if other != everywhere[0]:
            raise UserError(
                f"process {rank} has been given other problems than process 0 ({'; '.join(changes(everywhere[0], other))}); "
                "a task must give the same problems in every process"
            )
    return everywhere[0]


def of_problems(problems: Sequence[Problem]) -> dict[str, Any]:
    """The fingerprint of one split. Raises UserError for a problem that is nested too deep."""
    total = len(problems)
    count = total if in_memory(problems) else min(total, STREAMED)
    digest = hashlib.sha256()
    for index in range(count):
        p = problems[index]
        given = (p.id, p.messages, p.answer, p.meta)
        try:
            digest.update(json.dumps(given, sort_keys=True).encode() + b"\n")
        except (TypeError, ValueError):  # not plain JSON: objects, arrays, sets, values that hold themselves
            _feed(given, digest.update, ())
        except RecursionError:
            raise UserError(f"problem {p.id!r} is nested too deep to be read again and compared") from None
    return {"problems": total, "hashed": count, "sha256": digest.hexdigest()}


def changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """What differs between the data of two starts of a run, one sentence part per split; stages that were added are no change."""
    found = []
    for stage, (old, new) in enumerate(zip(before, now, strict=False)):
        where = f" of stage {stage + 1}" if len(now) > 1 else ""
        for split, was in old.items():
            is_now = new[split]
            if was["problems"] != is_now["problems"]:
                found.append(
                    f"the {split} split{where} had {was['problems']} problems and has {is_now['problems']}"
                )
            elif was != is_now:
                found.append(f"the {split} split{where} has other problems, {is_now['problems']} as before")
    return found


def _feed(value: Any, update: Callable[[bytes], object], above: tuple[int, ...]) -> None:
    """Feed a value to a hash: its kind, its length, its content, so that no two different values feed the same bytes."""
    if id(value) in above:
        return update(b"cycle;")  # type: ignore[return-value]
    inside = (*above, id(value))

    def all_of(kind: str, items: Iterator[Any] | Sequence[Any], count: int) -> None:
        update(f"{kind}{count}:".encode())
        for item in items:
            _feed(item, update, inside)

    if isinstance(value, enum.Enum):
        all_of("e", (type(value).__qualname__, value.name), 2)
    elif isinstance(value, np.generic):
        all_of("n", (str(value.dtype), value.item()), 2)
    elif value is None or isinstance(value, bool | int | float | complex):
        update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        update(b"s%d:" % len(data) + data)
    elif isinstance(value, bytes | bytearray):
        update(b"b%d:" % len(value) + bytes(value))
    elif isinstance(value, np.ndarray):
        all_of("a", (str(value.dtype), value.shape, value.tolist()), 3)
    elif isinstance(value, Mapping):
        items = sorted(value.items(), key=lambda item: (type(item[0]).__name__, repr(item[0])))
        all_of("d", [part for item in items for part in item], 2 * len(items))
    elif isinstance(value, Set):
        digests = sorted(_digest(item, inside) for item in value)
        all_of("S", digests, len(digests))
    elif isinstance(value, Sequence):
        all_of("l", value, len(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        all_of(f"D{type(value).__qualname__}", fields, len(fields))
    elif hasattr(value, "__dict__") and not callable(value):
        all_of(f"o{type(value).__qualname__}", [vars(value)], 1)
    elif not callable(value) and " at 0x" not in repr(value):
        all_of(f"r{type(value).__qualname__}", [repr(value)], 1)  # Decimal, Fraction, datetime, Path, ...
    else:
        all_of("t", [getattr(value, "__qualname__", type(value).__qualname__)], 1)


def _digest(value: Any, above: tuple[int, ...]) -> bytes:
    digest = hashlib.sha256()
    _feed(value, digest.update, above)
    return digest.digest()
