"""Extract the answer of a built-in task: the contents of the last \\boxed{} of a response."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\boxed\s*\{([^{}]*)\}")


class NoBoxedAnswer(Exception):
    """The response has no boxed answer. The message is feedback for the reflection."""


def last_box(response: str, holds: str) -> str:
    """The contents of the last box, stripped. holds: what the box should hold, for the feedback. Raises NoBoxedAnswer."""
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
