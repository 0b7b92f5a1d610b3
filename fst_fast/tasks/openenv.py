"""A server that speaks the protocol of OpenEnv as an environment: `task: openenv:http://host:8000` (extra `openenv`).

    websocket   /ws, one session for each episode, as today's servers keep them: {"type": "reset", "data": {"seed": ...}}, then
                {"type": "step", "data": ACTION}; the answers are {"type": "observation", "data": RESULT} or {"type": "error", ...}
    http        POST /reset {"seed", "episode_id"}, POST /step {"action", "episode_id"}, answered by RESULT: for servers that tell episodes
                apart by their episode_id. Most do not: over HTTP they make a new environment for every request

RESULT is {"observation": {...}, "reward": number or null, "done": bool}. A response becomes an action by a template. What a server answers is
checked; an answer that is late, too long or of another form ends its episode without a reward (facts: meta-pytorch/OpenEnv, May 2026).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from fst_fast.contracts import EpisodeState, Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.background import in_background
from fst_fast.tasks.readers import import_package
from fst_fast.tasks.rows import check_count, checked_range

PREFIX = "openenv:"
ANSWER_LIMIT = 4 << 20  # bytes
_URL = re.compile(r"https?://[^\s@?#]+")
_TYPED = re.compile(r"\{response:(int|float|json)\}")
_NOT_SHOWN = ("done", "reward", "metadata")


class Refused(Exception):
    """The server does not take an action; the policy is told why."""


class Result(BaseModel):
    """What a server answers to a reset and a step; further fields are left out."""

    model_config = ConfigDict(allow_inf_nan=False)

    observation: dict[str, Any]
    reward: float | None = None
    done: bool = False


@dataclass
class _Episode:
    session: _WebSocket | _Http
    rewards: list[float]


class OpenEnv:
    """url: of the server. action: what a response is sent as, a mapping in which "{response}" stands for its text, or as a whole value
    "{response:int}", "{response:float}" or "{response:json}"; None: the one text that the server's schema of actions asks for. observation:
    the fields that the policy reads; None: the only text that is not empty, or all as JSON. reset: further arguments of a reset. train,
    validation: episodes, each of a seed of its own. reward: of an episode, the `sum` of its steps' or the `last`. reward_range: what that
    lies in. timeout_s: longest wait for one answer, less than verify.timeout_s. Raises UserError."""

    def __init__(
        self,
        url: str,
        *,
        action: Mapping[str, Any] | None = None,
        observation: Sequence[str] | None = None,
        reset: Mapping[str, Any] | None = None,
        transport: Literal["websocket", "http"] = "websocket",
        train: int = 64,
        validation: int = 16,
        reward: Literal["sum", "last"] = "sum",
        reward_range: Sequence[float] = (0.0, 1.0),
        timeout_s: float = 8.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._where = f"task={PREFIX}{url}"
        if not _URL.fullmatch(self.url):
            raise UserError(
                f"{self._where} must be openenv:http(s)://host[:port] without user name, password or query"
            )
        for name, value, allowed in (
            ("transport", transport, ("websocket", "http")),
            ("reward", reward, ("sum", "last")),
        ):
            if value not in allowed:
                raise UserError(f"task_args.{name}={value!r} is not known; allowed are {', '.join(allowed)}")
        for name, mapping in (("action", action), ("reset", reset)):
            if mapping is not None and not isinstance(mapping, Mapping):
                raise UserError(f"task_args.{name}={mapping!r} must be a mapping")
        if action is not None:
            _check_template(action)
        if isinstance(observation, str):
            observation = [observation]
        if observation is not None and not all(isinstance(name, str) for name in observation):
            raise UserError(f"task_args.observation={observation!r} must be the names of fields")
        self._low, self._high = checked_range(reward_range)
        if not isinstance(timeout_s, int | float) or not timeout_s > 0:
            raise UserError(f"task_args.timeout_s={timeout_s!r} must be a positive number of seconds")
        check_count("train", train, 1)
        check_count("validation", validation, 1)
        if transport == "websocket":
            import_package("websockets", self._where, "openenv")
        self._action, self._shown, self._reset = action, observation, dict(reset or {})
        self._transport, self._timeout_s, self._sums = transport, float(timeout_s), reward == "sum"
        train, validation = train or 64, validation or 16  # null: the defaults
        self._seeds = {"train": range(train), "validation": range(train, train + validation)}

    def problems(self, split: str) -> Sequence[Problem]:
        """One for each seed."""
        return [
            Problem(f"{split}/{seed}", [{"role": "user", "content": f"episode {seed}"}], None, {"seed": seed})
            for seed in self._seeds.get(split, ())
        ]

    async def start(self, problem: Problem) -> Any:
        """Open a session and reset it with the problem's seed; its observation is the policy's first message."""
        session = _WebSocket(self.url) if self._transport == "websocket" else _Http(self.url)
        try:
            if self._action is None:
                self._action = await self._asked(self._action_of_schema())
            result = _checked(await self._asked(session.reset({"seed": problem.meta["seed"], **self._reset})))
        except BaseException:
            await in_background(session.close())
            raise
        if result.done:
            await in_background(session.close())
            raise RuntimeError("the server's episode is over before its first step")
        return [{"role": "user", "content": self._text(result)}], (), _Episode(session, [])

    async def step(self, state: EpisodeState, response: str) -> Any:
        """Send the response as an action; the observation is what follows, or the verdict where the server says that the episode is over."""
        episode: _Episode = state.memory
        assert self._action is not None
        try:
            action = _filled(self._action, response.rpartition("</think>")[2].strip())
        except ValueError as error:
            return f"error: {error}"
        try:
            result = _checked(await self._asked(episode.session.step(action)))
        except Refused as error:
            return f"error: {error}"
        if result.reward is not None:
            episode.rewards.append(result.reward)
        return self._verdict(episode, self._text(result)) if result.done else self._text(result)

    def end(self, state: EpisodeState, why: str) -> Verdict:
        """The rewards so far."""
        return self._verdict(state.memory, f"the episode was cut ({why})")

    async def close(self, state: EpisodeState) -> None:
        await in_background(state.memory.session.close())

    async def _asked(self, work: Any) -> Any:
        try:
            return await in_background(asyncio.wait_for(work, self._timeout_s))
        except TimeoutError:
            raise TimeoutError(
                f"{self.url} did not answer within {self._timeout_s:g} s (task_args.timeout_s)"
            ) from None

    def _verdict(self, episode: _Episode, feedback: str) -> Verdict:
        total = sum(episode.rewards) if self._sums else (episode.rewards or [0.0])[-1]
        reward = (total - self._low) / (self._high - self._low)
        if not -1e-6 <= reward <= 1 + 1e-6:
            raise ValueError(
                f"the server's reward {total:g} is not in [{self._low:g}, {self._high:g}]; task_args.reward_range says what it lies in"
            )
        return Verdict(min(max(reward, 0.0), 1.0), feedback, {"return": total})

    def _text(self, result: Result) -> str:
        fields = {k: v for k, v in result.observation.items() if k not in _NOT_SHOWN}
        if self._shown is not None:
            if missing := [name for name in self._shown if name not in fields]:
                raise ValueError(
                    f"the observation has no {missing[0]!r} (task_args.observation); it has {', '.join(fields) or 'nothing'}"
                )
            return "\n\n".join(_plain(fields[name]) for name in self._shown)
        texts = [v for v in fields.values() if isinstance(v, str) and v]
        return texts[0] if len(texts) == 1 else json.dumps(fields, ensure_ascii=False)

    async def _action_of_schema(self) -> Mapping[str, Any]:
        """{name: "{response}"} where the server's actions have one field that must be given, a text."""
        schema = (await _http("GET", f"{self.url}/schema")).get("action")
        schema = schema if isinstance(schema, Mapping) else {}
        needed = [name for name in schema.get("required", ()) if name != "metadata"]
        kinds = schema.get("properties", {})
        if (
            len(needed) == 1
            and isinstance(kinds, Mapping)
            and kinds.get(needed[0], {}).get("type") == "string"
        ):
            return {needed[0]: "{response}"}
        asked = f"its actions need {', '.join(needed)}"
        if not needed:
            asked = "its schema does not say what an action needs"
        raise ValueError(f"what a response is sent as is not clear, {asked}; task_args.action says it")


class _WebSocket:
    """A session of a server, which keeps one environment for it."""

    def __init__(self, url: str) -> None:
        self._url = re.sub("^http", "ws", url) + "/ws"
        self._connection: Any = None

    async def reset(self, arguments: Mapping[str, Any]) -> Any:
        from websockets.asyncio.client import connect

        self._connection = await connect(self._url, max_size=ANSWER_LIMIT, open_timeout=None, close_timeout=1)
        return await self._ask("reset", arguments)

    async def step(self, action: Mapping[str, Any]) -> Any:
        return await self._ask("step", action)

    async def _ask(self, kind: str, data: Mapping[str, Any]) -> Any:
        await self._connection.send(json.dumps({"type": kind, "data": data}))
        answer = _parsed(await self._connection.recv())
        if answer.get("type") == "error":
            said = answer.get("data")
            said = said if isinstance(said, Mapping) else {"message": said}
            refused = kind == "step" and said.get("code") == "VALIDATION_ERROR"
            raise (Refused if refused else RuntimeError)(
                f"the server refuses a {kind}: {said.get('message')!s:.300}"
            )
        if answer.get("type") != "observation":
            raise ValueError(
                f"the server answers a {kind} with {answer.get('type')!r:.60}; an observation is due"
            )
        return answer.get("data")

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()


class _Http:
    """An episode of a server that tells them apart by episode_id."""

    def __init__(self, url: str) -> None:
        self._url, self._id = url, uuid.uuid4().hex

    async def reset(self, arguments: Mapping[str, Any]) -> Any:
        return await _http("POST", f"{self._url}/reset", {**arguments, "episode_id": self._id})

    async def step(self, action: Mapping[str, Any]) -> Any:
        return await _http(
            "POST", f"{self._url}/step", {"action": action, "episode_id": self._id}, refusal=422
        )

    async def close(self) -> None:
        return None


async def _http(method: str, url: str, body: Any = None, refusal: int = 0) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=None) as client, client.stream(method, url, json=body) as answer:
        read = bytearray()
        async for piece in answer.aiter_bytes():
            read += piece
            if len(read) > ANSWER_LIMIT:
                raise ValueError(f"{url} answers more than {ANSWER_LIMIT} bytes")
    if answer.status_code != 200:
        error = Refused if answer.status_code == refusal else RuntimeError
        raise error(f"{url} answers {answer.status_code}: {read[:200].decode(errors='replace')!r}")
    return _parsed(bytes(read))


def _parsed(text: str | bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(text)
        if isinstance(answer, dict):
            return answer
    raise ValueError(f"the server's answer is not a JSON object: {text[:100]!r}")


def _checked(answer: Any) -> Result:
    try:
        return Result.model_validate(answer)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "answer"
        raise ValueError(f"the server's answer is not a step's result: {where}: {first['msg']}") from None


def _check_template(action: Mapping[str, Any]) -> None:
    """Raises UserError where an action does not take the response, or has a placeholder that would be sent as it is."""
    places = list(_texts(action))
    if not any("{response" in text for text in places):
        raise UserError(f"task_args.action={dict(action)} does not hold {{response}}")
    for text in places:
        if "{response" in text.replace("{response}", "") and not _TYPED.fullmatch(text):
            raise UserError(
                f"task_args.action has the value {text!r}; allowed are {{response}} in a text, and as the whole value "
                "{response:int}, {response:float} and {response:json}"
            )


def _texts(template: Any) -> Iterator[str]:
    """The texts among the values of a template."""
    if isinstance(template, Mapping):
        template = list(template.values())
    if isinstance(template, list):
        for value in template:
            yield from _texts(value)
    elif isinstance(template, str):
        yield template


def _finite(text: str) -> float:
    """The number that a text spells; NaN and infinity are not JSON. Raises ValueError."""
    if not math.isfinite(number := float(text)):
        raise ValueError(text)
    return number


def _json(text: str) -> Any:
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _filled(template: Any, response: str) -> Any:
    """The template with the response in it. Raises ValueError, a sentence for the policy, where it is not of the type that is asked for."""
    if isinstance(template, Mapping):
        return {key: _filled(value, response) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, response) for value in template]
    if not isinstance(template, str):
        return template
    if typed := _TYPED.fullmatch(template):
        kind = typed[1]
        readers: dict[str, Callable[[str], Any]] = {"int": int, "float": _finite, "json": _json}
        try:
            return readers[kind](response)
        except (ValueError, RecursionError):
            what = {"int": "a whole number", "float": "a number", "json": "valid JSON"}[kind]
            raise ValueError(f"the response must be {what} and nothing else") from None
    return template.replace("{response}", response)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
