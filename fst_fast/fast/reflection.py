"""Reflection: show a language model what a context did wrong, ask for a better one, and read the answer strictly.

The idea is GEPA's (arXiv 2507.19457); the wording is ours. Reading is strict because small models answer badly in known ways: text cut
off inside an unclosed <think>, no answer at all, the old context again, an essay. Every one of them is refused with a reason that the
fast phase counts; nothing is repaired by guessing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

SHOWN_CHARS = 4000
"""A problem, a response or a feedback longer than this is shown with its middle left out."""

RefusalReason = Literal[
    "error", "length", "cut_off", "unfenced", "empty", "not_text", "duplicate", "too_long"
]


@dataclass(frozen=True)
class Failure:
    """One response that did not get the full reward."""

    problem: str
    response: str
    feedback: str
    reward: float


@dataclass(frozen=True)
class ReflectionPrompt:
    """What a reflector sees: a context and some of its failures."""

    context: str
    failures: Sequence[Failure]

    def render(self) -> str:
        """The request as text, for a reflector that is a language model."""
        shown = "\n\n".join(_render_failure(i, failure) for i, failure in enumerate(self.failures, 1))
        return (
            "A language model solves problems of one kind. Before each problem it reads this instruction:\n\n"
            f"<instruction>\n{self.context}\n</instruction>\n\n"
            "With this instruction it did not get the full reward (1.0) on the following problems. For each you see the problem, "
            "the model's response, the reward, and what the checker said.\n\n"
            f"{shown}\n\n"
            "Find out what these failures have in common: what the model did not know, did not do, or did in the wrong form. Then "
            "write a revised instruction that prevents them. It must help with other problems of the same kind, so state general "
            "methods, facts and output formats, and do not repeat the answers of the problems above. Keep what already works. Be "
            "brief and concrete.\n\n"
            "End with the complete revised instruction, and nothing else, between two lines of three backticks:\n"
            "```\n(the revised instruction)\n```"
        )


@dataclass(frozen=True)
class Reply:
    """A reflector's answer. text is None where there is none; error says why, in one line, without secrets."""

    text: str | None
    finish: str
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def failed(cls, error: str) -> Reply:
        return cls(text=None, finish="error", error=error)


@dataclass(frozen=True)
class Refusal:
    """Why a reply yields no context."""

    reason: RefusalReason


class Reflector(Protocol):
    """Answers a batch of reflections, one reply each, in order. One seed per prompt, so that a run repeats itself where it can."""

    def __call__(self, prompts: Sequence[ReflectionPrompt], *, seeds: Sequence[int]) -> list[Reply]: ...


def ask(
    reflect: Reflector, prompts: Sequence[ReflectionPrompt], seeds: Sequence[int], log: Callable[[str], None]
) -> list[Reply]:
    """Call the reflector; whatever it does wrong becomes replies with an error, never an exception. Problems are logged once a batch.

    Where several processes run, the first one calls this and sends the replies to the others.
    """
    try:
        replies: object = reflect(prompts, seeds=seeds)
    except Exception as error:  # noqa: BLE001 - the user's code or a network: its fault must not end the training
        replies = None
        why = f"the reflector raised {type(error).__name__}: {first_line(str(error))}"
    else:
        why = f"the reflector returned {type(replies).__name__} where a list of {len(prompts)} replies is due"
    if (
        not isinstance(replies, list)
        or len(replies) != len(prompts)
        or not all(isinstance(reply, Reply) for reply in replies)
    ):
        if isinstance(replies, list):
            why = f"the reflector returned {len(replies)} items where {len(prompts)} replies are due"
        replies = [Reply.failed(why) for _ in prompts]
    errors = [reply.error for reply in replies if reply.error is not None]
    if errors:
        log(f"{len(errors)} of {len(prompts)} reflections failed: {first_line(errors[0])}")
    return replies


def extract(
    reply: Reply, *, known_texts: Collection[str], count_tokens: Callable[[str], int], max_tokens: int
) -> str | Refusal:
    """The proposed context in a reply, or why there is none.

    The last fenced block outside think blocks counts. Refused: a reply with an error, one stopped by length or otherwise cut off, no
    closed fence after the think blocks, an empty block, text that is not valid Unicode, text already known (white space aside), more
    than max_tokens tokens.
    """
    if reply.error is not None or reply.text is None:
        return Refusal("error")
    if reply.finish == "length":
        return Refusal("length")
    if reply.finish in ("abort", "content_filter"):
        return Refusal("cut_off")
    text = last_fenced(without_thinking(reply.text))
    if text is None:
        return Refusal("unfenced")
    if not text:
        return Refusal("empty")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may carry half a surrogate pair
        return Refusal("not_text")
    folded = _fold(text)
    if any(_fold(known) == folded for known in known_texts):
        return Refusal("duplicate")
    if count_tokens(text) > max_tokens:
        return Refusal("too_long")
    return text


_THINK = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL | re.IGNORECASE)
_THINK_END = re.compile(r"\A.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"`{3,}")


def without_thinking(text: str) -> str:
    """The text without its think blocks; an unclosed one reaches to the end, one opened by the chat template begins at the start."""
    return _THINK_END.sub("", _THINK.sub("", text))


def last_fenced(text: str) -> str | None:
    """The last block between two equally long runs of backticks, its language tag and outer white space removed. None where there is
    none, or where the last one is never closed: what it would have said is not known."""
    block: str | None = None
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif len(fence[0]) == len(opened[0]):
            block, opened = text[opened.end() : fence.start()], None
    if block is None or opened is not None:
        return None
    tag, newline, body = block.partition("\n")
    return (body if newline and re.fullmatch(r"[\w+.-]*\s*", tag) else block).strip()


def cut(text: str, chars: int) -> str:
    """The text with its middle left out where it is longer than `chars`."""
    if len(text) <= chars:
        return text
    head = chars * 2 // 3
    tail = chars - head
    return f"{text[:head]}\n[... {len(text) - chars} characters left out ...]\n{text[len(text) - tail :]}"


def first_line(text: str, chars: int = 300) -> str:
    """The first line, cut: for a log or an error."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= chars else line[: chars - 3] + "..."


def _fold(text: str) -> str:
    return " ".join(text.split())


def _render_failure(number: int, failure: Failure) -> str:
    return (
        f"## Failure {number}\n"
        f"<problem>\n{cut(failure.problem, SHOWN_CHARS)}\n</problem>\n"
        f"<response>\n{cut(failure.response, SHOWN_CHARS)}\n</response>\n"
        f"Reward: {failure.reward:g}\n"
        f"Checker: {cut(failure.feedback, SHOWN_CHARS) or '(no comment)'}"
    )
