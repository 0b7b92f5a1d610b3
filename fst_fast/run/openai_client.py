"""An OpenAI-compatible endpoint (OpenAI, vLLM, SGLang, llama.cpp, Ollama, a proxy): one client for the reflector and for the sampling server.

The key comes from the environment variable OPENAI_API_KEY only, goes to the configured address only, and is cut out of every error and reply.
The package `openai` repeats what is worth repeating (connection faults, time-outs, 408, 409, 429, 5xx) at most `retries` times with growing
pauses, honouring Retry-After up to two minutes; what fails after that is the caller's to report, in the one sentence of `fault`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fst_fast.errors import UserError

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
_NO_KEY = "not-needed"  # local servers want none, the client wants one
_FAULT_CHARS = 300

Args = TypeVar("Args", bound=BaseModel)
T = TypeVar("T")
R = TypeVar("R")


class EndpointArgs(BaseModel):
    """What every endpoint needs; the reflector and the sampling server add keys of their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(min_length=1)
    """Name of the model at the endpoint."""
    base_url: str = Field(pattern=r"^https?://[^\s@?#]+$")
    """Root of the API, up to and including /v1. It must not hold a user name, a password or a query: it is written to config.yaml."""
    timeout_s: float = Field(600.0, gt=0)
    """Longest wait for one try."""
    retries: int = Field(3, ge=0, le=10)
    """Further tries after the first."""
    concurrency: int = Field(64, ge=1, le=4096)
    """Requests of one process under way at the same time."""


def check_args(kind: type[Args], args: Mapping[str, Any], *, section: str, user: str) -> Args:
    """The checked arguments. section: the key that holds them; user: the setting that needs them, such as fast.reflector=openai.

    Raises UserError, one sentence; never shows the value of a key that is not known, nor that of base_url, which may hold a password."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{user} needs the package openai; install it with: pip install 'fst-fast[reflect]'"
        ) from error
    return validated(kind, args, section=section, user=user)


def validated(kind: type[Args], args: Mapping[str, Any], *, section: str, user: str) -> Args:
    """`check_args` for what needs no package."""
    allowed = ", ".join(kind.model_fields)
    unknown = sorted(set(args) - set(kind.model_fields))
    if unknown:
        secret = any("key" in name for name in unknown)
        hint = f"; the key comes from the environment variable {KEY_VARIABLE}" if secret else ""
        raise UserError(f"{section} has no {', '.join(unknown)}; allowed: {allowed}{hint}")
    try:
        return kind.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = f"{section}.{'.'.join(str(part) for part in first['loc'])}"
        if first["type"] == "missing":
            raise UserError(f"{where} is missing, but {user} needs it; allowed: {allowed}") from None
        if first["loc"][:1] in (("base_url",), ("urls",)):
            raise UserError(
                f"{where} must be http(s)://host/path without user name, password or query"
            ) from None
        raise UserError(f"{where}={first['input']!r:.80}: {first['msg']}") from None


class Endpoint:
    """One endpoint. user: the setting that it serves, for errors. Raises UserError where OpenAI's own address is given no key.

    Safe to use from several threads."""

    def __init__(self, args: EndpointArgs, *, user: str) -> None:
        from openai import OpenAI

        self.args = args
        self._key = os.environ.get(KEY_VARIABLE, "") or _NO_KEY
        if self._key == _NO_KEY and args.base_url == OPENAI_URL:
            raise UserError(
                f"{user} at {OPENAI_URL} needs the environment variable {KEY_VARIABLE}, which is not set"
            )
        self._client = OpenAI(
            api_key=self._key, base_url=args.base_url, timeout=args.timeout_s, max_retries=args.retries
        )

    def chat(self, **fields: Any) -> Any:
        """Ask /chat/completions; the answer as the package reads it, unchecked. Raises what the package raises."""
        return self._client.chat.completions.create(model=self.args.model, **fields)

    def complete(self, **fields: Any) -> Any:
        """Ask /completions, likewise."""
        return self._client.completions.create(model=self.args.model, **fields)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """function of every item, in order, `concurrency` at a time. Where one raises, those not begun are left out and it is raised."""
        if not items:
            return []
        with ThreadPoolExecutor(max_workers=min(self.args.concurrency, len(items))) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                failed = next((f.exception() for f in futures if f.done() and f.exception()), None)
                if failed is not None:
                    raise failed
                return [future.result() for future in futures]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def redact(self, text: str) -> str:
        """The text without the key."""
        return text if self._key == _NO_KEY else text.replace(self._key, "***")

    def fault(self, error: BaseException) -> str:
        """`APIConnectionError: Connection error.`: an error's kind and first line, without the key."""
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{type(error).__name__}: {self.redact(line)[:_FAULT_CHARS]}"
