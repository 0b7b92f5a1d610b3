"""The last \\boxed{} of a response, as the built-in tasks read an answer."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")


class NoBoxedAnswer(Exception):
    """There is no answer in a box; the text says why, as feedback for the reflection."""


def last_box(response: str, holds: str) -> str:
    """What stands in the last box, stripped. holds: what must stand there, for the feedback. Raises NoBoxedAnswer."""
    opened = response.rfind("\\boxed")
    if opened < 0:
        raise NoBoxedAnswer(f"there is no \\boxed{{}} in the response: {holds} must stand inside the box.")
    match = _BOX.match(response, opened)
    if match is None:
        raise NoBoxedAnswer("the last \\boxed{ of the response is not closed.")
    content = match[1].strip()
    if not content:
        raise NoBoxedAnswer(f"the box is empty: {holds} must stand inside the box.")
    return content
