"""What turns cost: steps of episodes of 6 turns against steps of single turns of as many tokens, in one run. A CPU is enough.

    python -m benchmarks.turns [--turns 6] [--tokens 16] [--steps 4] [--rounds 3] [--out benchmarks/results]
    python -m benchmarks.turns --count [--turns 6] [--tokens 16] [--steps 1]      # tokens that sampling computes, nothing timed

Both sides are whole runs of the mini model (method=rl): sampling, verification in child processes, update. Every turn has exactly
`tokens` tokens; a single turn has as many as an episode samples and reads behind its prompt, so that both train on sequences of one length. The
sides alternate; of each round the first step, which warms up, is left out. The ratio is that of seconds per computed token, in seconds of the
wall clock and, which is to be trusted on a shared machine, in CPU seconds of the trainer's process.

--count: the tokens that the engine computes in sampling the episodes, where it keeps their keys and values between turns, as it does, and
where it reads each turn's whole prompt again. Samples share their prompts in both. The counts depend on the arguments alone.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fst_fast import Callback, EpisodeState, Problem, Verdict

OBSERVATION = "try again ."


class Again:
    """An environment that asks again until an episode has had its turns, and judges by a hash."""

    def __init__(self, turns: int) -> None:
        self.turns = turns

    def problems(self, split: str) -> Sequence[Problem]:
        first = 0 if split == "train" else 64
        return [Problem(f"{split}/{i}", _asked(i), i) for i in range(first, first + 64)]

    def start(self, problem: Problem) -> Any:
        return problem.messages

    def step(self, state: EpisodeState, response: str) -> Any:
        answers = sum(message["role"] == "assistant" for message in state.messages)
        return OBSERVATION if answers < self.turns else Verdict(_reward(response))


class Once:
    """The same problems in a single turn."""

    def problems(self, split: str) -> Sequence[Problem]:
        return Again(1).problems(split)

    def verify(self, problem: Problem, response: str) -> Verdict:
        return Verdict(_reward(response))


def _asked(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"path from {i % 40} to {(7 * i) % 40} ?"}]


def _reward(response: str) -> float:
    return hashlib.sha256(response.encode()).digest()[0] / 255


class Clock(Callback):
    """Seconds, CPU seconds and computed tokens of every step but the first."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.sampled = 0  # computed by the engine so far
        self._last: tuple[float, int, int] | None = None

    def on_step(self, event: Any) -> None:
        cpu, tokens = time.process_time(), event.record["tokens_computed"]
        if self._last is not None:
            spent = {key: event.timing[key] for key in ("rollout_s", "verify_s", "train_s")}
            row = {"cpu_s": cpu - self._last[0], "tokens": tokens - self._last[1], **spent}
            row["sampling_tokens"] = self.sampled - self._last[2]
            self.rows.append({**row, "observed": event.record.get("observed_tokens") or 0.0})
        self._last = time.process_time(), tokens, self.sampled


def steps(turns: int, tokens: int, count: int, *, keeps: bool = True) -> list[dict[str, float]]:
    """The rows of `count` steps; turns=1: of single turns. keeps: keys and values between turns."""
    import fst_fast

    config = {
        "method": "rl",
        "task": f"{__file__}:{'Again' if turns > 1 else 'Once'}",
        "task_args": {"turns": turns} if turns > 1 else {},
        "rollout": {"max_prompt_tokens": 64, "max_response_tokens": tokens + 1, "max_turns": max(turns, 1), "stop": ["!"]},
        "slow": {"steps": count + 1, "problems_per_step": 8, "group_size": 8, "lr": 1e-4},
        "eval": {"every": 0, "problems": 1, "final_problems": 1, "samples": 1, "kl_problems": 1},
    }  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, fixed_length(tokens, clock, keeps):
        fst_fast.train(config, run_dir=Path(folder) / "run", callbacks=[clock])
    return clock.rows


@contextmanager
def fixed_length(tokens: int, clock: Clock, keeps: bool) -> Iterator[None]:
    """Every response ends after exactly `tokens` tokens, whatever they are. clock: counts what engines compute. keeps: whether they keep keys."""
    from unittest.mock import patch

    from fst_fast.rollout import engine

    original, generate = engine.RolloutEngine.__init__, engine.RolloutEngine.generate

    def init(self: Any, *args: Any, **more: Any) -> None:
        original(self, *args, **{**more, "eos_ids": ()})

    def counted(self: Any, *args: Any, **more: Any) -> Any:
        if not keeps:
            self.forget()
        before = self.tokens_computed
        rollouts = generate(self, *args, **more)
        clock.sampled += self.tokens_computed - before
        return rollouts

    stops = patch.object(engine, "StopTexts", lambda *_: lambda ids: len(ids) >= tokens)
    with stops, patch.multiple(engine.RolloutEngine, __init__=init, generate=counted):
        yield


def per_token(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians over the steps of microseconds per computed token."""
    wall = [row["rollout_s"] + row["verify_s"] + row["train_s"] for row in rows]
    parts = {
        "cpu_us": [row["cpu_s"] for row in rows],
        "wall_us": wall,
        **{f"{kind}_us": [row[f"{kind}_s"] for row in rows] for kind in ("rollout", "verify", "train")},
    }
    tokens = [row["tokens"] for row in rows]
    found = {
        name: statistics.median(1e6 * s / t for s, t in zip(seconds, tokens, strict=True))
        for name, seconds in parts.items()
    }
    return {**found, "tokens_per_step": statistics.median(tokens)}


def main() -> None:
    from benchmarks import measure

    parser = measure.arguments(__doc__)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16, help="of one turn")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", action="store_true", help="count tokens, time nothing")
    args = parser.parse_args()
    if args.count:
        kept, again = (
            sum(row["sampling_tokens"] for row in steps(args.turns, args.tokens, args.steps, keeps=keeps))
            for keeps in (True, False)
        )
        print(json.dumps({"kept": kept, "read_again": again, "ratio": again / kept}))
        return
    episodes: list[dict[str, float]] = []
    single: list[dict[str, float]] = []
    ratios = []
    for _ in range(args.rounds):
        now = steps(args.turns, args.tokens, args.steps)
        length = args.turns * args.tokens + round(now[0]["observed"])
        once = steps(1, length, args.steps)
        ratios.append(per_token(now)["cpu_us"] / per_token(once)["cpu_us"])
        episodes, single = episodes + now, single + once
    a, b = per_token(episodes), per_token(single)
    result = {
        "turns": args.turns,
        "tokens_per_turn": args.tokens,
        "tokens_per_single_turn": length,
        "episodes": a,
        "single": b,
        "cpu_ratio": a["cpu_us"] / b["cpu_us"],
        "cpu_ratio_by_round": ratios,
        "wall_ratio": a["wall_us"] / b["wall_us"],
        "hardware": measure.hardware(),
        "versions": measure.versions(),
    }
    print(json.dumps(result, indent=1))
    if args.out:
        measure.write(args.out / "turns_cpu.json", result)


if __name__ == "__main__":
    main()
