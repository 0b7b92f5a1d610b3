"""The request to a language model that reflects: the text to be revised, its failures turn by turn, and what to write.

What the text is and what makes a good one differs by component (KINDS). fast.reflection_templates replaces a request by a file of the user.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fst_fast.errors import UserError

if TYPE_CHECKING:
    from fst_fast.fast.reflection import Failure, ReflectionPrompt

PLACEHOLDER = "(the revised instruction)"
SHOWN_CHARS = 4000
"""A problem, a response or a feedback longer than this is shown with its middle left out; the turns of an episode share it."""
SHOWN_TURN_CHARS = 300
"""What of a message of an episode is shown at least."""
SHOWN_MESSAGES = 24
"""Messages of an episode that are shown, half of them from its end."""

KINDS = {
    "tool": (
        "the description of a tool that it may call",
        "Say what the tool does, when to call it and when not, and what its arguments must look like. Its name and its arguments are "
        "fixed. Look in the failures for calls that are missing, wrong or wasted.",
    ),
    "protocol": (
        "the part that says in which order it proceeds",
        "Say what to do first, what after each answer of the environment, and when to stop. Look in the failures for the turn at which "
        "the episode went wrong.",
    ),
    "skill": (
        "the part that teaches one skill",
        "Keep to this one skill: the facts and the method that it needs. What belongs to another part stays out.",
    ),
    "examples": (
        "the part that shows solved examples",
        "Give few and short examples, in exactly the form that the checker accepts, of other problems than those above.",
    ),
    "": ("one part of it", ""),
}
"""By the kind of a component: what the model is told that it is, and how to revise it."""

_SLOT = re.compile(r"\{(context|failures|component|whole)\}")


def kind_of(component: str) -> str:
    """`tool` of `tool:search`."""
    return component.partition(":")[0]


def render(prompt: ReflectionPrompt) -> str:
    """The request as text."""
    shown = "\n\n".join(_failure(i, failure) for i, failure in enumerate(prompt.failures, 1))
    if prompt.template:
        slots = {
            "context": prompt.context,
            "failures": shown,
            "component": prompt.component,
            "whole": prompt.whole or prompt.context,
        }
        return _SLOT.sub(lambda slot: slots[slot[1]], prompt.template)
    what, how = KINDS.get(kind_of(prompt.component), KINDS[""])
    read = (
        f"Before each problem it reads an instruction of several parts:\n\n{prompt.whole}\n\nYou revise {what}, "
        f"{prompt.component}, and nothing else:\n\n"
        if prompt.component
        else "Before each problem it reads this instruction:\n\n"
    )
    response = (
        "what it and its environment said in every turn"
        if any(failure.turns for failure in prompt.failures)
        else "the model's response"
    )
    return (
        f"A language model solves problems of one kind. {read}<instruction>\n{prompt.context}\n</instruction>\n\n{_recombination(prompt)}"
        "With this instruction it did not get the full reward (1.0) on the following problems. For each you see the problem, "
        f"{response}, the reward, and what the checker said.\n\n"
        f"{shown}\n\n"
        "Find out what these failures have in common: what the model did not know, did not do, or did in the wrong form. Then "
        "write a revised instruction that prevents them. It must help with other problems of the same kind, so state general "
        "methods, facts and output formats, and do not repeat the answers of the problems above. Keep what already works. Be "
        f"brief and concrete.{' ' * bool(how and prompt.component)}{how if prompt.component else ''}\n\n"
        "End with the complete revised instruction, and nothing else, between two lines of three backticks:\n"
        f"```\n{PLACEHOLDER}\n```\n"
        "If the instruction itself holds such lines, put it between two lines of four backticks."
    )


def _recombination(prompt: ReflectionPrompt) -> str:
    """What the request says of the partners; "" without any."""

    def best(problems: Sequence[str]) -> str:
        shown = "\n".join(f"- {cut(problem, SHOWN_CHARS)}" for problem in problems)
        return f"It does best on these problems:\n{shown}\n\n" if problems else ""

    if not prompt.partners:
        return ""
    others = "".join(
        f"<instruction>\n{p.text}\n</instruction>\n\n{best(p.problems)}" for p in prompt.partners
    )
    return (
        f"{best(prompt.solved)}Other instructions for the same model:\n\n{others}"
        "Take over from them what makes them better on their problems.\n\n"
    )


def load_templates(files: Mapping[str, str]) -> dict[str, str]:
    """The texts of fast.reflection_templates by their names. Raises UserError."""
    texts = {}
    for name, file in files.items():
        where = f"fast.reflection_templates.{name}={file}"
        try:
            texts[name] = Path(file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{where} cannot be read: {type(error).__name__}") from error
        for slot in ("{context}", "{failures}"):
            if slot not in texts[name]:
                raise UserError(f"{where} does not hold {slot}, in whose place it is shown")
    return texts


def template_for(templates: Mapping[str, str], component: str) -> str:
    """The template of a component: its own, that of its kind, else that of `context`; "" where there is none."""
    names = (component, kind_of(component), "context")
    return next((templates[name] for name in names if name in templates), "")


def _failure(number: int, failure: Failure) -> str:
    said = (
        f"<episode>\n{_turns(failure)}\n</episode>"
        if failure.turns
        else f"<response>\n{cut(failure.response, SHOWN_CHARS)}\n</response>"
    )
    return (
        f"## Failure {number}\n"
        f"<problem>\n{cut(failure.problem, SHOWN_CHARS)}\n</problem>\n"
        f"{said}\n"
        f"Reward: {failure.reward:g}\n"
        f"Checker: {cut(failure.feedback, SHOWN_CHARS) or '(no comment)'}"
    )


def _turns(failure: Failure) -> str:
    """Every message of an episode under a line that says who speaks in which turn."""
    each = max(SHOWN_TURN_CHARS, SHOWN_CHARS // min(len(failure.turns), SHOWN_MESSAGES))
    turn, lines = 0, []
    for message in failure.turns:
        turn += message["role"] == "assistant"
        who = {"assistant": "the model", "tool": f"tool {message.get('name', '')}".rstrip()}
        speaker = who.get(message["role"], "the environment")
        lines.append(f"[turn {turn}, {speaker}]\n{cut(message['content'], each)}")
    left = len(lines) - SHOWN_MESSAGES
    if left > 0:
        half = SHOWN_MESSAGES // 2
        lines[half:-half] = [f"[... {left} messages left out ...]"]
    return "\n".join(lines)


def cut(text: str, chars: int) -> str:
    """The text with its middle left out where it is longer than `chars`."""
    if len(text) <= chars:
        return text
    head = chars * 2 // 3
    tail = chars - head
    return f"{text[:head]}\n[... {len(text) - chars} characters left out ...]\n{text[len(text) - tail :]}"
