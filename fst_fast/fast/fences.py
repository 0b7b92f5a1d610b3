"""The fenced block at the end of a reply, where it can be read in one way only.

A fence is a run of three or more backticks. It may open a block, close one, or open one inside another, and nothing but a language's name behind
it tells which. So all readings in which every fence has its partner are compared: a reply whose readings differ in their last block is
ambiguous, and none is taken. Three backticks around a word in the middle of a line are code in the text, no block.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

# fmt: off
LANGUAGES = frozenset({
    "bash", "c", "console", "cpp", "css", "csv", "go", "html", "java", "javascript", "js", "json", "julia", "latex", "lean", "markdown", "md",
    "none", "plain", "plaintext", "py", "python", "python3", "r", "rust", "sh", "shell", "sql", "tex", "text", "toml", "ts", "txt", "typescript",
    "xml", "yaml", "yml",
})
# fmt: on
"""What a fence's line may hold besides the fence; any other word belongs to the text."""
MOST_FENCES = 64
"""A reply with more is not read."""

Unreadable = Literal["unfenced", "ambiguous"]
Span = tuple[int, int]

_FENCE = re.compile(r"`{3,}")
_TAG = re.compile(r"([a-z0-9]+)[ \t]*\r?\n")
_THOUGHT = re.compile(r"\s*<think(?:ing)?>", re.IGNORECASE)
_THOUGHT_START = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THOUGHT_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)


def last_block(text: str) -> Span | Unreadable:
    """The place of the last block's text, fences left out. "unfenced": no reading has a partner for every fence."""
    fences = list(_FENCE.finditer(text))
    if len(fences) > MOST_FENCES:
        return "ambiguous"
    blocks = _without_inline(text, fences)
    return _last_block(text, blocks or fences)


def block_text(text: str, span: Span) -> str:
    """A block's text without the language on its fence's line and without white space around it."""
    start, end = span
    tag = _TAG.match(text, start, end)
    return text[tag.end() if tag and tag[1] in LANGUAGES else start : end].strip()


def without_thought(text: str) -> str:
    """The text behind the thoughts that it begins with. One that is never closed is the whole text. One that the chat template opened ends
    at a first </think> outside the block."""
    while True:
        while opened := _THOUGHT.match(text):
            closed = _THOUGHT_END.search(text, opened.end())
            if closed is None:
                return ""
            text = text[closed.end() :]
        closed = _THOUGHT_END.search(text)
        if closed is None or _THOUGHT_START.search(text, 0, closed.start()):
            return text
        block = last_block(text)
        if not isinstance(block, str) and block[0] <= closed.start() < block[1]:
            return text
        text = text[closed.end() :]


def _without_inline(text: str, fences: list[re.Match[str]]) -> list[re.Match[str]]:
    kept: list[re.Match[str]] = []
    i = 0
    while i < len(fences):
        fence = fences[i]
        line = text[text.rfind("\n", 0, fence.start()) + 1 : fence.start()]
        following = fences[i + 1] if i + 1 < len(fences) else None
        if (
            line.strip()
            and following is not None
            and len(following[0]) == len(fence[0])
            and "\n" not in text[fence.end() : following.start()]
        ):
            i += 2
        else:
            kept.append(fence)
            i += 1
    return kept


def _last_block(text: str, fences: list[re.Match[str]]) -> Span | Unreadable:
    def only_opens(fence: re.Match[str]) -> bool:
        tag = _TAG.match(text, fence.end())
        return tag is not None and tag[1] in LANGUAGES

    @cache
    def readings(first: int) -> frozenset[tuple[int, int] | None]:
        """The last block of each reading of fences[first:], as numbers of its fences; None where there is none. Empty: no reading."""
        if first == len(fences):
            return frozenset({None})
        found: set[tuple[int, int] | None] = set()
        depths = {1}
        for i in range(first + 1, len(fences)):
            if len(fences[i][0]) != len(fences[first][0]):
                continue
            closing = set() if only_opens(fences[i]) else {depth - 1 for depth in depths}
            depths = {depth + 1 for depth in depths} | (closing - {0})
            if 0 in closing:
                found |= {(first, i) if later is None else later for later in readings(i + 1)}
        return frozenset(found)

    last = readings(0)
    if not last or last == {None}:
        return "unfenced"
    if len(last) > 1:
        return "ambiguous"
    (block,) = last
    assert block is not None
    return fences[block[0]].end(), fences[block[1]].start()
