"""Any agent program as an environment: `task: program`. It talks to an OpenAI-compatible server, which is the policy that is being trained.

    program --- chat completion request ---> the policy's next turn
            <--- its response, tool calls read out of it ---
    program exits: the verifier of an inner task judges what it has printed

A program is started for each episode and gets the problem on its standard input and, in OPENAI_BASE_URL and OPENAI_API_KEY, an address and
a key of its own, by which episodes side by side are told apart. Token ids and log-probs are recorded where the policy samples, so the program
needs to know nothing of them. It must only append to its conversation, and do the same when it gets the same responses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from fst_fast.contracts import EpisodeState, Problem
from fst_fast.errors import UserError
from fst_fast.tasks.background import in_background
from fst_fast.tasks.chat_server import ChatServer, Refusal
from fst_fast.tasks.tools.calls import CallError, read_calls

PRINTED_LIMIT = 1 << 20  # bytes of standard output that are judged
_TAIL = 300  # characters of standard error that are shown


class Programs:
    """task: the inner task, which has the problems and judges what the program prints. command: the program and its arguments.
    timeout_s: longest wait for its next request or its end, less than verify.timeout_s. Raises UserError."""

    def __init__(self, task: Any, command: Sequence[str], timeout_s: float = 8.0) -> None:
        if (
            isinstance(command, str)
            or not isinstance(command, Sequence)
            or not command
            or not all(isinstance(c, str) for c in command)
        ):
            raise UserError(
                f"task_args.command={command!r} must be a list of texts: a program and its arguments"
            )
        if not isinstance(timeout_s, int | float) or not timeout_s > 0:
            raise UserError(f"task_args.timeout_s={timeout_s!r} must be a positive number of seconds")
        if not callable(getattr(task, "verify", None)):
            raise UserError("task_args.task of task=program is an environment; a task with a verifier is due")
        self._task, self._command, self._timeout_s = task, list(command), float(timeout_s)
        self._server = ChatServer()

    def problems(self, split: str) -> Sequence[Problem]:
        """Those of the inner task."""
        found: Sequence[Problem] = self._task.problems(split)
        return found

    async def start(self, problem: Problem) -> Any:
        """Start the program; its first request is the opening."""
        program = _Program(self._server, self._command, self._timeout_s)
        try:
            asked = await in_background(program.begin(problem))
            if asked is None:
                raise RuntimeError(f"the program ended before its first request: {program.ending}")
        except BaseException:
            await in_background(program.kill())
            raise
        messages, tools = asked
        return messages, tools, program

    async def step(self, state: EpisodeState, response: str) -> Any:
        """Answer the program's request; its next one is the observation, its end the verdict."""
        program: _Program = state.memory
        calls: list[tuple[str, str]] = []
        if program.tools and state.tool_calls:
            try:
                read = read_calls(response, state.tool_calls)
            except CallError as error:
                return {"role": "tool", "content": f"error: {error}"}
            calls = [(call.name, json.dumps(call.arguments)) for call in read]
        said = await in_background(program.answer(response, calls))
        if said is not None:
            return said
        if program.exit_code:
            raise RuntimeError(f"the program failed: {program.ending}")
        return self._task.verify(state.problem, program.printed)

    async def close(self, state: EpisodeState) -> None:
        await in_background(state.memory.kill())


class _Program:
    """A running program and its side of the conversation."""

    def __init__(self, server: ChatServer, command: Sequence[str], timeout_s: float) -> None:
        self.key = uuid.uuid4().hex
        self.printed, self.ending, self.exit_code = "", "", 0
        self.tools: Sequence[Any] = ()
        self._server, self._command, self._timeout_s = server, command, timeout_s
        self._known: list[Any] = []  # the conversation so far, the policy's response as None
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.Task[None] | None = None

    async def begin(self, problem: Problem) -> Any:
        """(messages, tools) of the first request, None where the program has ended."""
        base = await self._server.open(self.key)
        given = {
            "id": problem.id,
            "messages": [dict(m) for m in problem.messages],
            "meta": dict(problem.meta),
        }
        env = {**os.environ, "OPENAI_BASE_URL": base, "OPENAI_API_KEY": self.key}
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, start_new_session=True
        )
        self._ended = asyncio.create_task(self._run(json.dumps(given, default=str).encode()))
        asked = await self._next()
        if asked is None:
            return None
        self._known, self.tools = list(asked["messages"]), asked["tools"]
        return [_shown(m) for m in self._known], self.tools

    async def answer(self, text: str, calls: Sequence[tuple[str, str]]) -> list[dict[str, str]] | None:
        """Answer the waiting request; what the next one adds to the conversation, None where the program has ended."""
        self._server.answer(self.key, text, calls)
        asked = await self._next()
        if asked is None:
            return None
        messages, n = asked["messages"], len(self._known)
        grown = messages[:n] == self._known and len(messages) > n + 1 and messages[n]["role"] == "assistant"
        if not grown or asked["tools"] != self.tools:
            self._server.refuse(self.key, "this conversation does not go on where the last response ended")
            raise RuntimeError(
                "the program rewrites its conversation or begins another one; only those that append to one can be played"
            )
        self._known = list(messages)
        return [_shown(m) for m in messages[n + 1 :]]

    async def kill(self) -> None:
        """End the program and all that it has started in its session."""
        self._server.close(self.key)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            if self._ended is not None:
                await self._ended

    async def _next(self) -> Mapping[str, Any] | None:
        """The program's next request, None where it has ended."""
        assert self._ended is not None
        asked = asyncio.ensure_future(self._server.request(self.key))
        done, _ = await asyncio.wait(
            {asked, self._ended}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED
        )
        if asked in done:
            return asked.result()
        asked.cancel()
        if self._ended in done:
            self._ended.result()
            return None
        raise TimeoutError(
            f"the program neither asked nor ended within {self._timeout_s:g} s (task_args.timeout_s)"
        )

    async def _run(self, given: bytes) -> None:
        """Feed the program and collect what it prints."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(given)
            await process.stdin.drain()
        process.stdin.close()
        out, err = await asyncio.gather(
            _head(process.stdout, PRINTED_LIMIT), _head(process.stderr, PRINTED_LIMIT)
        )
        self.exit_code = await process.wait()
        self.printed = out.decode(errors="replace").strip()
        last = err.decode(errors="replace").strip()[-_TAIL:]
        self.ending = f"exit code {self.exit_code}" + (f": {' '.join(last.split())}" if last else "")


async def _head(stream: asyncio.StreamReader | None, limit: int) -> bytes:
    """The first bytes of a stream, which is read to its end."""
    assert stream is not None
    kept = bytearray()
    while piece := await stream.read(65536):
        kept += piece[: max(0, limit - len(kept))]
    return bytes(kept)


def _shown(message: Mapping[str, Any]) -> dict[str, str]:
    """A message of a request as the policy reads it. Raises Refusal where it holds more than text."""
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
    ):
        content = "".join(part["text"] for part in content)
    if content is None and message["role"] == "assistant":
        content = json.dumps(message.get("tool_calls") or "")
    if not isinstance(content, str):
        raise Refusal("a message of the program holds more than text")
    more = {k: v for k, v in message.items() if k in ("name", "tool_call_id") and isinstance(v, str)}
    return {"role": message["role"], "content": content, **more}
