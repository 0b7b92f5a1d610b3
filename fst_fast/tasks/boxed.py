"""The last \\boxed{} of a response, as the built-in tasks read an answer.

Braces are balanced, so a box may hold \\frac{1}{2}. A box that is empty, as in "write it in \\boxed{}", holds no answer and is passed over. What
LaTeX allows without braces is read, too: \\boxed 5. Braces and text commands around the whole content, as in \\boxed{\\text{30}}, are taken off.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_BOX = re.compile(r"\\boxed(?![a-zA-Z])\s*")
# a number or a letter; "in \boxed form" is prose
_BARE = re.compile(r"[-+]?\d+(?:[.,/]\d+)*|[A-Za-z](?![A-Za-z])")
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mbox|hbox)\s*(?=\{)")


class NoBoxedAnswer(Exception):
    """The response has no boxed answer. The message is feedback for the reflection."""


def last_box(response: str, holds: str) -> str:
    """What the last box that is not empty holds, stripped. holds: what must be in it, for the feedback.

    Raises NoBoxedAnswer, also where a later box is never closed: the response was then cut while it gave another answer."""
    boxes = list(_boxes(response))
    if not boxes:
        raise NoBoxedAnswer(f"there is no \\boxed{{}} in the response: {holds} must stand inside the box.")
    if boxes[-1][1] is None:
        raise NoBoxedAnswer("the last \\boxed{ of the response is not closed.")
    content = next((content for _, content in reversed(boxes) if content), "")
    if not content:
        raise NoBoxedAnswer(f"the box is empty: {holds} must stand inside the box.")
    return content


def work_before(response: str) -> str:
    """The response up to the box that `last_box` reads; all of it where there is none."""
    boxes = list(_boxes(response))
    ends = [start for start, content in boxes if content] or [start for start, _ in boxes[:1]]
    return response[: ends[-1]] if ends else response


def _boxes(response: str) -> Iterator[tuple[int, str | None]]:
    """(place, content) of every box, in order; content is None where it is not closed."""
    for match in _BOX.finditer(response):
        if not response.startswith("{", match.end()):
            bare = _BARE.match(response, match.end())
            yield match.start(), bare[0] if bare else ""
            continue
        end = _closing(response, match.end())
        yield match.start(), None if end is None else _unwrapped(response[match.end() + 1 : end])


def _closing(text: str, opening: int) -> int | None:
    """Where the brace closes that opens at `opening`; \\{ and \\} are signs, no braces."""
    depth = 0
    at = opening
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "{":
            depth += 1
        elif text[at] == "}":
            depth -= 1
            if depth == 0:
                return at
        at += 1
    return None


def _unwrapped(content: str) -> str:
    """The content without white space, braces and text commands around the whole of it."""
    while True:
        content = content.strip()
        text = _TEXT.match(content)
        opening = text.end() if text else 0
        if not content.startswith("{", opening) or _closing(content, opening) != len(content) - 1:
            return content
        content = content[opening + 1 : -1]
