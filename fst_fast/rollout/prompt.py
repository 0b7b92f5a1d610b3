"""Context + problem = prompt: the only place where text becomes the policy's input tokens.

The context goes into the system message of the chat template. Where the problem already has a system message the two are one: the context
first, a blank line, then the data's text. An empty context adds nothing, so the prompt is then the data's own. For a template that takes no
system message all of it goes before the first user message instead (model.system). template.py checks the template when a run starts.

The template's own text makes special tokens; the text of messages never does (special_tokens.py).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from fst_fast.config.components import components_of, system_text
from fst_fast.contracts import Context, Message, Problem, Rollout
from fst_fast.errors import UserError
from fst_fast.policy.base_model import first_line, model_folder
from fst_fast.rollout.chat_template import ChatTemplate
from fst_fast.rollout.special_tokens import Span, SpecialTokens

System = Literal["system", "user"]
ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "ipython", "observation", "environment"}
)
"""What a message's role may be: templates write it into their markup."""
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"  # private-use characters that mark a text in a rendered prompt


def load_tokenizer(
    path: str | Path,
    *,
    revision: str | None = None,
    key: str = "model.path",
    trust_remote_code: bool = False,
    chat_template: str | Path | None = None,
) -> Any:
    """The tokenizer of a model. path, revision: as `model.path` and `model.revision`, or with that key as `model.tokenizer`.

    chat_template: a file that replaces its own template. Raises UserError where there is no tokenizer, where it has no chat template, or
    where it is empty.
    """
    where = f"{key}={str(path)!r}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder(path, revision, key=key, weights=False),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"{where}: its tokenizer cannot be loaded: {first_line(error)}; model.tokenizer can name another"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    # what is made where a folder has no tokenizer.json
    if not tokenizer.encode("user", add_special_tokens=False):
        raise UserError(
            f"{where}: its tokenizer makes no token of a text; is tokenizer.json missing? model.tokenizer can name another"
        )
    if not tokenizer.chat_template:
        raise _no_template(path)
    return tokenizer


def read_template(path: str | Path) -> str:
    """The text of the file that model.chat_template names. Raises UserError."""
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"model.chat_template={str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"model.chat_template={str(path)!r} is not a text in UTF-8") from error
    if not text.strip():
        raise UserError(f"model.chat_template={str(path)!r} is empty")
    return text


def end_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """The token ids that end a response: the tokenizer's eos and those of the model's generation config, ascending."""
    ids: set[int] = set()
    for found in (tokenizer.eos_token_id, getattr(generation_config, "eos_token_id", None)):
        if found is not None:
            ids.update(found if isinstance(found, list | tuple) else [found])
    if not ids:
        raise UserError(
            f"model {tokenizer.name_or_path} has no eos token, in its tokenizer or its generation config; responses need one to end"
        )
    return tuple(sorted(ids))


def response_text(tokenizer: Any, ids: Sequence[int] | NDArray[np.int64], ends: Collection[int]) -> str:
    """A response as graders and reflectors read it: without the end tokens `ends` that close it, with every other token, special or not."""
    kept = [int(i) for i in ids]
    while kept and kept[-1] in ends:
        kept.pop()
    return str(tokenizer.decode(kept, skip_special_tokens=False))


def messages_with_context(context: Context, problem: Problem, system: System = "system") -> list[Message]:
    """The chat messages of a prompt; the problem's own messages are left as they are.

    system="user": there is no system message, its text goes before the first user message. Raises UserError where there is none."""
    messages: list[Message] = list(problem.messages)
    parts = [context.text]
    if messages and messages[0].get("role") == "system":
        if not context.text and system == "system":
            return messages
        parts.append(messages[0]["content"])
        rest, first = messages[1:], messages[0]
    else:
        rest, first = messages, {"role": "system", "content": ""}
    text = "\n\n".join(part for part in parts if part)
    if system == "system":
        return [{**first, "content": text}, *rest] if text else rest
    if not text:
        return rest
    at = next((i for i, message in enumerate(rest) if message.get("role") == "user"), None)
    if at is None:
        raise UserError(
            f"problem {problem.id} has no user message, and the chat template takes no system message: there is no place for a context"
        )
    own = rest[at]["content"]
    folded = {**rest[at], "content": f"{text}\n\n{own}" if own else text}
    return [*rest[:at], folded, *rest[at + 1 :]]


@dataclass(frozen=True)
class Chat:
    """A tokenizer, its chat template, and where a context goes."""

    tokenizer: Any
    template: ChatTemplate
    special: SpecialTokens = field(repr=False)
    system: System = "system"

    @classmethod
    def of(cls, tokenizer: Any, *, system: System = "system", **how: Any) -> Chat:
        """how: variables, date and where of the ChatTemplate. Raises UserError where the tokenizer has no chat template."""
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "chat_template", None):
            raise _no_template(name)
        try:
            source = tokenizer.get_chat_template()
        except ValueError as error:  # several by name, none of them the default
            raise UserError(
                f"the tokenizer of model {name}: {str(error).splitlines()[0]}; name one file by model.chat_template"
            ) from error
        variables = {**tokenizer.special_tokens_map, **how.pop("variables", {})}
        return cls(
            tokenizer, ChatTemplate(source, variables, **how), SpecialTokens(tokenizer, source), system
        )

    def with_system(self, system: System) -> Chat:
        return replace(self, system=system)

    def prompt(
        self, context: Context, problem: Problem, tools: Sequence[Mapping[str, Any]] = ()
    ) -> NDArray[np.int64]:
        """Token ids [P] of the prompt, up to where the assistant's turn begins, or to the end of the last message where that is the
        assistant's, which the response then continues. Raises UserError."""
        try:
            _check(problem.messages)
            messages = messages_with_context(context, problem, self.system)
            return np.asarray(self.ids(messages, tools), dtype=np.int64)
        except UserError as error:
            if not problem.id or problem.id in str(error):
                raise
            raise UserError(f"problem {problem.id}: {error}") from error

    def text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The prompt as the string that is encoded."""
        _check(messages)
        last = bool(messages) and messages[-1]["role"] == "assistant"
        return self.template.render(messages, tools=tools, continue_last=last)

    def ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        own: Collection[int] = (),
    ) -> list[int]:
        """The prompt's token ids. Where no message spells a special token they are those of `text(messages)`.

        own: the places of messages whose special tokens the policy has sampled, so that they stay special tokens."""
        return self.encode(messages, lambda shown: self.text(shown, tools), own)

    def encode(
        self,
        messages: Sequence[Message],
        render: Callable[[Sequence[Message]], str],
        own: Collection[int] = (),
    ) -> list[int]:
        """The ids of `render(messages)`, in which no text of the messages but those of `own` becomes a special token."""
        text = render(messages)
        suspects = [
            s
            for i, m in enumerate(messages)
            for key, s in m.items()
            if key != "role" and i not in own and self._touches(s)
        ]
        if not suspects:
            return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        # What the template writes whatever the messages say: the same messages, the suspect texts replaced by a harmless one.
        harmless = render(_each_text(messages, lambda s: "x" if s in suspects else s, own))
        wanted = self.special.sequence(self.tokenizer(harmless, add_special_tokens=False)["input_ids"])
        for spans in self._places(messages, text, suspects, render, own):
            ids = self.special.encode(text, spans)
            if self.special.sequence(ids) == wanted:
                return ids
        why = (
            "the chat template changes it so that it cannot be told from the template's own"
            if self.special.backend is not None
            else f"a tokenizer of the class {type(self.tokenizer).__name__} cannot encode it as text; use one with a tokenizer.json"
        )
        raise UserError(
            f"the text {min(suspects, key=len)[:60]!r} spells a special token, and {why}, or take the token out of the text"
        )

    def _touches(self, value: object) -> bool:
        return isinstance(value, str) and self.special.touches(value)

    def _places(
        self,
        messages: Sequence[Message],
        text: str,
        suspects: list[str],
        render: Callable[[Sequence[Message]], str],
        own: Collection[int],
    ) -> list[list[Span]]:
        """Where the suspect texts are in the rendered text, from the first of these ways that finds them, then nowhere.

        The text is rendered once more with marks inside the white space at its ends, which a template may trim; a template that looks at the
        text itself (Qwen3 cuts at </think>) then writes something else, and the marks go around every special token that is spelt, with the
        white space beside it, which the template may trim where it cuts."""

        def mark_whole(s: str) -> str:
            return _wrap(s) if s in suspects else s

        longest_first = sorted(self.special.words.values(), key=len, reverse=True)
        spelt = re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first))})\s*")

        def mark_words(s: str) -> str:
            inner = s.strip()
            if s not in suspects or not inner:
                return s
            return s.replace(inner, spelt.sub(rf"{_OPEN}\g<0>{_CLOSE}", inner), 1)

        if self.special.backend is None:
            return [[]]
        found = []
        for mark in (mark_whole, mark_words):
            spans, plain = _marked(render(_each_text(messages, mark, own)))
            if plain == text:
                found.append(spans)
        return [*found, []]

    def pieces(self, messages: Sequence[Message]) -> list[tuple[int, str, str]]:
        """(id, its characters, whose) of every token of a prompt. whose: the role of the message that wrote it, "special", or "template"."""
        text, ids = self.text(messages), self.ids(messages)
        if self.special.backend is None:
            return [(i, str(self.tokenizer.decode([i])), "special" if i in self.special.words else "?") for i in ids]  # fmt: skip
        whose = ["template"] * len(text)
        written: list[Span] = []
        for message in messages:
            spans, plain = _marked(
                self.text([{**m, "content": _wrap(m["content"])} if m is message else m for m in messages])
            )
            for start, end in spans if plain == text else []:
                whose[start:end] = [message["role"]] * (end - start)
                written.append((start, end))
        located = self.special.locate(text, [])
        if [number for number, _, _ in located] != ids:
            located = self.special.locate(text, written)
        return [
            (
                number,
                text[start:end],
                "special" if number in self.special.words and number != self.special.unknown else (whose[start] if start < len(whose) else "template"),
            )
            for number, start, end in located
        ]  # fmt: skip


def _wrap(text: str) -> str:
    inner = text.strip()
    return text.replace(inner, f"{_OPEN}{inner}{_CLOSE}", 1) if inner else text


def _check(messages: Sequence[Message]) -> None:
    """Raise UserError where a message is none."""
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(f"a message has the role {role!r}; allowed are {', '.join(sorted(ROLES))}")
        if not isinstance(content, str):
            raise UserError(f"the content of a message is {type(content).__name__}; it must be a text")


def _each_text(
    messages: Sequence[Message], change: Callable[[str], str], own: Collection[int]
) -> list[Message]:
    """The messages, every text changed but the roles and the messages at the places `own`."""
    return [
        m if i in own else {k: change(v) if k != "role" and isinstance(v, str) else v for k, v in m.items()}
        for i, m in enumerate(messages)
    ]


def _marked(text: str) -> tuple[list[Span], str]:
    """The spans between marks, as positions in the text without the marks, and that text. A mark without its partner is dropped."""
    spans: list[Span] = []
    kept: list[str] = []
    length, opened = 0, -1
    for character in text:
        if character == _OPEN:
            opened = length
        elif character == _CLOSE:
            if opened >= 0:
                spans.append((opened, length))
            opened = -1
        else:
            kept.append(character)
            length += 1
    return spans, "".join(kept)


def _no_template(model: object) -> UserError:
    return UserError(
        f"the tokenizer of model {model} has no chat template, so a context has no system message to go into; "
        "use a model that has one, or add it to the model's folder as chat_template.jinja or by model.chat_template"
    )


class Opening(NamedTuple):
    """What an environment begins the episodes of a problem with; tools: schemas of functions."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]


class PromptCache:
    """Prompts by (context id, problem id): each is rendered once while it is in use.

    A prompt of more than `max_prompt_tokens` tokens raises UserError with the names of problem and context. At most `capacity` prompts
    are kept, the oldest go first. openings: asks the environment of the run for openings, or for why there is none; None for a task.
    """

    def __init__(self, chat: Chat, *, max_prompt_tokens: int, capacity: int = 65536) -> None:
        self.chat = chat
        self.max_prompt_tokens = max_prompt_tokens
        self.capacity = capacity
        self.components = False  # contexts are made of components (fast.components)
        self.openings: Callable[[Sequence[Problem]], list[Opening | str]] | None = None
        self._openings: dict[str, Opening] = {}
        self._takes_tools = False  # not known yet
        self._ids: dict[tuple[str, str], NDArray[np.int64]] = {}
        self._changing = threading.Lock()  # rollouts ahead are sampled in a thread of their own

    def ids(self, context: Context, problem: Problem) -> NDArray[np.int64]:
        """Token ids [P], read-only."""
        key = context.id, problem.id
        ids = self._ids.get(key)
        if ids is None:
            ids = self.prompt(context, problem)
            if len(ids) > self.max_prompt_tokens:
                raise UserError(
                    f"problem {problem.id} with context {context.id} has {len(ids)} prompt tokens; "
                    f"rollout.max_prompt_tokens={self.max_prompt_tokens} allows at most {self.max_prompt_tokens}"
                )
            ids.setflags(write=False)
            with self._changing:
                if len(self._ids) >= self.capacity:
                    del self._ids[next(iter(self._ids))]
                self._ids[key] = ids
        return ids

    def prompt(self, context: Context, problem: Problem) -> NDArray[np.int64]:
        """As `ids`, of any length, and not kept."""
        if self.openings is None and not self.components:
            return self.chat.prompt(context, problem)
        opened, shown, tools = self.parts(context, problem)
        ids = self.chat.prompt(shown, opened, tools)
        if tools and not self._takes_tools:
            self._takes_tools = ids.tolist() != self.chat.prompt(shown, opened).tolist()
            if not self._takes_tools:
                raise UserError(f"{self.chat.template.where} leaves tools out, and the task has {len(tools)}")
        return ids

    def parts(
        self, context: Context, problem: Problem
    ) -> tuple[Problem, Context, Sequence[Mapping[str, Any]]]:
        """What a prompt is made of: the problem with its opening messages, what of the context stands in the system message, and the tools
        as the context describes them. Raises UserError where it describes a tool that is not there."""
        messages, tools = self.opening(problem)
        opened = replace(problem, messages=messages)
        if not self.components:
            return opened, context, tools
        components = components_of(context.text)
        described = {n.removeprefix("tool:"): text for n, text in components.items() if n.startswith("tool:")}
        names = [tool["function"]["name"] for tool in tools]
        if missing := [name for name in described if name not in names]:
            there = f"it has {', '.join(names)}" if names else "it has no tools"
            raise UserError(
                f"fast.components describes the tool {missing[0]!r}, which the task has not; {there}"
            )
        tools = [
            {**tool, "function": {**tool["function"], "description": described.get(name, tool["function"].get("description", ""))}}
            for tool, name in zip(tools, names, strict=True)
        ]  # fmt: skip
        return opened, replace(context, text=system_text(components)), tools

    def opening(self, problem: Problem) -> Opening:
        """The messages and tools that the prompt of a problem is made of. Raises UserError where its environment gives none."""
        if self.openings is None:
            return Opening(problem.messages, ())
        if problem.id not in self._openings:
            [found] = self.openings([problem])
            if isinstance(found, str):
                raise UserError(f"problem {problem.id}: {found}")
            self.know(problem, found)
        return self._openings[problem.id]

    def know(self, problem: Problem, opening: Opening) -> bool:
        """Keep the opening of a problem; whether it is the one that was known, if one was."""
        if len(self._openings) >= self.capacity:
            del self._openings[next(iter(self._openings))]
        return self._openings.setdefault(problem.id, opening) == opening

    def openable(self, problems: Sequence[Problem]) -> list[Problem]:
        """Those of `problems` that have an opening; all new ones are asked for at once."""
        if self.openings is None:
            return list(problems)
        new = [p for p in {p.id: p for p in problems}.values() if p.id not in self._openings]
        for problem, found in zip(new, self.openings(new), strict=True):
            if not isinstance(found, str):
                self.know(problem, found)
        return [problem for problem in problems if problem.id in self._openings]

    def of_rollouts(
        self, contexts: Sequence[Context], problems: Sequence[Problem]
    ) -> Callable[[Rollout], NDArray[np.int64]]:
        """A function from a rollout, under one of these contexts on one of these problems, to the ids of its (first) prompt."""
        context_of = {context.id: context for context in contexts}
        problem_of = {problem.id: problem for problem in problems}
        return lambda rollout: (
            rollout.turns[0].added
            if rollout.turns
            else self.ids(context_of[rollout.context_id], problem_of[rollout.problem_id])
        )
