"""A context of named components is one text, in which each component stands behind a line with its name:

    <<system>>
    Answer with the number only.
    <<tool:search>>
    Search the handbook. Use words of the question.

So its hash, its lineage, its checkpoint, the report and the export are those of any context. Where they go in a prompt: `tool:NAME` is the
description of that tool; all others (system, protocol, skill:NAME, examples) follow each other in the system message. Only a run with
fast.components reads contexts in this way. In other runs a context is one text, whatever it spells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NAME = r"(?:system|protocol|examples|skill:[\w.-]+|tool:[\w.-]+)"
NAMES = "system, protocol, examples, skill:NAME, tool:NAME"
_HEAD = re.compile(rf"^<<({NAME})>>$", re.MULTILINE)


def compose(components: Mapping[str, str]) -> str:
    """The text of a context, its components in their order. No component may hold a line that names one (`names_one`)."""
    return "\n".join(f"<<{name}>>\n{text}" for name, text in components.items())


def components_of(text: str) -> dict[str, str]:
    """The components of a text that `compose` made, in their order."""
    pieces = _HEAD.split(f"{text}\n")[1:]
    return {name: body[1:-1] for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


def names_one(text: str) -> bool:
    """Whether a component's text holds a line that names a component."""
    return _HEAD.search(text) is not None


def system_text(components: Mapping[str, str]) -> str:
    """What of the components stands in the system message."""
    return "\n\n".join(t for name, t in components.items() if not name.startswith("tool:") and t)
