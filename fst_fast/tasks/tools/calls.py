"""The tool calls in a response, in the syntax that the model's chat template teaches it. Reading is strict: nothing is repaired.

A syntax is one function from the response to its calls, and one line in SYNTAXES. What is wrong with a call is one sentence, which the
model gets as an observation. Thoughts before </think> are not read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fst_fast.errors import one_line

MOST_CALLS = 16  # in one response


class CallError(Exception):
    """What is wrong with the tool calls of a response, as one sentence of at most 500 characters."""

    def __init__(self, sentence: str) -> None:
        super().__init__(one_line(sentence)[:500])


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]


def read_calls(response: str, syntax: str) -> list[Call]:
    """The calls of a response in the order in which they stand; none where it calls no tool. Raises CallError."""
    calls = SYNTAXES[syntax](response.rpartition("</think>")[2])
    if len(calls) > MOST_CALLS:
        raise CallError(f"there are {len(calls)} tool calls; at most {MOST_CALLS} are taken at once")
    return calls


def syntax_of(template: str) -> str | None:
    """The syntax that a chat template's source shows, or None."""
    if "<tool_call>" in template and "<function=" not in template:
        return "hermes"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<|python_tag|>" in template or ('"parameters"' in template and "ipython" in template):
        return "llama3"
    return None


def _hermes(text: str) -> list[Call]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>, several behind each other: Hermes, Qwen2.5, Qwen3."""
    pieces = re.split(r"(</?tool_call>)", text)
    calls, at = [], 1
    while at < len(pieces):
        if pieces[at] != "<tool_call>":
            raise CallError("a </tool_call> stands without its <tool_call>")
        if at + 2 >= len(pieces) or pieces[at + 2] != "</tool_call>":
            raise CallError("a <tool_call> is not closed by </tool_call>")
        calls.append(_call(_json(pieces[at + 1]), "arguments"))
        at += 4
    return calls


def _llama3(text: str) -> list[Call]:
    """The whole response is {"name": ..., "parameters": {...}}, maybe behind <|python_tag|>: Llama 3.1 and later."""
    plain = text.strip()
    tagged = plain.startswith("<|python_tag|>")
    if not tagged and not re.match(r'\{\s*"name"', plain):
        return []
    return [_call(_json(plain.removeprefix("<|python_tag|>")), "parameters")]


def _mistral(text: str) -> list[Call]:
    """[TOOL_CALLS] and a list of {"name": ..., "arguments": {...}}: Mistral."""
    _, tag, behind = text.partition("[TOOL_CALLS]")
    if not tag:
        return []
    listed = _json(behind)
    if not isinstance(listed, list) or not listed:
        raise CallError("behind [TOOL_CALLS] must stand a JSON list of calls")
    return [_call(item, "arguments") for item in listed]


SYNTAXES: dict[str, Callable[[str], list[Call]]] = {
    "hermes": _hermes,
    "llama3": _llama3,
    "mistral": _mistral,
}


def _call(tree: Any, key: str) -> Call:
    if not isinstance(tree, dict):
        raise CallError(f"a tool call must be a JSON object with the keys name and {key}")
    if set(tree) - {"name", key, "id"} or "name" not in tree:
        raise CallError(
            f"a tool call has the keys {', '.join(tree) or '(none)'}; they must be name and {key}"
        )
    name, arguments = tree["name"], tree.get(key, {})
    if not isinstance(name, str):
        raise CallError(f"the name of a tool call is {json.dumps(name)[:60]}; it must be a text")
    if not isinstance(arguments, dict):
        raise CallError(f"the {key} of the call of {name[:60]} must be a JSON object")
    return Call(name, arguments)


def _json(text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        if len(set(names)) < len(names):
            raise ValueError("a key is given twice")
        return dict(items)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise CallError("the tool call is nested too deep") from None
    except ValueError as error:
        raise CallError(f"the tool call is not valid JSON: {error}") from None
