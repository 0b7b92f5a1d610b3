"""An environment is told of the end of every episode that it has started, once, whatever ends it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fst_fast.contracts import Problem, Verdict
from fst_fast.verify import episodes as module
from fst_fast.verify.episodes import DROPPED, Episodes, Move, digest
from fst_fast.verify.worker import check


class Held:
    """Counts the episodes that it has started and those that it was told to close."""

    def __init__(self) -> None:
        self.started = 0
        self.closed: Counter[int] = Counter()

    def problems(self, split: str) -> list[Problem]:
        return [Problem(str(i), [{"role": "user", "content": "go"}], None) for i in range(4)]

    def start(self, problem: Problem) -> Any:
        self.started += 1
        return problem.messages, (), self.started

    def step(self, state: Any, response: str) -> Any:
        if response == "raise":
            raise KeyError("x")
        return Verdict(1.0) if response == "win" else "on"

    def close(self, state: Any) -> None:
        self.closed[state.memory] += 1
        raise OSError("what close does wrong is nobody's failure")


def asked(env: Held) -> tuple[Episodes, Any]:
    episodes = Episodes(env, syntax="", chars=100, check=check)

    def ask(key: int, responses: tuple[str, ...] = (), seen: tuple[str, ...] = (), end: str = "") -> Any:
        [reply] = episodes.replies([Move(key, env.problems("train")[key], 0, responses, seen, end)])
        return reply

    return episodes, ask


@pytest.mark.parametrize(
    ("response", "end"), [("win", ""), ("raise", ""), ("on", "max_turns"), ("on", DROPPED)]
)
def test_an_episode_is_closed_when_it_ends(response: str, end: str) -> None:
    env = Held()
    episodes, ask = asked(env)
    seen = (digest(ask(0)),)
    assert (episodes.live, env.closed) == (1, {})
    reply = ask(0, (response,), seen, end)
    assert "reward" in reply
    assert (episodes.live, env.closed) == (0, {1: 1})
    ask(0, (response,), seen, DROPPED)  # of what is not there any more: nothing
    assert (env.started, env.closed) == (1, {1: 1})


def test_an_episode_that_is_played_again_closes_the_one_before() -> None:
    env = Held()
    episodes, ask = asked(env)
    first = digest(ask(0))
    observed = ask(0, ("on",), (first,))["observation"]
    reply = ask(0, ("on", "win"), (first, digest(observed)))
    assert reply["reward"] == 1.0
    assert env.closed == {1: 1}
    ask(1)
    failed = ask(1, ("on", "win"), ("other", "digests"))
    assert "said something else when its episode was played again" in failed["failure"]
    assert env.closed == {1: 1, 2: 1, 3: 1}
    assert episodes.live == 0


def test_the_oldest_episodes_are_closed_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD", 2)
    env = Held()
    episodes, ask = asked(env)
    for key in range(4):
        ask(key)
    assert (episodes.live, env.closed) == (2, {1: 1, 2: 1})


def test_the_episodes_of_gold_responses_are_closed() -> None:
    env = Held()
    episodes, _ = asked(env)
    problem = env.problems("train")[0]
    replies = list(episodes.replies([(problem, "win"), (problem, ["on", "raise"])]))
    assert [reply["reward"] for reply in replies] == [1.0, None]
    assert env.closed == {1: 1, 2: 1}
