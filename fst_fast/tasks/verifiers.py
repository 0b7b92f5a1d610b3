"""Any environment of the package verifiers as an Environment: `task: verifiers:NAME` (extra `verifiers`, and the package of the environment).

    task: verifiers:wordle
    task_args: {args: {num_train_examples: 500}, reward_range: [0, 1]}

Its own `rollout` runs unchanged in a verifying child, with a client that waits for our policy: what it asks the client is the next turn's
conversation, and what the policy samples is the client's answer. So environments of several turns, with tools, or with a rollout of their
own all work, as long as they only append to the conversation. The rubric gives the reward.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fst_fast.contracts import EpisodeState, Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.tools.calls import CallError, read_calls

PREFIX = "verifiers:"


class Verifiers:
    """args: keyword arguments of the environment's load_environment. validation_fraction: share of the last training rows that is held out
    where the environment has no evaluation set. reward_range: the lowest and the highest reward, which become 0 and 1. Raises UserError."""

    def __init__(
        self,
        name: str,
        *,
        args: Mapping[str, Any] | None = None,
        validation_fraction: float = 0.1,
        reward_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        try:
            import verifiers as vf
        except ImportError:
            raise UserError(
                f"task={PREFIX}{name} needs the package verifiers; install it with: pip install 'fst-fast[verifiers]'"
            ) from None
        try:
            self.environment: Any = vf.load_environment(name, **dict(args or {}))
        except Exception as error:  # somebody else's code
            raise UserError(f"task={PREFIX}{name}: {str(error).splitlines()[0]}") from error
        if len(reward_range) != 2 or not reward_range[0] < reward_range[1]:
            raise UserError(
                f"task_args.reward_range={list(reward_range)} must be two numbers, the lower one first"
            )
        if not 0 < validation_fraction < 1:
            raise UserError(f"task_args.validation_fraction={validation_fraction!r} must be between 0 and 1")
        if getattr(self.environment, "requires_group_rollouts", False):
            raise UserError(
                f"task={PREFIX}{name}: its rubric compares the rollouts of a group, and here each is judged alone"
            )
        self.environment.timeout_seconds = None  # it would count the time of the policy
        self.name, self._low, self._high = name, *map(float, reward_range)
        self._fraction = validation_fraction

    def problems(self, split: str) -> Sequence[Problem]:
        """The rows of the training or the evaluation set."""
        whole = self.environment.get_dataset()
        if self.environment.build_eval_dataset() is not None:
            rows = self.environment.get_eval_dataset() if split == "validation" else whole
        else:
            cut = len(whole) - max(int(len(whole) * self._fraction), 1)
            rows = whole.select(range(cut, len(whole)) if split == "validation" else range(cut))
        return [
            Problem(
                f"{self.name}/{split}/{number}", _texts(row["prompt"]), row.get("answer"), {"row": dict(row)}
            )
            for number, row in enumerate(rows)
        ]

    async def start(self, problem: Problem) -> Any:
        """Start the environment's rollout; it stops where it first asks the policy."""
        rollout = _Rollout(self.environment, problem.meta["row"])
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
        if asked is None:
            return self._verdict(rollout)
        return rollout.new(asked[0])

    async def end(self, state: EpisodeState, why: str) -> Verdict:
        """Tell the rollout that there is no room for a further turn, and let the rubric judge what there is."""
        rollout: _Rollout = state.memory
        rollout.give_up(why)
        while await rollout.next() is not None:
            rollout.give_up(why)
        return self._verdict(rollout)

    def _verdict(self, rollout: _Rollout) -> Verdict:
        state = rollout.task.result()
        if state.get("error") is not None:
            raise RuntimeError(f"the environment's rollout failed: {state['error']!r:.300}")
        metrics = {str(k): float(v) for k, v in (state.get("metrics") or {}).items() if v is not None}
        reward = (float(state["reward"]) - self._low) / (self._high - self._low)
        last = state["completion"][-1] if state.get("completion") else None
        said = "" if last is None else _text(last)
        return Verdict(reward, f"reward {state['reward']:g}. The last message: {said[:2000]}", metrics)


class _Rollout:
    """One rollout of an environment, running as a task. asked: the conversations that it has asked the policy to continue."""

    def __init__(self, environment: Any, row: Mapping[str, Any]) -> None:
        self._asked: asyncio.Queue[Any] = asyncio.Queue()
        self._answer: asyncio.Future[Any] | None = None
        self._known = 0  # messages of the conversation, the last response included
        self.task = asyncio.create_task(self._run(environment, row))

    async def _run(self, environment: Any, row: Mapping[str, Any]) -> Any:
        state = await environment.rollout(dict(row), _client(self), "policy", {})
        await environment.rubric.score_rollout(state)
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
        self._asked.put_nowait((_texts(prompt), schemas))
        return await self._answer

    async def next(self) -> Any:
        """(messages, tools) of the next request, None where the rollout has ended. Raises what it raised."""
        request = asyncio.create_task(self._asked.get())
        await asyncio.wait({request, self.task}, return_when=asyncio.FIRST_COMPLETED)
        if request.done():
            asked = request.result()
            self._known = self._known or len(asked[0])
            return asked
        request.cancel()
        self.task.result()
        return None

    def new(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        """What the environment has added to the conversation since the last response."""
        if len(messages) <= self._known or messages[self._known - 1]["role"] != "assistant":
            raise ValueError(
                "the environment rewrites its conversation; only those that append to it can be played"
            )
        said = list(messages[self._known :])
        self._known = len(messages)
        return said

    def answer(self, text: str, calls: Sequence[tuple[str, str]]) -> None:
        from verifiers.types import Response, ResponseMessage, ToolCall

        made = [ToolCall(id=f"call{i:05}", name=name, arguments=args) for i, (name, args) in enumerate(calls)]
        message = ResponseMessage(
            content=text,
            tool_calls=made or None,
            finish_reason="tool_calls" if made else "stop",
            is_truncated=False,
        )
        self._known += 1
        self._settle(result=Response(id="policy", created=0, model="policy", message=message))

    def give_up(self, why: str) -> None:
        from verifiers.errors import OverlongPromptError

        self._settle(error=OverlongPromptError(why))

    def _settle(self, *, result: Any = None, error: Exception | None = None) -> None:
        if self._answer is None or self._answer.done():
            return
        if error is None:
            self._answer.set_result(result)
        else:
            self._answer.set_exception(error)


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


def _texts(messages: Any) -> list[dict[str, str]]:
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [{"role": _field(m, "role"), "content": _text(m)} for m in messages]


def _field(message: Any, name: str) -> Any:
    return message.get(name) if isinstance(message, Mapping) else getattr(message, name, None)


def _text(message: Any) -> str:
    """The text of a message. Raises ValueError where it holds anything else, such as an image."""
    content = _field(message, "content")
    if isinstance(content, str) or content is None:
        return content or ""
    parts = [_field(part, "text") for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("a message of the environment holds more than text")
    return "".join(parts)
