"""A single-turn environment of the package verifiers as a task: `task: verifiers:NAME` (extra `verifiers`). Others: verifiers_turns.py.

    task: verifiers:my-environment               an installed package or module with load_environment(**args)
    task_args: {args: {difficulty: hard}}

Problems are the rows of its data sets, their prompts as the environment makes them: its system prompt is a system message, which a context
goes before. The verdict is its rubric's: reward functions, plain or async, by their weights, each logged. The weighted sum is mapped from
`reward_range` to [0, 1]; an affine map changes no advantage. The rubric runs in the verifying processes, which load the environment, too.

The package counts a reward function that raises as 0; here the rollout is unjudged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

from fst_fast.contracts import Problem, Verdict
from fst_fast.errors import UserError
from fst_fast.tasks.graders.text import quoted
from fst_fast.tasks.readers import import_package, said
from fst_fast.tasks.rows import check_count, check_fraction, checked_range, divide

PREFIX = "verifiers:"
COLLECTED: ContextVar[list[str] | None] = ContextVar("COLLECTED", default=None)
"""Where a rollout that runs beside others collects what the package logs as its errors."""
_MONITORS = ("num_turns",)  # metrics that the package adds of its own


class VerifiersTask:
    """args: those of load_environment. train, validation: problems taken at most. validation_fraction: share of the training problems held
    out, by the hash of their content, where the environment has no evaluation set. reward_range: what the rubric's sum lies in; None: from
    the sum of its negative weights to that of its positive ones, as reward functions in [0, 1] give it. Raises UserError."""

    def __init__(
        self,
        name: str,
        args: Mapping[str, Any] | None = None,
        train: int | None = None,
        validation: int | None = None,
        validation_fraction: float = 0.1,
        reward_range: Sequence[float] | None = None,
    ) -> None:
        check_count("train", train, 1)
        check_count("validation", validation, 1)
        check_fraction(validation_fraction)
        if args is not None and not isinstance(args, Mapping):
            raise UserError(f"task_args.args={args!r} must be the keyword arguments of load_environment")
        self.name, self._fraction = name, float(validation_fraction)
        self._limits = {"train": train, "validation": validation}
        self.environment = _load(name, dict(args or {}))
        vf = import_package("verifiers", f"task={PREFIX}{name}", "verifiers")
        self.turns = bool(self.environment.tool_defs) or not isinstance(self.environment, vf.SingleTurnEnv)
        self._low, self._high = _range_of(name, self.environment.rubric, reward_range)
        self._errors = _Errors()
        logger = logging.getLogger("verifiers")
        logger.disabled = False
        logger.setLevel(logging.ERROR)
        logger.addHandler(self._errors)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._splits: dict[str, list[Problem]] = {}

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of "train" or "validation", in the order of the environment's data sets."""
        if not self._splits:
            env, where = self.environment, f"task={PREFIX}{self.name}"
            try:
                train = self._read(env.get_dataset(), "train")
                held_out = env.eval_dataset is not None or env.eval_dataset_source is not None
                validation = self._read(env.get_eval_dataset(), "validation") if held_out else None
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"{where}: its data set cannot be built: {said(error)}") from error
            splits = (
                divide(train, self._fraction, where)
                if validation is None
                else {"train": train, "validation": validation}
            )
            self._splits = {part: problems[: self._limits[part]] for part, problems in splits.items()}
        return self._splits.get(split, [])

    def verify(self, problem: Problem, response: str) -> Verdict:
        """The rubric's verdict, with what each reward function gave as feedback."""
        self._loop = self._loop or asyncio.new_event_loop()
        self._errors.said.clear()
        state = self._loop.run_until_complete(self._score(problem, response))
        if self._errors.said:
            return Verdict(None, " ".join(self._errors.said[0].split()))
        return self.verdict(problem.answer, float(state["reward"]), state["metrics"] or {})

    def verdict(self, answer: Any, total: float, scores: Mapping[str, float]) -> Verdict:
        """The verdict for what the rubric gives in all, and what each reward function gives."""
        metrics = dict(scores)
        for name in _MONITORS:
            metrics.pop(name, None)
        reward = (total - self._low) / (self._high - self._low)
        if not -1e-6 <= reward <= 1 + 1e-6:
            return Verdict(
                None,
                f"the rubric gives {total:g}, which is not in [{self._low:g}, {self._high:g}]; task_args.reward_range says what it lies in",
            )
        reward = min(max(reward, 0.0), 1.0)
        logged = {f"reward/{name}": value for name, value in metrics.items()}
        if reward == 1:
            return Verdict(1.0, "", logged)
        parts = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
        right = f" A right answer is {quoted(answer)}." if isinstance(answer, str) and answer else ""
        return Verdict(reward, f"the response scores {reward:.3g} of 1 ({parts}).{right}", logged)

    def _read(self, rows: Any, split: str) -> list[Problem]:
        problems = []
        for index, row in enumerate(rows):
            messages = [_message(message, f"{self.name} {split}[{index}]") for message in row["prompt"]]
            problems.append(
                Problem(f"{self.name}/{split}/{index}", messages, row.get("answer", ""), {"row": row})
            )
        return problems

    async def _score(self, problem: Problem, response: str) -> Any:
        """The state of a finished rollout, as Environment.init_state and a single turn leave it, scored."""
        from verifiers.types import State, flatten_task_input
        from verifiers.utils.message_utils import normalize_messages

        row = deepcopy(dict(problem.meta["row"]))
        if isinstance(row.get("info"), str):
            row["info"] = json.loads(row["info"])
        state = State(input=flatten_task_input(row))
        state["task"] = state["input"]
        state["prompt"] = normalize_messages(row["prompt"])
        completion = normalize_messages([{"role": "assistant", "content": response}])
        step = {
            "prompt": state["prompt"],
            "completion": completion,
            "response": None,
            "tokens": None,
            "extras": {},
        }
        state |= {
            "completion": completion, "trajectory": [step], "is_completed": True, "is_truncated": False, "error": None, "tool_defs": [],
            "reward": None, "metrics": None,
        }  # fmt: skip
        await self.environment.setup_state(state)
        await self.environment.rubric.score_rollout(state)
        return state


class _Errors(logging.Handler):
    """What the package logs as an error: it goes on after a reward function that raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        own = COLLECTED.get()
        (self.said if own is None else own).append(record.getMessage())


def _load(name: str, args: dict[str, Any]) -> Any:
    """The environment, checked. Raises UserError."""
    where = f"task={PREFIX}{name}"
    vf = import_package("verifiers", where, "verifiers")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        env = vf.load_environment(name, **args)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {said(error)}") from error
    finally:
        # environments take the signals; a run has handlers of its own
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if env.message_type != "chat":
        raise UserError(f"{where} has prompts of the type {env.message_type}; only chat is supported")
    if env.rubric.has_group_rewards or env.rubric.has_advantages:
        raise UserError(
            f"{where} judges the rollouts of a problem together; only rewards of single rollouts are supported"
        )
    return env


def _range_of(name: str, rubric: Any, given: Any) -> tuple[float, float]:
    if given is not None:
        return checked_range(given)
    weights = _weights(rubric)
    low, high = sum(w for w in weights if w < 0), sum(w for w in weights if w > 0)
    if not low < high:
        raise UserError(
            f"task={PREFIX}{name}: its rubric has no reward function with a weight; task_args.reward_range=[low, high] says what it gives"
        )
    return low, high


def _weights(rubric: Any) -> list[float]:
    """The weights of a rubric, or of all rubrics of a group."""
    parts = getattr(rubric, "rubrics", None)
    return (
        [float(w) for w in rubric.weights] if parts is None else [w for part in parts for w in _weights(part)]
    )


def _message(message: Any, where: str) -> dict[str, str]:
    """A chat message with text alone. Raises UserError."""
    content = message["content"]
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(
            f"task={PREFIX}{where}: a message holds something else than text, which is not supported"
        )
    return {"role": message["role"], "content": content}
