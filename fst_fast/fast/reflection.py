"""Reflection: show a language model what a context did wrong, ask for a better one, and read the answer strictly.

The idea is GEPA's (arXiv 2507.19457); the wording is ours. Reading is strict because small models answer badly in known ways: text cut
off inside an unclosed <think>, no answer at all, the old context again, an essay. Every one of them is refused with a reason that the
fast phase counts; nothing is repaired by guessing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fst_fast.fast.fences import block_text, last_block, without_thought

SHOWN_CHARS = 4000
"""A problem, a response or a feedback longer than this is shown with its middle left out."""

WHOLE = frozenset({"stop", "eos"})
"""Finish reasons of a reply that its model ended, in lower case."""
CUT_BY_LENGTH = frozenset({"length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens"})

# fmt: off
RefusalReason = Literal[
    "error", "length", "cut_off", "unfenced", "ambiguous", "empty", "placeholder", "not_text", "special_token", "duplicate", "too_long"
]
# fmt: on
PLACEHOLDER = "(the revised instruction)"
_PLACEHOLDERS = frozenset(
    {"the revised instruction", "the complete revised instruction", "revised instruction"}
)
_AROUND = " ()[]{}<>*_.…\"'"


@dataclass(frozen=True)
class Failure:
    """One judged response: where nothing else is said, one that did not get the full reward."""

    problem: str
    response: str
    feedback: str
    reward: float


@dataclass(frozen=True)
class Lesson:
    """An edit that was admitted: the context before, what the checker said of it, and the context after."""

    before: str
    feedback: Sequence[str]
    after: str


@dataclass(frozen=True)
class Partner:
    """A context to recombine with, and problems that it solves better."""

    text: str
    problems: Sequence[str]


@dataclass(frozen=True)
class ReflectionPrompt:
    """What a reflector sees: a context and some of its failures.

    For reflectors that need more help: successes, responses with the full reward, under any context; others, the other current texts, best
    first; lessons, the latest admitted edits. `render` leaves these out. Of a context of components: `context` is the component to be revised,
    `component` its name, `whole` all of them. With `partners` a recombination is asked for: a context that takes from them what serves their
    problems; `solved` are problems that the context itself solves better."""

    context: str
    failures: Sequence[Failure]
    successes: Sequence[Failure] = ()
    others: Sequence[str] = ()
    lessons: Sequence[Lesson] = ()
    component: str = ""
    whole: str = ""
    partners: Sequence[Partner] = ()
    solved: Sequence[str] = ()

    def render(self) -> str:
        """The request as text, for a reflector that is a language model."""
        shown = "\n\n".join(_render_failure(i, failure) for i, failure in enumerate(self.failures, 1))
        instruction = f"<instruction>\n{self.context}\n</instruction>\n\n"
        what = (
            "the description of a tool that it may call"
            if self.component.startswith("tool:")
            else "one part of it"
        )
        read = (
            f"Before each problem it reads an instruction of several parts:\n\n{self.whole}\n\nYou revise {what}, "
            f"{self.component}, and nothing else:\n\n"
            if self.component
            else "Before each problem it reads this instruction:\n\n"
        )
        return (
            f"A language model solves problems of one kind. {read}{instruction}"
            f"{self._recombination()}"
            "With this instruction it did not get the full reward (1.0) on the following problems. For each you see the problem, "
            "the model's response, the reward, and what the checker said.\n\n"
            f"{shown}\n\n"
            "Find out what these failures have in common: what the model did not know, did not do, or did in the wrong form. Then "
            "write a revised instruction that prevents them. It must help with other problems of the same kind, so state general "
            "methods, facts and output formats, and do not repeat the answers of the problems above. Keep what already works. Be "
            "brief and concrete.\n\n"
            "End with the complete revised instruction, and nothing else, between two lines of three backticks:\n"
            f"```\n{PLACEHOLDER}\n```\n"
            "If the instruction itself holds such lines, put it between two lines of four backticks."
        )

    def _recombination(self) -> str:
        """What the request says of the partners; "" without any."""

        def best(problems: Sequence[str]) -> str:
            shown = "\n".join(f"- {cut(problem, SHOWN_CHARS)}" for problem in problems)
            return f"It does best on these problems:\n{shown}\n\n" if problems else ""

        if not self.partners:
            return ""
        others = "".join(
            f"<instruction>\n{partner.text}\n</instruction>\n\n{best(partner.problems)}"
            for partner in self.partners
        )
        return (
            f"{best(self.solved)}Other instructions for the same model:\n\n{others}"
            "Take over from them what makes them better on their problems.\n\n"
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
    reply: Reply,
    *,
    known_texts: Collection[str],
    count_tokens: Callable[[str], int],
    max_tokens: int,
    spells_special: Callable[[str], bool] = lambda text: False,
) -> str | Refusal:
    """The proposed context in a reply, or why there is none.

    It is the last fenced block behind the thoughts that the reply begins with. spells_special: whether a text spells a special token of the
    policy's tokenizer. Refused: a reply with an error or one that is not said to be whole, no closed fence, fences that can be read in
    several ways, an empty block, the request's own placeholder, text that is not valid Unicode or spells a special token, text already
    known (white space aside), more than max_tokens tokens.
    """
    finish = reply.finish.lower()
    if reply.error is not None or reply.text is None or finish == "error":
        return Refusal("error")
    if finish in CUT_BY_LENGTH:
        return Refusal("length")
    if finish not in WHOLE:
        return Refusal("cut_off")
    answer = without_thought(reply.text)
    block = last_block(answer)
    if isinstance(block, str):
        return Refusal(block)
    text = block_text(answer, block)
    if not text:
        return Refusal("empty")
    if _fold(text).strip(_AROUND).casefold() in _PLACEHOLDERS:
        return Refusal("placeholder")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON may carry half a surrogate pair
        return Refusal("not_text")
    if spells_special(text):
        return Refusal("special_token")
    folded = _fold(text)
    if any(_fold(known) == folded for known in known_texts):
        return Refusal("duplicate")
    if count_tokens(text) > max_tokens:
        return Refusal("too_long")
    return text


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
