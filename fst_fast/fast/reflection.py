"""Reflection: show a language model what a context did wrong, ask for a better one, and read the answer strictly.

The idea is GEPA's (arXiv 2507.19457); the wording is ours. Reading is strict because small models answer badly in known ways: text cut
off inside an unclosed <think>, no answer at all, the old context again, an essay. Every one of them is refused with a reason that the
fast phase counts; nothing is repaired by guessing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fst_fast.contracts import Message
from fst_fast.fast.fences import block_text, last_block, without_thought
from fst_fast.fast.request import render

WHOLE = frozenset({"stop", "eos"})
"""Finish reasons of a reply that its model ended, in lower case."""
PROPOSED = "proposed"
"""Finish reason of a reply that is the new text itself."""
CUT_BY_LENGTH = frozenset({"length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens"})

# fmt: off
RefusalReason = Literal[
    "error", "length", "cut_off", "unfenced", "ambiguous", "empty", "placeholder", "not_text", "special_token", "duplicate", "too_long"
]
# fmt: on
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
    turns: Sequence[
        Message
    ] = ()  # of an episode: what the policy (role `assistant`) and the environment said in turn


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
    `component` its name, `whole` all of them. template: of fast.reflection_templates, instead of the request that `render` writes; "" for none. With `partners` a
    recombination is asked for: a context that takes from them what serves their problems; `solved` are problems that the context itself solves better."""

    context: str
    failures: Sequence[Failure]
    successes: Sequence[Failure] = ()
    others: Sequence[str] = ()
    lessons: Sequence[Lesson] = ()
    component: str = ""
    whole: str = ""
    template: str = ""
    partners: Sequence[Partner] = ()
    solved: Sequence[str] = ()

    def render(self) -> str:
        """The request as text, for a reflector that is a language model."""
        return render(self)


@dataclass(frozen=True)
class Reply:
    """A reflector's answer. text is None where there is none; error says why, in one line, without secrets. cost_usd: what it cost."""

    text: str | None
    finish: str
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    @classmethod
    def proposal(cls, context: str, *, cost_usd: float = 0.0) -> Reply:
        """The reply of a proposer that gives the new context itself, or the new text of the component, and no fenced block."""
        return cls(context, PROPOSED, cost_usd=cost_usd)

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

    It is the last fenced block behind the thoughts that the reply begins with, or all of a proposal. spells_special: whether a text spells a special token of the
    policy's tokenizer. Refused: a reply with an error or one that is not said to be whole, no closed fence, fences that can be read in
    several ways, an empty block, the request's own placeholder, text that is not valid Unicode or spells a special token, text already
    known (white space aside), more than max_tokens tokens.
    """
    finish = reply.finish.lower()
    if reply.error is not None or reply.text is None or finish == "error":
        return Refusal("error")
    if finish in CUT_BY_LENGTH:
        return Refusal("length")
    if finish == PROPOSED:
        text = reply.text.strip()
    elif finish not in WHOLE:
        return Refusal("cut_off")
    else:
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


def first_line(text: str, chars: int = 300) -> str:
    """The first line, cut: for a log or an error."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= chars else line[: chars - 3] + "..."


def _fold(text: str) -> str:
    return " ".join(text.split())
