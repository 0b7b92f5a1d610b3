"""The check of a chat template, once when a run starts: what a template does wrong it does silently, in every prompt.

`open_chat` renders a few made-up conversations and compares. Refused: a template that raises or has an error, one into whose prompts a context or
a problem does not get, one that draws random numbers. Said: where the context goes, how the assistant's turn is opened, and whatever of the
prompt depends on more than the messages (docs/templates.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from fst_fast.config import ModelConfig
from fst_fast.contracts import Context, Message, Problem
from fst_fast.errors import UserError
from fst_fast.rollout.chat_template import ALWAYS_GIVEN, TemplateError
from fst_fast.rollout.prompt import Chat, System, load_tokenizer, messages_with_context
from fst_fast.run.environment import wall_clock

CONTEXTS = ("amber lanterns hum", "seven quiet rivers bend")
"""Two contexts and two problems that no template has a reason to treat in different ways."""
PROBLEMS = ("count the herons", "which door is blue")


@dataclass(frozen=True)
class Findings:
    """What the check found: one line, and warnings of one sentence each."""

    line: str
    warnings: tuple[str, ...] = ()


def configured_chat(
    config: ModelConfig, *, saved: Path | None = None, date: datetime | None = None
) -> tuple[Chat, Findings]:
    """The chat template of a configuration, checked. saved: the model's folder in a checkpoint of the run, whose tokenizer and template are then
    used if it holds them. Raises UserError."""
    here = saved is not None and (saved / "tokenizer_config.json").is_file()  # earlier versions saved none
    source: dict[str, Any] = {"path": config.path, "revision": config.revision}
    if saved is not None and here:
        source = {"path": saved}
    elif config.tokenizer is not None:
        source = {"path": config.tokenizer, "key": "model.tokenizer"}
    tokenizer = load_tokenizer(
        **source,
        trust_remote_code=config.trust_remote_code,
        chat_template=None if here else config.chat_template,
    )
    return open_chat(
        tokenizer,
        system=config.system,
        variables=config.chat_template_kwargs,
        date=date,
        where=f"the chat template of {config.chat_template or f'model {config.path}'}",
    )


def open_chat(
    tokenizer: Any,
    *,
    system: Literal["auto", "system", "user"] = "auto",
    variables: Mapping[str, Any] | None = None,
    date: datetime | None = None,
    where: str = "the chat template",
) -> tuple[Chat, Findings]:
    """The tokenizer's chat template, checked, and what was found.

    system, variables: model.system and model.chat_template_kwargs. date: what the template's `strftime_now` shows; None for now.
    Raises UserError, one sentence, where no run can begin with it."""
    chat = Chat.of(tokenizer, variables=variables or {}, date=date or wall_clock(), where=where)
    reads = chat.template.reads
    unread = sorted(set(variables or {}) - reads)
    if unread:
        known = ", ".join(sorted(reads - ALWAYS_GIVEN - set(tokenizer.special_tokens_map))) or "none"
        raise UserError(
            f"model.chat_template_kwargs.{unread[0]}: {where} reads no such variable; those it reads: {known}"
        )
    if chat.template.is_random:
        raise UserError(f"{where} draws random numbers, so that no prompt would be the same twice")
    place, why = _place(chat, system)
    chat = chat.with_system(place)
    _check_problems(chat, where)
    return chat, _findings(chat, why)


def _place(chat: Chat, wanted: Literal["auto", "system", "user"]) -> tuple[System, str]:
    """Where the context reaches the prompt's ids, and why it does not go into the system message. Raises UserError where it does nowhere."""
    reasons: dict[str, str] = {}
    tries: tuple[System, ...] = ("system", "user") if wanted == "auto" else (wanted,)
    for system in tries:
        at = chat.with_system(system)
        problem = _problem(PROBLEMS[0])
        try:
            first, second = (
                at.ids(messages_with_context(Context.of(text), problem, system)) for text in CONTEXTS
            )
        except TemplateError as error:
            reasons[system] = f"refuses it ({error.reason})"
            continue
        if first != second:
            return system, reasons.get("system", "")
        reasons[system] = "leaves it out"
    said = " and ".join(
        f"{reason} {'in the system message' if system == 'system' else 'before the first user message'}"
        for system, reason in reasons.items()
    )
    way_out = "; model.system=user puts it before the first user message" if wanted == "system" else ""
    raise UserError(f"{chat.template.where} does not let a context reach the model: it {said}{way_out}")


def _check_problems(chat: Chat, where: str) -> None:
    """Refuse a template whose prompts do not depend on the problem."""
    prompts = [chat.prompt(Context.of(CONTEXTS[0]), _problem(text)).tolist() for text in PROBLEMS]
    if prompts[0] == prompts[1]:
        raise UserError(f"{where} leaves the user's message out: two problems give the same prompt")


def _findings(chat: Chat, why: str) -> Findings:
    messages = messages_with_context(Context.of(CONTEXTS[0]), _problem(PROBLEMS[0]), chat.system)
    text = chat.text(messages)
    closed = chat.template.render(messages, add_generation_prompt=False)
    warnings = []
    if chat.system == "system":
        parts = ["the context is the system message"]
    else:
        because = f", since the chat template {why} in a system message" if why else ""
        parts = [f"the context goes before the first user message{because}"]
    if CONTEXTS[0] not in text or PROBLEMS[0] not in text:
        warnings.append("the chat template changes the text of messages: a prompt does not hold it as it is")
    if text == closed:
        warnings.append(
            "the chat template ignores add_generation_prompt: responses begin where it ends, without an assistant's turn of their own"
        )
    elif text.startswith(closed):
        parts.append(f"the assistant's turn opens with {text[len(closed) :]!r}")
    else:
        parts.append("the assistant's turn is opened")
    ids = chat.ids(messages)
    bos = chat.tokenizer.bos_token_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        warnings.append(
            f"a prompt begins with two tokens {chat.tokenizer.bos_token!r}: the chat template writes one too many"
        )
    parts.append(_text_stays_text(chat, messages))
    at = chat.template.date
    if any(
        chat.template.render(messages, date=at + timedelta(days=days, hours=hours, minutes=11)) != text
        for days, hours in ((0, 5), (1, 0), (40, 3), (400, 2))
    ):
        parts.append(f"it writes the date, which for this run stays {at:%Y-%m-%d %H:%M}")
    return Findings("chat template: " + "; ".join(parts), tuple(f"warning: {w}" for w in warnings))


def _text_stays_text(chat: Chat, messages: Sequence[Message]) -> str:
    """Try it: a user message that spells every special token of the template and the ends of responses."""
    special, source = chat.special, chat.template.source
    words = [word for word in special.words.values() if word in source][:32]
    words += [w for w in (chat.tokenizer.eos_token, chat.tokenizer.bos_token) if w and w not in words]
    spelt = [{**messages[-1], "content": f"a {' b '.join(words)} c"}]
    try:
        got, wanted = (special.sequence(chat.ids([*messages[:-1], *last])) for last in (spelt, messages[-1:]))
    except UserError:
        return "a text that spells a special token is refused"
    assert got == wanted, "Chat.ids lets a special token arise from text"
    return f"none of the {len(special.words)} special tokens arises from text"


def check_vocabulary(chat: Chat, rows: int) -> None:
    """Raise UserError where the tokenizer has a token, or a prompt an id, beyond the `rows` of the model's vocabulary. Added tokens that no
    prompt holds may be beyond: Gemma 3's tokenizer has such."""
    tokenizer, backend = chat.tokenizer, chat.special.backend
    own = backend.get_vocab(with_added_tokens=False).values() if backend else [tokenizer.vocab_size - 1]
    used = [
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        *chat.prompt(Context.of(""), _problem(PROBLEMS[0])).tolist(),
    ]
    largest = max([*own, *(i for i in used if i is not None)])
    if largest >= rows:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} does not fit the model: it has token {largest}, the model's vocabulary ends at {rows - 1}; "
            "model.tokenizer can name another"
        )


def _problem(text: str) -> Problem:
    return Problem("", [{"role": "user", "content": text}], None)


def turn_end(chat: Chat) -> int | None:
    """The special token that the template writes behind an assistant's message; None where it writes none there."""
    asked = _problem(PROBLEMS[0]).messages
    try:
        text = chat.template.render(
            [*asked, {"role": "assistant", "content": CONTEXTS[1]}, *asked], add_generation_prompt=False
        )
    except TemplateError:
        return None
    before, said, _ = text.partition(CONTEXTS[1])
    if not said or chat.special.backend is None:
        return None
    located = chat.special.locate(text, [])
    behind = [i for i, start, _ in located if start >= len(before) + len(said) and i in chat.special.words]
    return behind[0] if behind else None


def missing_messages(chat: Chat, problem: Problem) -> list[int]:
    """Which of a problem's messages do not get into its prompt: their numbers, from 0."""

    def ids(messages: Sequence[Message]) -> list[int]:
        alone = Problem(problem.id, messages, None)
        return chat.prompt(Context.of(""), alone).tolist()  # type: ignore[no-any-return]

    whole = ids(problem.messages)
    return [
        i
        for i, message in enumerate(problem.messages)
        if message["content"].strip()
        and ids([*problem.messages[:i], {**message, "content": PROBLEMS[0]}, *problem.messages[i + 1 :]])
        == whole
    ]


def frozen(chat: Chat, date: datetime) -> Chat:
    """The chat with another date."""
    return replace(chat, template=replace(chat.template, date=date))
