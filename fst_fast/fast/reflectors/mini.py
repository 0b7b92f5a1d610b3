"""A rule-based reflector for the mini world, so that the default run needs no network and no large model.

It is a stand-in for a language model and is meant to be no better than one. It reads problem and feedback, guesses
related words, and edits one or two sentences of the context, using catalogue sentences that contain such words. It
mentions edges only if the problem has some, and revises a component by sentences about what it describes. It sees neither role nor strength of a sentence, so it proposes useless and
harmful ones as readily as helpful ones ("answer with the goal only ." also mentions the goal). The scores must find the
right combination. Other tasks need another reflector, since these sentences mean nothing there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fst_fast.mini.world import CATALOGUE, TOOL_CATALOGUE

SENTENCES: tuple[str, ...] = tuple(i.text for i in CATALOGUE)
MAX_SENTENCES = 6

# (substring of the feedback, words of related sentences); the first match counts
_TOPICS: tuple[tuple[str, frozenset[str]], ...] = (
    ("not written out", frozenset({"list", "program", "operation", "order", "show", "write", "run"})),
    ("holds a list", frozenset({"list", "number", "program", "operation", "run"})),
    ("the step", frozenset({"number", "operation", "check", "careful", "step", "skip", "list"})),
    ("not looked up", frozenset({"fact", "facts", "chain", "look", "read", "write"})),
    ("the fact", frozenset({"fact", "check", "careful", "step", "given", "make"})),
    ("too early", frozenset({"fact", "chain", "stop", "city", "follow"})),
    ("first name", frozenset({"name", "chain", "question", "first", "fact"})),
    ("was not used", frozenset({"formula", "write", "name", "think", "numbers"})),
    ("its numbers", frozenset({"number", "numbers", "quantity", "check", "careful", "mix"})),
    ("stands at option", frozenset({"option", "letter", "choose"})),
    ("one letter", frozenset({"option", "letter", "value", "answer"})),
    ("box", frozenset({"box", "boxed", "answer", "final", "mark", "write"})),
    ("wrong arm", frozenset({"goal", "start", "back", "backward", "reverse", "first", "graph", "think"})),
    ("skips", frozenset({"node", "skip", "step", "edge", "short", "check", "careful"})),
    ("does not exist", frozenset({"edge", "edges", "list", "check", "careful", "step", "read", "look"})),
    ("reversed", frozenset({"goal", "start", "reverse", "back", "path"})),
    ("goal", frozenset({"goal", "node", "path", "only", "answer"})),
    ("begins at", frozenset({"start", "first", "path", "goal"})),
    ("not called", frozenset({"tool", "call", "table", "ask", "look", "guess"})),
    ("not valid", frozenset({"call", "arguments", "next", "tool", "turn"})),
)
# (word of the problem, words that a sentence for it may contain)
_THINGS: tuple[tuple[str, frozenset[str]], ...] = (
    ("edges", frozenset({"edge", "edges", "node", "path", "goal", "graph", "list"})),
    ("facts", frozenset({"fact", "facts", "chain", "city"})),
    ("list", frozenset({"program", "operation", "list", "number"})),
    ("a", frozenset({"formula", "quantity", "option", "letter", "value", "number", "numbers"})),
)
_ON_TOPIC = 0.6  # how often a proposed sentence is related to the feedback
_TWO_EDITS = 0.3


class _Failure(Protocol):
    @property
    def problem(self) -> str: ...
    @property
    def feedback(self) -> str: ...


class _Partner(Protocol):
    @property
    def text(self) -> str: ...


class _Prompt(Protocol):
    @property
    def context(self) -> str: ...
    @property
    def component(self) -> str: ...
    @property
    def failures(self) -> Sequence[_Failure]: ...
    @property
    def partners(self) -> Sequence[_Partner]: ...


def reflect(prompt: _Prompt, rng: np.random.Generator) -> str:
    """Answer one reflection as a language model would: a remark, then the edited context in a fenced block."""
    sentences = split_sentences(prompt.context)
    if prompt.partners:
        both = _recombine(sentences, [split_sentences(partner.text) for partner in prompt.partners], rng)
        return f"I take over what the others say.\n```\n{' '.join(both)}\n```"
    remarks: list[str] = []
    shown = [(failure.problem, failure.feedback) for failure in prompt.failures] or [("", "")]
    for _ in range(2 if rng.random() < _TWO_EDITS else 1):
        problem, feedback = shown[int(rng.integers(len(shown)))]
        sentences, remark = _edit(sentences, problem, feedback, rng, prompt.component)
        remarks.append(remark)
    return f"{' '.join(remarks)}\n```\n{' '.join(sentences)}\n```"


def split_sentences(context: str) -> list[str]:
    """The sentences of a context, each with its closing full stop, if it has one."""
    return [s.strip() for s in re.findall(r"[^.]*\.|[^.]+$", context) if s.strip()]


def _recombine(
    sentences: list[str], partners: Sequence[Sequence[str]], rng: np.random.Generator
) -> list[str]:
    """The sentences, and of those that only partners have each with probability 1/2, at least one; no more than MAX_SENTENCES."""
    others = list(dict.fromkeys(s for partner in partners for s in partner if s not in sentences))
    if not others:
        return sentences
    taken = [s for s in others if rng.random() < 0.5] or [others[int(rng.integers(len(others)))]]
    return [*sentences, *taken][:MAX_SENTENCES]


def _edit(
    sentences: list[str], problem: str, feedback: str, rng: np.random.Generator, component: str
) -> tuple[list[str], str]:
    """Add (0.5), replace (0.3), drop (0.1) or move (0.1) one sentence; impossible edits become an addition or a replacement."""
    toss = rng.random()
    at = int(rng.integers(len(sentences))) if sentences else 0
    if toss >= 0.9 and len(sentences) > 1:
        rest = sentences[:at] + sentences[at + 1 :]
        to = int(rng.integers(len(rest) + 1))
        return [*rest[:to], sentences[at], *rest[to:]], f"I move {sentences[at]!r}."
    if 0.8 <= toss < 0.9 and len(sentences) > 1:
        return sentences[:at] + sentences[at + 1 :], f"I drop {sentences[at]!r}."
    new = _propose(sentences, problem, feedback, rng, component)
    if sentences and (toss >= 0.5 or len(sentences) >= MAX_SENTENCES):
        remark = f"The checker said {feedback!r}, so {new!r} takes the place of {sentences[at]!r}."
        return [*sentences[:at], new, *sentences[at + 1 :]], remark
    to = int(rng.integers(len(sentences) + 1))
    return [*sentences[:to], new, *sentences[to:]], f"The checker said {feedback!r}, so I add {new!r}."


def _propose(
    sentences: list[str], problem: str, feedback: str, rng: np.random.Generator, component: str
) -> str:
    """A sentence that is not in the context and does not mention things that the problem lacks; often one that shares a
    word with the topic of the feedback."""
    named = set(re.findall(r"[a-z]+", problem))
    here = next((things for sign, things in _THINGS if sign in named), None)
    missing = frozenset() if here is None else frozenset().union(*(things for _, things in _THINGS)) - here
    known = SENTENCES
    if "find" in named:  # hidden facts, which have sentences of their own
        known = tuple(i.text for i in TOOL_CATALOGUE if component in ("", i.part))
    absent = [s for s in known if s not in sentences and not missing & _words(s)]
    words = next((words for sign, words in _TOPICS if sign in feedback), None)
    related = [s for s in absent if words and words & _words(s)]
    pool = related if related and rng.random() < _ON_TOPIC else absent
    return pool[int(rng.integers(len(pool)))]


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text))
