"""A server of chat completions on this machine whose answers come from elsewhere: each request waits until it is answered.

    POST BASE/KEY/v1/chat/completions     or with KEY as the API key     GET .../models

h11 (which httpx needs) reads HTTP. Sampling parameters of a request are left to the run's configuration; n other than 1 is refused, and so
is whatever is no conversation. A streamed answer comes as one piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import h11

MODEL = "policy"
REQUEST_LIMIT = 8 << 20  # bytes
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


class Refusal(Exception):
    """Why a request is not taken, as one sentence."""


class ChatServer:
    """Conversations by their key. All methods run in one event loop."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._asked: dict[str, asyncio.Queue[Mapping[str, Any]]] = {}
        self._answers: dict[str, asyncio.Future[Mapping[str, Any]]] = {}

    async def open(self, key: str) -> str:
        """The base URL for a new conversation."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self._asked[key] = asyncio.Queue()
        port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/{key}/v1"

    def close(self, key: str) -> None:
        """Forget a conversation; a request that waits is refused."""
        self.refuse(key, "the episode is over")
        self._asked.pop(key, None)

    async def request(self, key: str) -> Mapping[str, Any]:
        """The next request of a conversation: its messages and tools."""
        return await self._asked[key].get()

    def answer(self, key: str, text: str, calls: Sequence[tuple[str, str]]) -> None:
        """Answer the waiting request with a text or with tool calls, (name, JSON of the arguments) each."""
        made = [
            {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for i, (name, arguments) in enumerate(calls)
        ]
        message: dict[str, Any] = {"role": "assistant", "content": None if made else text}
        if made:
            message["tool_calls"] = made
        self._settle(key, message)

    def refuse(self, key: str, why: str) -> None:
        """Answer the waiting request, if there is one, with an error."""
        self._settle(key, Refusal(why))

    def _settle(self, key: str, answer: Any) -> None:
        waiting = self._answers.pop(key, None)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, Refusal):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        connection = h11.Connection(h11.SERVER)
        with contextlib.suppress(OSError, h11.RemoteProtocolError):
            while (request := await _read(connection, reader)) is not None:
                head, body = request
                try:
                    if body is None:
                        raise Refusal(f"the request is longer than {REQUEST_LIMIT} bytes")
                    status, kind, answer = 200, *await self._answered(head, body)
                except Refusal as error:
                    said = {"error": {"message": str(error), "type": "invalid_request_error"}}
                    status, kind, answer = 400, "application/json", json.dumps(said).encode()
                headers = [("content-type", kind), ("content-length", str(len(answer)))]
                out = connection.send(h11.Response(status_code=status, headers=headers)) or b""
                out += connection.send(h11.Data(data=answer)) or b""
                out += connection.send(h11.EndOfMessage()) or b""
                writer.write(out)
                await writer.drain()
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    break
                connection.start_next_cycle()
        writer.close()

    async def _answered(self, head: h11.Request, body: bytes) -> tuple[str, bytes]:
        """(content type, body) of the answer to a request. Raises Refusal."""
        path = head.target.decode("ascii", "replace").partition("?")[0].strip("/").split("/")
        headers = {name: value.decode("latin-1") for name, value in head.headers}
        bearer = headers.get(b"authorization", "").removeprefix("Bearer ").strip()
        if path[-1] == "models":
            return "application/json", json.dumps(
                {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
            ).encode()
        key = path[0] if path[0] in self._asked else bearer
        if path[-2:] != ["chat", "completions"] or head.method != b"POST":
            raise Refusal("only POST .../chat/completions and GET .../models are served")
        if key not in self._asked:
            raise Refusal("neither the address nor the API key is that of a running episode")
        if key in self._answers:
            raise Refusal("this episode has a request that waits for its answer; one at a time is taken")
        asked = _conversation(body)
        waiting = self._answers[key] = asyncio.get_running_loop().create_future()
        self._asked[key].put_nowait(asked)
        return _completion(await waiting, stream=asked["stream"])


async def _read(
    connection: h11.Connection, reader: asyncio.StreamReader
) -> tuple[h11.Request, bytes | None] | None:
    """The next request and its body, None for one that is too long; None at the end of the connection."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            if len(body) <= REQUEST_LIMIT:
                body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            return head, None if len(body) > REQUEST_LIMIT else bytes(body)
        else:
            return None


def _conversation(body: bytes) -> dict[str, Any]:
    """Messages, tools and stream of a request. Raises Refusal."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal("the request is not JSON") from None
    messages = asked.get("messages") if isinstance(asked, dict) else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise Refusal("the request has no messages")
    for message in messages:
        if message.get("role") not in _ROLES:
            raise Refusal(
                f"a message has the role {message.get('role')!r:.60}; allowed are {', '.join(sorted(_ROLES))}"
            )
    if messages[-1]["role"] == "assistant":
        raise Refusal("the last message is of the role assistant, which is the policy's own")
    tools = asked.get("tools") or []
    if not isinstance(tools, list) or not all(
        isinstance(t, dict) and isinstance(t.get("function"), dict) for t in tools
    ):
        raise Refusal("tools is not a list of functions")
    if asked.get("n") not in (None, 1):
        raise Refusal(f"n={asked['n']!r:.60}; one answer at a time is given")
    return {"messages": messages, "tools": tools, "stream": bool(asked.get("stream"))}


def _completion(message: Mapping[str, Any], *, stream: bool) -> tuple[str, bytes]:
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    kind, field = ("chat.completion.chunk", "delta") if stream else ("chat.completion", "message")
    if stream and finish == "tool_calls":
        message = {
            **message,
            "tool_calls": [{"index": i, **call} for i, call in enumerate(message["tool_calls"])],
        }
    answer = {
        "id": "policy", "object": kind, "created": 0, "model": MODEL,
        "choices": [{"index": 0, field: message, "finish_reason": finish}],
    }  # fmt: skip
    if not stream:
        return "application/json", json.dumps(answer).encode()
    return "text/event-stream", f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n".encode()
