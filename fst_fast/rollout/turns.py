"""The tokens of an episode: what an environment says is appended to what was sampled, and nothing sampled is ever tokenised again.

    prompt | response 1 | what the template writes behind it, the observation, the opening of the next turn | response 2 | ...

The template's pieces come from rendering the conversation with a placeholder in place of the response: what stands behind the placeholder
is what the observation adds. The text of observations never becomes a special token (special_tokens.py). A template that only ever appends
gives the same ids as rendering the whole conversation; some rewrite earlier turns (Qwen3 and DeepSeek-R1 leave out the thoughts), which
rollout.history decides about: `keep` goes on from the tokens as they were sampled, `split` from the template's rendering of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fst_fast.contracts import Message, Rollout
from fst_fast.errors import UserError
from fst_fast.forest import Leaf
from fst_fast.rollout.prompt import Chat

Ints = NDArray[np.int64]
_RESPONSE = "\U0010fff2"  # a private-use character in place of a response


def observation_ids(
    chat: Chat,
    opening: Sequence[Message],
    observation: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    last: int,
) -> Ints:
    """The ids [A] that an observation adds behind a response whose last token is `last`, up to where the next response begins.

    opening: the messages of the prompt. Raises UserError where the template does not take the observation."""
    before = [*({**m, "content": "x"} for m in opening), {"role": "assistant", "content": _RESPONSE}]

    def behind(messages: Sequence[Message]) -> str:
        return _behind(chat, [*before, *messages], tools)

    text = behind(observation)
    for i, message in enumerate(observation):
        other = [*observation[:i], {**message, "content": message["content"] + "x"}, *observation[i + 1 :]]
        if behind(other) == text:
            raise UserError(f"the chat template leaves out a message of the role {message['role']!r}")
    # A special token in front keeps a tokenizer from putting a blank there.
    front = "" if text.startswith(tuple(chat.special.words.values())) else str(chat.tokenizer.eos_token)
    ids = np.asarray(chat.encode(observation, lambda shown: front + behind(shown)), dtype=np.int64)
    if front:
        ids = ids[1:]
    ended = len(ids) and ids[0] == last and last in chat.special.words  # the response ended itself
    return ids[1:] if ended else ids


def _behind(chat: Chat, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
    """What the template writes behind the placeholder in one of the messages. Raises UserError where it does not write that."""
    _, response, text = chat.template.render(messages, tools=tools).partition(_RESPONSE)
    if not response:
        raise UserError("the chat template leaves out the assistant's message")
    return text


def rendered_ids(
    chat: Chat,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    responses: Mapping[int, Sequence[int]],
) -> Ints:
    """The ids of the whole conversation as the template writes it now. responses: the ids of the policy's by their place among the
    messages, the end token left out; special tokens in one stay what they are where its text spells no others."""
    own = [
        place
        for place, ids in responses.items()
        if chat.special.sequence(
            chat.tokenizer(messages[place]["content"], add_special_tokens=False)["input_ids"]
        )
        == chat.special.sequence(ids)
    ]
    return np.asarray(chat.ids(messages, tools, own), dtype=np.int64)


def rewritten_turns(chat: Chat, opening: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
    """What of an earlier turn the chat template writes in another way when the conversation goes on: "its thoughts", "its text", or ""."""
    for text, what in (("amber", "its text"), ("<think>\nlanterns\n</think>\n\namber", "its thoughts")):
        response, placeholder = ({"role": "assistant", "content": said} for said in (text, _RESPONSE))
        further = {"role": "user", "content": "hum"}
        appended = chat.text(opening, tools) + text + _behind(chat, [*opening, placeholder, further], tools)
        if appended != chat.text([*opening, response, further], tools):
            return what
    return ""


def leaves_of(prompt: Ints, rollout: Rollout) -> list[tuple[Leaf, NDArray[np.float32]]]:
    """The training sequences of a rollout with the log-probs of their response tokens, 0 for those that were not sampled; every sampled
    token is a label once. One sequence, unless an episode's past was rewritten; none without a token. prompt: of a rollout without turns."""
    if not rollout.turns:
        whole = Leaf(prompt, rollout.response_ids), rollout.logprobs.astype(np.float32)
        return [whole] if len(rollout.response_ids) else []
    # prompt, then added and sampled in turn
    pieces: list[tuple[Ints, list[Ints], list[NDArray[np.float32]]]] = []
    ids = np.empty(0, np.int64)
    at = 0
    for turn in rollout.turns:
        if not turn.length:
            continue
        span = slice(at, at + turn.length)
        response, logprobs = rollout.response_ids[span], rollout.logprobs[span].astype(np.float32)
        at += turn.length
        read = np.concatenate([ids[: turn.kept], turn.added])
        if pieces and turn.kept == len(ids):
            pieces[-1][1].extend((turn.added, response))
            pieces[-1][2].extend((np.full(len(turn.added), np.nan, np.float32), logprobs))
        else:
            pieces.append((read, [response], [logprobs]))
        ids = np.concatenate([read, response])
    leaves = []
    for first, tokens, values in pieces:
        logprob = np.concatenate(values)
        sampled = ~np.concatenate([np.full(len(v), i % 2 == 1) for i, v in enumerate(values)])
        leaf = Leaf(first, np.concatenate(tokens), None if sampled.all() else sampled)
        leaves.append((leaf, np.where(sampled, logprob, np.float32(0))))
    return leaves
