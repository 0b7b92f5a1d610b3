"""One vLLM server over HTTP: its routes, and what each of its faults means for a run.

Two kinds of faults: the server is gone (it does not answer, it says that its engine is dead, it was started anew), which a restart and the same request
mend; or it refuses, which nothing mends. httpx rather than the package openai: most of these routes are not OpenAI's, and a server that a
run starts listens on a Unix socket, which needs no port, no key, and lets nobody else in.
"""

from __future__ import annotations

import os
from typing import Any

import httpx

KEY_VARIABLE = "VLLM_API_KEY"
CONNECT_S = 10.0
_FAULT_CHARS = 300


class GoneError(Exception):
    """The server does not answer, or not as the one that was prepared. The text stands behind its name: `does not answer (ConnectError: ...)`."""


class SlowError(GoneError):
    """It has not answered in time, which may mean that it hangs or that it is busy."""


class RefusedError(Exception):
    """It answers with an error: `says 404: ...`."""


class VllmClient:
    """where: http(s)://host:port, or unix:/path of a socket. Safe to use from several threads."""

    def __init__(self, where: str, *, timeout_s: float, connections: int) -> None:
        self.where = where
        self._key = os.environ.get(KEY_VARIABLE, "")
        socket = where.removeprefix("unix:") if where.startswith("unix:") else None
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._client = httpx.Client(
            base_url="http://vllm" if socket else where,
            transport=httpx.HTTPTransport(uds=socket, limits=limits),
            headers={"Authorization": f"Bearer {self._key}"} if self._key and not socket else {},
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None),
        )

    def get(self, path: str, **params: str) -> Any:
        """The answer to GET, read as JSON where it is JSON (None if it is empty). Raises GoneError and RefusedError, as all methods do."""
        return self._ask("GET", path, params=params)

    def post(self, path: str, body: dict[str, Any] | None = None, **params: str) -> Any:
        """The answer to POST, likewise."""
        return self._ask("POST", path, json=body, params=params)

    def answers(self) -> bool:
        """Whether the server is up."""
        try:
            self._ask("GET", "/health", timeout=CONNECT_S)
        except (GoneError, RefusedError):
            return False
        return True

    def close(self) -> None:
        self._client.close()

    def _ask(self, method: str, path: str, **how: Any) -> Any:
        try:
            answer = self._client.request(method, path, **how)
        except httpx.TimeoutException as error:
            raise SlowError(f"has not answered {path} in time ({type(error).__name__})") from None
        except httpx.HTTPError as error:
            raise GoneError(f"does not answer ({self.redact(f'{type(error).__name__}: {error}')})") from None
        if answer.status_code >= 500:
            raise GoneError(f"says {answer.status_code} to {path}: {self._message(answer)}")
        if answer.status_code >= 400:
            raise RefusedError(f"says {answer.status_code} to {path}: {self._message(answer)}")
        try:
            return answer.json() if answer.content else None
        except ValueError:
            return answer.text  # such as vLLM's on adapters

    def _message(self, answer: httpx.Response) -> str:
        """The server's own words, in one line."""
        try:
            body = answer.json()
            said = body.get("error", body)
            text = str(said.get("message", said) if isinstance(said, dict) else said)
        except (ValueError, AttributeError):
            text = answer.text
        return self.redact(" ".join(text.split()))[:_FAULT_CHARS] or "nothing more"

    def redact(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, "***") if self._key else text
