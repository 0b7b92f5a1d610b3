"""Episodes of several turns: all that are running sample their next response in one batch, then the environment answers all of them.

    start -> prompt -> [sample -> tools or step -> observation] -> ... -> Verdict, or a limit, or a failure

Turns go in step so that a run repeats itself bit by bit: which sequences share a batch does not depend on how fast an environment
answers. Inside a turn, sequences enter and leave the batch on their own; an episode that is over leaves the next turns. The engine keeps
the keys and values of what earlier turns read, so that a turn computes the last response and the observation, and not its past.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fst_fast.contracts import (
    Context,
    Finish,
    Message,
    Problem,
    Rollout,
    RolloutRequest,
    ScoredRollout,
    Turn,
    Verdict,
)
from fst_fast.errors import UserError
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.rollout.models import Engine
from fst_fast.rollout.prompt import Opening, messages_with_context, response_text
from fst_fast.rollout.prompt_tree import common
from fst_fast.rollout.turns import Ints, observation_ids, rendered_ids, rewritten_turns
from fst_fast.rollout.vllm import VllmEngine
from fst_fast.run.faults import reach
from fst_fast.run.randomness import stream_seed
from fst_fast.verify.episodes import DROPPED, Move, Over, digest

if TYPE_CHECKING:
    from fst_fast.rollout.sampler import Sampler

_NONE = np.empty(0, np.int64)
_UNOPENED = Opening((), ())


@dataclass
class _Episode:
    """ids: everything read and sampled so far; kept, added: what the next turn reads; said: the messages behind the opening."""

    request: RolloutRequest
    key: int
    seed: int
    opening: Opening = _UNOPENED
    kept: int = 0
    added: Ints = field(default_factory=lambda: _NONE)
    ids: Ints = field(default_factory=lambda: _NONE)
    said: list[Message] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    sampled: list[Rollout] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    plain: list[list[int]] = field(default_factory=list)  # the responses without their end tokens
    verdict: Verdict | None = None
    finish: Finish = "stop"
    given_up: bool = False  # it ended without its environment being told

    @property
    def read(self) -> Ints:
        return np.concatenate([self.ids[: self.kept], self.added])

    def move(self, end: str = "") -> Move:
        return Move(self.key, self.request.problem, self.seed, tuple(self.texts), tuple(self.seen), end)

    def over(self, verdict: Verdict, finish: Finish) -> None:
        self.verdict, self.finish = verdict, finish


def play(
    sampler: Sampler,
    engine: Engine,
    requests: Sequence[RolloutRequest],
    *,
    stream: tuple[object, ...],
    policy_version: int,
    temperature: float,
    top_p: float | None,
    paired: bool,
) -> list[ScoredRollout]:
    """Play an episode for each request, on this process; see Sampler.local."""
    config = sampler.config.rollout
    limit = episode_tokens(sampler, engine)
    episodes = [
        _Episode(
            r,
            stream_seed(*stream, "key", r.context.id, r.problem.id, r.sample),
            stream_seed(*stream, "episode", "" if paired else r.context.id, r.problem.id, r.sample),
        )
        for r in requests
    ]
    _start(sampler, episodes)
    turn = 0
    while live := [e for e in episodes if e.verdict is None]:
        started = time.perf_counter()
        keep: dict[str, Any] = {}
        if isinstance(engine, RolloutEngine):
            keep = {"keep_responses": turn + 1 < config.max_turns}
        rollouts = engine.generate(
            [
                Request(
                    problem_id=e.request.problem.id,
                    context_id=e.request.context.id,
                    sample=e.request.sample,
                    prompt_ids=e.read,
                    seed=stream_seed(
                        *stream, "" if paired else e.request.context.id, e.request.problem.id, e.request.sample,
                        *([turn] if turn else []),
                    ),
                )
                for e in live
            ],
            max_response_tokens=config.max_response_tokens,
            temperature=temperature,
            top_p=None if top_p in (None, 1.0) else top_p,
            policy_version=policy_version,
            **keep,
        )  # fmt: skip
        sampled_at = time.perf_counter()
        ends = {*engine.eos_ids, sampler.pad_id}
        for e, rollout in zip(live, rollouts, strict=True):
            text = response_text(sampler.tokenizer, rollout.response_ids, ends)
            e.turns.append(Turn(e.kept, e.added, len(rollout.response_ids)))
            e.ids = np.concatenate([e.read, rollout.response_ids])
            e.sampled.append(rollout)
            e.texts.append(text)
            e.plain.append([i for i in rollout.response_ids.tolist() if i not in ends])
            e.said.append({"role": "assistant", "content": text})
            if rollout.finish == "abort":
                e.over(Verdict(None, "the server gave the response up"), "abort")
                e.given_up = True
        turn += 1
        reach("turn")
        _answer(sampler, [e for e in live if e.verdict is None], last=turn >= config.max_turns, limit=limit)
        sampler.stopwatch.add("rollout_s", sampled_at - started)
        sampler.stopwatch.add("verify_s", time.perf_counter() - sampled_at)
    sampler.pool.play([e.move(DROPPED) for e in episodes if e.given_up])
    return [_scored(sampler, e, policy_version, temperature) for e in episodes]


def ask_openings(sampler: Sampler, problems: Sequence[Any]) -> list[Opening | str]:
    """The opening of each problem, or why there is none."""
    moves = [Move(stream_seed("opening", problem.id), problem, 0) for problem in problems]
    openings: list[Opening | str] = [
        said.verdict.feedback if isinstance(said, Over) else Opening(said["messages"], said["tools"])
        for said in sampler.pool.play(moves)
    ]
    sampler.pool.play([replace(move, end=DROPPED) for move in moves])
    return openings


def check_turns(sampler: Sampler, context: Context, problem: Problem, note: Callable[[str], None]) -> None:
    """Say whether the chat template rewrites the earlier turns of an episode. Raises UserError where it takes no further turn."""
    opening, shown, tools = sampler.prompts.parts(context, problem)
    chat, how = sampler.prompts.chat, sampler.config.rollout.history
    if what := rewritten_turns(chat, messages_with_context(shown, opening, chat.system), tools):
        reads = "what was sampled" if how == "keep" else "what the template writes"
        note(
            f"the chat template does not write {what} of an earlier turn as it was sampled: later turns read {reads} (rollout.history={how})"
        )


def episode_tokens(sampler: Sampler, engine: Engine) -> int:
    """The longest episode, in tokens."""
    config = sampler.config
    limits = [config.rollout.max_episode_tokens or config.slow.tokens_per_micro_batch]
    if isinstance(engine, RolloutEngine):
        limits.append(
            getattr(engine.model.config.get_text_config(), "max_position_embeddings", None) or limits[0]
        )
        if engine.kv_bytes is not None:
            limits.append(engine.kv_bytes // engine.token_bytes())
    elif isinstance(engine, VllmEngine):
        limits.append(engine.hosts.longest)
    return min(limits)


def _start(sampler: Sampler, episodes: Sequence[_Episode]) -> None:
    for e, said in zip(episodes, sampler.pool.play([e.move() for e in episodes]), strict=True):
        problem = e.request.problem
        if isinstance(said, Over):
            e.over(said.verdict, "error")
            continue
        e.opening = Opening(said["messages"], said["tools"])
        e.seen.append(digest(said))
        if not sampler.prompts.know(problem, e.opening):
            failure = "start gave other messages or tools than before for the same problem"
            e.over(sampler.pool.fail(problem.id, failure).verdict, "error")
            e.given_up = True
            continue
        e.added = sampler.prompts.ids(e.request.context, problem)


def _answer(sampler: Sampler, live: Sequence[_Episode], *, last: bool, limit: int) -> None:
    """Let the environment answer the last response of each episode; what it says becomes the next turn's to read, if there is one."""
    moves = [
        e.move("length" if e.sampled[-1].finish == "length" else "max_turns" if last else "") for e in live
    ]
    full = []
    for e, said in zip(live, sampler.pool.play(moves), strict=True):
        if isinstance(said, Over):
            cut = "length" if e.sampled[-1].finish == "length" else "stop"
            e.over(said.verdict, said.why or cut)  # type: ignore[arg-type]
            continue
        try:
            _read(sampler, e, said["observation"])
        except UserError as error:
            e.over(sampler.pool.fail(e.request.problem.id, str(error)).verdict, "error")
            e.given_up = True
            continue
        e.seen.append(digest(said["observation"]))
        if e.kept + len(e.added) + sampler.config.rollout.max_response_tokens > limit:
            full.append(e)
    for e, said in zip(full, sampler.pool.play([e.move("max_tokens") for e in full]), strict=True):
        assert isinstance(said, Over)
        e.over(said.verdict, said.why or "max_tokens")  # type: ignore[arg-type]


def _read(sampler: Sampler, e: _Episode, observation: Sequence[Mapping[str, Any]]) -> None:
    """Make the observation what the next turn reads. Raises UserError where the chat template does not take it."""
    chat, problem = sampler.prompts.chat, e.request.problem
    opening, shown, tools = sampler.prompts.parts(e.request.context, problem)
    opened = messages_with_context(shown, opening, chat.system)
    added = observation_ids(chat, opened, observation, tools, int(e.ids[-1]))
    e.said += observation
    e.kept, e.added = len(e.ids), added
    if sampler.config.rollout.history == "split":
        messages = [*opened, *e.said]
        places = [i for i, m in enumerate(messages) if i >= len(opened) and m["role"] == "assistant"]
        whole = rendered_ids(chat, messages, tools, dict(zip(places, e.plain, strict=True)))
        e.kept = common(e.ids, whole)
        e.added = whole[e.kept :]


def _scored(sampler: Sampler, e: _Episode, policy_version: int, temperature: float) -> ScoredRollout:
    assert e.verdict is not None
    rollout = Rollout(
        problem_id=e.request.problem.id,
        context_id=e.request.context.id,
        sample=e.request.sample,
        response_ids=np.concatenate([_NONE, *(r.response_ids for r in e.sampled)]),
        logprobs=np.concatenate([np.empty(0, np.float32), *(r.logprobs for r in e.sampled)]),
        finish=e.finish,
        policy_version=policy_version,
        temperature=temperature,
        turns=tuple(e.turns) or (Turn(0, e.added, 0),),
    )
    text = transcript(sampler.tokenizer, rollout)
    return ScoredRollout(rollout, e.verdict, text, e.opening.messages, tuple(e.said))


def transcript(tokenizer: Any, rollout: Rollout) -> str:
    """Everything behind the first prompt as text: what was sampled and what was read between, special tokens shown."""
    pieces, at = [], 0
    for i, turn in enumerate(rollout.turns):
        pieces += [turn.added] if i else []
        pieces.append(rollout.response_ids[at : at + turn.length])
        at += turn.length
    return str(tokenizer.decode(np.concatenate([_NONE, *pieces]), skip_special_tokens=False))
