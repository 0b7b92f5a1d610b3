"""Environments of the package verifiers with several turns, with tools, or with a rollout of their own, as an Environment.

The environment's own `rollout` runs unchanged in a verifying child, with a client that waits for our policy: the conversation that it sends
to the client is what the policy reads next, and what the policy samples is the client's answer. It must only append to the conversation.
Its rubric gives the reward, as for the single-turn ones (verifiers_env.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fst_fast.contracts import EpisodeState, Problem, Verdict
from fst_fast.tasks.tools.calls import CallError, read_calls
from fst_fast.tasks.verifiers_env import COLLECTED, VerifiersTask


class VerifiersEpisodes:
    """The environment that `task` has loaded, played turn by turn."""

    def __init__(self, task: VerifiersTask) -> None:
        self._task = task
        self._env = task.environment
        self._env.timeout_seconds = None  # it would count the time of the policy

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of "train" or "validation", in the order of the environment's data sets."""
        return self._task.problems(split)

    async def start(self, problem: Problem) -> Any:
        """Start the environment's rollout; it waits where it first asks the policy."""
        rollout = _Rollout(self._env, problem.meta["row"])
        asked = await rollout.next()
        if asked is None:
            raise ValueError("the environment ended before its first turn")
        messages, tools = asked
        return messages, tools, rollout

    async def step(self, state: EpisodeState, response: str) -> Any:
        """Give the response to the waiting rollout; what it asks next is the observation, its end is the verdict."""
        try:
            calls = read_calls(response, state.tool_calls) if state.tool_calls else []
        except CallError as error:
            return {"role": "tool", "content": f"error: {error}"}
        rollout: _Rollout = state.memory
        rollout.answer(response, [(call.name, json.dumps(call.arguments)) for call in calls])
        asked = await rollout.next()
        return self._verdict(rollout) if asked is None else rollout.new(asked[0])

    async def end(self, state: EpisodeState, why: str) -> Verdict:
        """Tell the rollout that there is no room for a further turn, and let the rubric judge what there is."""
        rollout: _Rollout = state.memory
        rollout.give_up(why)
        while await rollout.next() is not None:
            rollout.give_up(why)
        return self._verdict(rollout)

    async def close(self, state: EpisodeState) -> None:
        """End a rollout that still waits for the policy."""
        state.memory.task.cancel()

    def _verdict(self, rollout: _Rollout) -> Verdict:
        state = rollout.task.result()
        if state.get("error") is not None:
            raise RuntimeError(f"the environment's rollout failed: {state['error']!r:.300}")
        return self._task.verdict(rollout.problem_answer, float(state["reward"]), state.get("metrics") or {})


class _Rollout:
    """One rollout of an environment, running as a task."""

    def __init__(self, environment: Any, row: Mapping[str, Any]) -> None:
        self.problem_answer = row.get("answer")
        self._asked: asyncio.Queue[Any] = asyncio.Queue()  # conversations that the policy is to continue
        self._answer: asyncio.Future[Any] | None = None
        self._known: list[Any] = []  # the conversation so far, the last response as None
        self.task = asyncio.create_task(self._run(environment, row))

    async def _run(self, environment: Any, row: Mapping[str, Any]) -> Any:
        errors: list[str] = []
        COLLECTED.set(errors)
        state = await environment.rollout(dict(row), _client(self), "policy", {})
        errors.clear()
        await environment.rubric.score_rollout(state)
        if errors:  # the package goes on after a reward function that raised
            raise RuntimeError(" ".join(errors[0].split()))
        return state

    async def ask(self, prompt: Any, tools: Any) -> Any:
        """What the client does: hand the conversation out and wait for the policy."""
        self._answer = asyncio.get_running_loop().create_future()
        schemas = [
            {
                "type": "function",
                "function": {"name": t.name, "description": t.description, "parameters": t.parameters},
            }
            for t in tools or []
        ]
        self._asked.put_nowait(([{"role": m.role, "content": _text(m.content)} for m in prompt], schemas))
        return await self._answer

    async def next(self) -> Any:
        """(messages, tools) of the next request, None where the rollout has ended. Raises what it raised."""
        request = asyncio.create_task(self._asked.get())
        await asyncio.wait({request, self.task}, return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            asked = request.result()
            self._known = self._known or list(asked[0])
            return asked
        request.cancel()
        self.task.result()
        return None

    def new(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """What the environment has added to the conversation since the last response."""
        n = len(self._known)
        kept = all(k is None or k == m for k, m in zip(self._known, messages, strict=False))
        if len(messages) <= n or messages[n - 1]["role"] != "assistant" or not kept:
            raise ValueError(
                "the environment rewrites its conversation; only those that append to it can be played"
            )
        self._known = list(messages)
        return list(messages[n:])

    def answer(self, text: str, calls: Sequence[tuple[str, str]]) -> None:
        """Answer the waiting client with a response and the tool calls (name, JSON of the arguments) in it."""
        from verifiers.types import Response, ResponseMessage, ToolCall

        made = [ToolCall(id=f"call{i:05}", name=name, arguments=args) for i, (name, args) in enumerate(calls)]
        message = ResponseMessage(
            content=text,
            tool_calls=made or None,
            finish_reason="tool_calls" if made else "stop",
            is_truncated=False,
        )
        self._known.append(None)
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Response(id="policy", created=0, model="policy", message=message))

    def give_up(self, why: str) -> None:
        """Tell the waiting client that the conversation has become too long."""
        from verifiers.errors import OverlongPromptError

        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(OverlongPromptError(why))


def _client(rollout: _Rollout) -> Any:
    """A client of verifiers whose answers are the policy's."""
    from verifiers.clients.client import Client

    class Policy(Client):  # type: ignore[misc]
        def setup_client(self, config: Any) -> Any:
            return config

        async def to_native_tool(self, tool: Any) -> Any:
            return tool

        async def to_native_prompt(self, messages: Any) -> Any:
            return messages, {}

        async def get_native_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
        ) -> Any:
            return await rollout.ask(prompt, tools)

        async def raise_from_native_response(self, response: Any) -> None:
            return None

        async def from_native_response(self, response: Any) -> Any:
            return response

        async def close(self) -> None:
            return None

    return Policy(None)


def _text(content: Any) -> str:
    """The text of a message. Raises ValueError where it holds anything else, such as an image."""
    if isinstance(content, str) or content is None:
        return content or ""
    parts = [getattr(part, "text", None) for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a message of the environment holds more than text")
    return "".join(map(str, parts))
