"""Reflections that a small model can answer (fast.reflection_style=short).

A model below a few billion parameters does not follow the long request of `ReflectionPrompt.render`: half of its replies run into the length
limit, the rest has no fence. Here each request is one of two small edits, shown by solved examples as earlier turns of the conversation,
and the reply is begun with its fence, so that all that is left to write is the text of the context:

    vary      the context and what the checker said of its failures -> a better context
    combine   two current contexts -> one that says both

The reply ends at its closing fence or where the model ends its turn. The examples are of other tasks; the latest edits of this run that
were admitted follow them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from fst_fast.contracts import Message
from fst_fast.fast.reflection import ReflectionPrompt
from fst_fast.fast.request import cut

FENCE = "```"
SYSTEM = "You write instructions."
TEMPERATURE = 0.8
"""At 1 the wording wanders and repetitions are hardly fewer: 13 instead of 15 of 24 replies (Qwen2.5-Coder-0.5B, short_answers)."""
SHOWN_CHARS = 300
"""A feedback or an accepted response longer than this is shown with its middle left out."""
SHOWN_FAILURES = 3
"""The failures that came closest to the full reward: what is said of them is least about their problems."""
SAME_WORDS = 3
"""Sentences of feedback that begin with as many equal words are one complaint."""
COMBINE = 0.25
"""How often two contexts are combined, where there are two."""

EXAMPLES = (
    (
        ("Write a title.", ["The response must be in quotation marks.", "It must have no other text."], '"A Walk in the Rain"'),
        'Write a title in quotation marks, for example "A Walk in the Rain", and no other text.',
    ),
    (
        ("Translate the sentence.", ['The translation must be French, it is ...'], ""),
        "Translate the sentence into French.",
    ),
    (
        ("List some animals.", ["The response must have exactly 5 lines, it has ...", "The word cat is not allowed."], ""),
        "List some animals on exactly 5 lines. Do not use the word cat.",
    ),
)  # fmt: skip
COMBINED = (
    (("Write a title in quotation marks.", "Write a title of three words."), "Write a title of three words in quotation marks."),
    (
        ("Translate into French.", "Give the translation and nothing else."),
        "Translate into French and write nothing but the translation.",
    ),
)  # fmt: skip


BEGUN = f"{FENCE}\n"


def whole(continuation: str, *, ended: bool) -> str:
    """The reply as text; its block is closed where the model ended its turn inside."""
    return f"{BEGUN}{continuation}" + (f"\n{FENCE}" if ended and FENCE not in continuation else "")


def conversation(prompt: ReflectionPrompt, seed: int) -> list[Message]:
    """The request for one edit, up to the beginning of its reply. The kind of the edit follows from the seed."""
    rng = np.random.default_rng(seed)
    if prompt.partners or (prompt.others and rng.random() < COMBINE):
        others = [partner.text for partner in prompt.partners] or prompt.others
        other = others[int(rng.integers(len(others)))]
        solved = [(_pair(*pair), both) for pair, both in COMBINED]
        return _asked(solved, _pair(prompt.context, other))
    solved = [(_case(*case), after) for case, after in EXAMPLES]
    solved += [
        (_case(lesson.before, complaints(lesson.feedback), ""), lesson.after) for lesson in prompt.lessons
    ]
    closest = sorted(prompt.failures, key=lambda failure: -failure.reward)[:SHOWN_FAILURES]
    said = complaints([f.feedback or f"The reward is {f.reward:g}." for f in closest])
    accepted = prompt.successes[int(rng.integers(len(prompt.successes)))].response if prompt.successes else ""
    return _asked(solved, _case(prompt.context, said, accepted))


def complaints(feedback: Sequence[str]) -> list[str]:
    """The sentences of several feedbacks, each once. Where some begin with the same words and go on differently, the difference belongs to
    their problems: what they share is kept, then "..."."""
    merged: dict[tuple[str, ...], list[str]] = {}
    for sentence in (s for text in feedback for s in re.split(r"(?<=[.!?;])\s+", text.strip()) if s):
        words = cut(sentence, SHOWN_CHARS).split()
        key = tuple(words[:SAME_WORDS])
        if key in merged and words != merged[key]:
            shared = [
                a
                for a, b in itertools.takewhile(
                    lambda pair: pair[0] == pair[1], zip(words, merged[key], strict=False)
                )
            ]
            merged[key] = [*shared, "..."]
        else:
            merged[key] = words
    return [" ".join(words) for words in merged.values()]


def _case(context: str, said: Sequence[str], accepted: str) -> str:
    lines = "\n".join(f"- {text}" for text in said)
    good = f"It accepts this response: {cut(accepted, SHOWN_CHARS)}\n" if accepted else ""
    # The context at the end would be copied as it is, and so would these words behind it.
    return f"Current instruction: {context}\nThe checker rejects the responses. It says:\n{lines}\n{good}Write the better instruction."


def _pair(first: str, second: str) -> str:
    return f"Instruction A: {first}\nInstruction B: {second}\nWrite one instruction that says both."


def _asked(solved: Sequence[tuple[str, str]], request: str) -> list[Message]:
    """Solved requests as earlier turns, the request, and the reply's beginning."""
    turns = [(asked, f"{BEGUN}{context}\n{FENCE}") for asked, context in solved]
    return [
        {"role": role, "content": text}
        for asked, reply in [*turns, (request, BEGUN)]
        for role, text in (("user", asked), ("assistant", reply))
    ]
