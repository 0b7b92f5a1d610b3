"""Episodes in a verifying child process: start an environment, run the tools that a response calls, else ask the environment what follows.

A `Move` holds all that an episode is made of: its problem, its seed and its responses so far. The child keeps the live episodes, whose
state may be any object, but nothing depends on it: a child that does not have the episode (its process was killed or replaced) plays it
again, and compares what the environment says with what it said before. No torch here.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fst_fast.contracts import EpisodeState, Message, Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.environments import is_environment, part_of, parts_of
from fst_fast.tasks.jsonl import find_message_error
from fst_fast.tasks.tools.calls import CallError, read_calls
from fst_fast.tasks.tools.functions import Tool, ToolError

HELD = 4096
"""Live episodes of a child; the oldest go first, and are played again where they are asked for."""
OBSERVING = frozenset(
    {"system", "developer", "user", "tool", "function", "ipython", "observation", "environment"}
)
"""What the role of a message of `step` may be: any but the policy's own."""


CALLED = ("start", "step", "end", "close", "verify")
DROPPED = "dropped"
"""The `end` of a move that ends an episode unjudged: nothing more will be asked of it."""


class EpisodeError(Exception):
    """Why an episode cannot go on, as one sentence."""


@dataclass(frozen=True)
class Move:
    """What is asked of an episode. responses: all of the policy's so far; seen: the digest of everything the environment has said so far.

    With as many responses as `seen`, the last is answered; with none of either, the episode is started. end: why the episode ends with
    this move whatever the environment says, or DROPPED; "" where it may go on."""

    key: int
    problem: Problem
    seed: int
    responses: tuple[str, ...] = ()
    seen: tuple[str, ...] = ()
    end: str = ""


@dataclass(frozen=True)
class Over:
    """The end of an episode. why: `error`, the `end` of the move where the environment gave no verdict by itself, else ""."""

    verdict: Verdict
    why: str


@dataclass
class _Live:
    task: Any
    state: EpisodeState
    tools: dict[str, Tool]
    opening: dict[str, Any]
    said: list[str]  # digests
    counts: dict[str, float] = field(default_factory=dict)


class Episodes:
    """The live episodes of `environment` (an Environment, or a Task with tools). syntax: of tool calls. chars: of one message."""

    def __init__(self, environment: Any, *, syntax: str, chars: int, check: Callable[[Any], dict[str, Any]]):
        self.environment, self.syntax, self.chars, self.check = environment, syntax, chars, check
        self._live: OrderedDict[int, _Live] = OrderedDict()
        self.concurrent = any(
            inspect.iscoroutinefunction(function)
            for task in parts_of(environment)
            for function in [
                *(getattr(task, name, None) for name in CALLED),
                *(getattr(task, "tools", None) or ()),
            ]
        )
        self._runner = asyncio.Runner() if self.concurrent else None

    def replies(self, items: Sequence[bytes | Any]) -> Iterator[dict[str, Any]]:
        """The reply to each item, a Move or (problem, gold), in order. Asynchronous environments get all of them at the same time."""
        if self._runner is None:
            yield from (_run(self._reply(item)) for item in items)
            return
        loop = self._runner.get_loop()
        tasks = [loop.create_task(self._reply(item)) for item in items]
        yield from (loop.run_until_complete(task) for task in tasks)

    async def _reply(self, item: Any) -> dict[str, Any]:
        try:
            if isinstance(item, Move):
                return await self._play(item)
            problem, gold = item
            live = await self._start(Move(-1, problem, 0))
            try:
                for response in [gold] if isinstance(gold, str) else gold:
                    said = await self._step(live, response)
                return self._verdict(live, said, "the gold responses do not end the episode")
            finally:
                await self._close(live)
        except EpisodeError as error:
            return {"reward": None, "failure": str(error)}
        except MemoryError:
            return {
                "reward": None, "failure": "the episode ran out of memory (verify.memory_mib)", "out_of_memory": True,
            }  # fmt: skip
        except BaseException as error:  # noqa: BLE001 - user code may raise anything; it becomes the verdict
            from fst_fast.tasks.user import describe

            return {"reward": None, "failure": f"the environment raised {describe(error)}"}

    async def _play(self, move: Move) -> dict[str, Any]:
        live = self._live.pop(move.key, None)
        if live is not None and (move.end == DROPPED or live.said != list(move.seen)):
            await self._close(live)
            live = None
        if move.end == DROPPED:
            return {"reward": None, "feedback": "", "metrics": {}}
        live = live or await self._again(move)
        try:
            reply = await self._answer(live, move)
        except BaseException:
            await self._close(live)
            raise
        if "reward" in reply:
            await self._close(live)
            return reply
        self._live[move.key] = live
        while len(self._live) > HELD:
            await self._close(self._live.popitem(last=False)[1])
        return reply

    async def _answer(self, live: _Live, move: Move) -> dict[str, Any]:
        """What the environment says to a move of its live episode."""
        if not move.seen:
            return live.opening
        said: Verdict | list[Message] = []
        if len(move.responses) == len(move.seen):
            said = await self._step(live, move.responses[-1])
            if not isinstance(said, Verdict) and not move.end:
                return {"observation": said}
        if not isinstance(said, Verdict):
            why = move.end
            end = getattr(live.task, "end", None)
            said = (
                Verdict(0.0, f"the episode ended without a verdict ({why})")
                if end is None
                else await self._call(end, live.state, why)
            )
            return self._verdict(live, said, "end returned no Verdict") | {"ended": why}
        return self._verdict(live, said, "")

    @property
    def live(self) -> int:
        """Episodes that go on."""
        return len(self._live)

    async def _close(self, live: _Live) -> None:
        """Let the environment give up what the episode holds: connections, processes."""
        close = getattr(live.task, "close", None) if is_environment(live.task) else None
        if close is not None:
            with contextlib.suppress(Exception):  # the episode is judged or failed already
                await self._call(close, live.state)

    async def _again(self, move: Move) -> _Live:
        """The episode as it was when the environment had said all of `seen`, played from its start."""
        live = await self._start(move)
        try:
            for response in move.responses[: max(len(move.seen) - 1, 0)]:
                await self._step(live, response)
            if move.seen and live.said != list(move.seen):
                raise EpisodeError(
                    "the environment said something else when its episode was played again after its process was lost; start and step must "
                    "depend on the problem, the seed and the responses alone"
                )
        except BaseException:
            await self._close(live)
            raise
        return live

    async def _start(self, move: Move) -> _Live:
        task, problem = part_of(self.environment, move.problem)
        if is_environment(task):
            given = await self._call(task.start, problem)
        else:
            given = (problem.messages, getattr(task, "tools", ()))
        several = isinstance(given, tuple) and bool(given) and not isinstance(given[0], Mapping)
        parts: list[Any] = list(given) if several else [given]
        if len(parts) > 3:
            raise EpisodeError(f"start returned {len(parts)} values; messages, tools and memory are taken")
        messages, functions = parts[0], (parts[1] if len(parts) > 1 else None) or ()
        if wrong := find_message_error(messages):
            raise EpisodeError(f"start returned {wrong}")
        if messages[-1]["role"] == "assistant":
            raise EpisodeError(
                "start returned a last message of the role assistant, which is the policy's own"
            )
        try:
            tools = [f if isinstance(f, Mapping) else Tool.of(f) for f in functions]
        except UserError as error:
            raise EpisodeError(str(error)) from None
        memory = {"memory": parts[2]} if len(parts) > 2 else {}
        state = EpisodeState(
            problem, move.seed, [dict(message) for message in messages], tool_calls=self.syntax, **memory
        )
        schemas = [tool.schema if isinstance(tool, Tool) else tool for tool in tools]
        opening = {"messages": [dict(m) for m in state.messages], "tools": schemas}
        if tools and not self.syntax:
            raise EpisodeError(
                "it has tools, but the chat template shows no syntax for calling them; use a model whose template does, or name one by "
                "rollout.tool_calls"
            )
        return _Live(
            task,
            state,
            {tool.name: tool for tool in tools if isinstance(tool, Tool)},
            opening,
            [digest(opening)],
        )

    async def _step(self, live: _Live, response: str) -> Verdict | list[Message]:
        """What follows a response; the observation is part of the conversation then."""
        live.state.messages.append({"role": "assistant", "content": response})
        said: Any = await self._tool_messages(live, response) if live.tools else []
        if not said:
            task, plays = live.task, is_environment(live.task)
            said = await (
                self._call(task.step, live.state, response)
                if plays
                else self._call(task.verify, live.state.problem, response)
            )
            if isinstance(said, Verdict):
                return said
            if not plays:
                raise EpisodeError(f"verify returned a {type(said).__name__}; it must return a Verdict")
            said = self._messages(said)
        messages: list[Message] = [{key: self._cut(text) for key, text in m.items()} for m in said]
        live.state.messages += messages
        live.said.append(digest(messages))
        return messages

    async def _tool_messages(self, live: _Live, response: str) -> list[Message]:
        """The results of the tools that a response calls, one message each; [] where it calls none."""

        def message(number: int, name: str, content: str) -> Message:
            return {"role": "tool", "name": name, "tool_call_id": f"call{number:05}", "content": content}

        def count(name: str, n: int = 1) -> None:
            live.counts[name] = live.counts.get(name, 0.0) + n

        try:
            calls = read_calls(response, self.syntax)
        except CallError as error:
            count("tool_errors")
            return [message(0, "error", f"error: {error}")]
        said = []
        for number, call in enumerate(calls):
            count("tool_calls")
            try:
                tool = live.tools.get(call.name)
                if tool is None:
                    raise ToolError(
                        f"there is no tool {call.name[:60]!r}; the tools are {', '.join(live.tools)}"
                    )
                count(f"calls/{call.name}")
                content = await tool.call(call.arguments, live.state)
            except ToolError as error:
                count("tool_errors")
                content = f"error: {error}"
            said.append(message(number, call.name[:60], content))
        return said

    def _messages(self, said: Any) -> Sequence[Message]:
        """What `step` returned besides a Verdict, checked. Raises EpisodeError."""
        if isinstance(said, str):
            said = [{"role": "user", "content": said}]
        elif isinstance(said, Mapping):
            said = [said]
        if not isinstance(said, Sequence) or not said:
            raise EpisodeError(f"step returned {said!r:.60}; a Verdict or at least one message is due")
        for message in said:
            role = message.get("role") if isinstance(message, Mapping) else None
            if role not in OBSERVING:
                raise EpisodeError(
                    f"step returned a message with the role {role!r:.60}; allowed are {', '.join(sorted(OBSERVING))}"
                )
            if not isinstance(message.get("content"), str):
                raise EpisodeError("step returned a message whose content is not a text")
        return [{str(k): v for k, v in m.items() if isinstance(v, str)} for m in said]

    def _cut(self, text: str) -> str:
        plain = text.encode("utf-8", "replace").decode()
        left = len(plain) - self.chars
        return plain if left <= 0 else f"{plain[: self.chars]} [{left} characters left out]"

    def _verdict(self, live: _Live, said: Any, otherwise: str) -> dict[str, Any]:
        if otherwise and not isinstance(said, Verdict):
            raise EpisodeError(otherwise)
        reply = self.check(said)
        if "metrics" in reply and live.tools:
            none = dict.fromkeys(
                ("tool_calls", "tool_errors", *(f"calls/{name}" for name in live.tools)), 0.0
            )
            reply["metrics"] = {**none, **live.counts, **reply["metrics"]}
        return reply

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        if self.concurrent and not inspect.iscoroutinefunction(function):
            return await asyncio.to_thread(function, *args)  # it may use asyncio.run, or block
        result = function(*args)
        return await result if inspect.isawaitable(result) else result


def digest(said: Any) -> str:
    """Of what an environment said, to compare it with what it says when it is asked again."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _run(coroutine: Any) -> dict[str, Any]:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: dict[str, Any] = end.value
        return result
    coroutine.close()
    return {"reward": None, "failure": "something that is not declared async was awaited"}
