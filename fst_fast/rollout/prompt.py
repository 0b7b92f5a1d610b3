"""Context + problem = prompt: the only place where text becomes the policy's input tokens.

The context goes into the system message of the tokenizer's chat template. Where the problem already has a system message the two are one:
the context first, a blank line, then the data's text. An empty context adds nothing, so the prompt is then the data's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from fst_fast.contracts import Context, Message, Problem, Rollout
from fst_fast.errors import UserError
from fst_fast.policy.attention import model_folder


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a local model folder, or the shipped one for "mini"; nothing is ever downloaded.

    Raises UserError where there is none, where it has no chat template, or where it is empty.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_folder(path), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path={str(path)!r}: its tokenizer cannot be loaded: {reason}") from error
    if not tokenizer.chat_template:
        raise _no_template(path)
    if not tokenizer.encode(
        "user", add_special_tokens=False
    ):  # what is made where a folder has no tokenizer.json
        raise UserError(
            f"model.path={str(path)!r}: its tokenizer makes no token of a text; is tokenizer.json missing?"
        )
    return tokenizer


def end_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """The token ids that end a response: the tokenizer's eos and those of the model's generation config, ascending."""
    config = getattr(model, "generation_config", None)
    found = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    ids = {
        i
        for entry in found
        if entry is not None
        for i in (entry if isinstance(entry, list | tuple) else [entry])
    }
    if not ids:
        raise UserError(
            f"model {tokenizer.name_or_path} has no eos token, in its tokenizer or its generation config; responses need one to end"
        )
    return tuple(sorted(ids))


def messages_with_context(context: Context, problem: Problem) -> list[Message]:
    """The chat messages of a prompt; the problem's own messages are left as they are."""
    messages: list[Message] = list(problem.messages)
    if not context.text:
        return messages
    if messages and messages[0]["role"] == "system":
        own = messages[0]["content"]
        return [
            {**messages[0], "content": f"{context.text}\n\n{own}" if own else context.text},
            *messages[1:],
        ]
    return [{"role": "system", "content": context.text}, *messages]


def render_prompt(tokenizer: Any, context: Context, problem: Problem) -> NDArray[np.int64]:
    """Token ids [P] of the prompt, up to where the assistant's turn begins.

    Raises UserError where the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise _no_template(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    ids = tokenizer.apply_chat_template(
        messages_with_context(context, problem), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    return np.asarray(ids, dtype=np.int64)


def _no_template(model: object) -> UserError:
    return UserError(
        f"the tokenizer of model {model} has no chat template, so a context has no system message to go into; "
        "use a model that has one, or add it to the model's folder as chat_template.jinja"
    )


class PromptCache:
    """Prompts of one tokenizer by (context id, problem id): each is rendered once while it is in use.

    A prompt of more than `max_prompt_tokens` tokens raises UserError with the names of problem and context. At most `capacity` prompts
    are kept, the oldest go first.
    """

    def __init__(self, tokenizer: Any, *, max_prompt_tokens: int, capacity: int = 65536) -> None:
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.capacity = capacity
        self._ids: dict[tuple[str, str], NDArray[np.int64]] = {}

    def ids(self, context: Context, problem: Problem) -> NDArray[np.int64]:
        """Token ids [P], read-only."""
        key = context.id, problem.id
        if key not in self._ids:
            ids = render_prompt(self.tokenizer, context, problem)
            if len(ids) > self.max_prompt_tokens:
                raise UserError(
                    f"problem {problem.id} with context {context.id} has {len(ids)} prompt tokens; "
                    f"rollout.max_prompt_tokens={self.max_prompt_tokens} allows at most {self.max_prompt_tokens}"
                )
            ids.setflags(write=False)
            if len(self._ids) >= self.capacity:
                del self._ids[next(iter(self._ids))]
            self._ids[key] = ids
        return self._ids[key]

    def of_rollouts(
        self, contexts: Sequence[Context], problems: Sequence[Problem]
    ) -> Callable[[Rollout], NDArray[np.int64]]:
        """A function from a rollout, under one of these contexts on one of these problems, to the ids of its prompt."""
        context_of = {context.id: context for context in contexts}
        problem_of = {problem.id: problem for problem in problems}
        return lambda rollout: self.ids(context_of[rollout.context_id], problem_of[rollout.problem_id])
