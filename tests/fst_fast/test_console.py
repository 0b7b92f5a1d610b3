"""What a person sees: plain lines without a terminal, a status with one, nothing on the other ranks."""

from __future__ import annotations

import io
from typing import Any

import pytest

from fst_fast.run.console import Console, duration

CHANNELS = {
    "neither": {"mean": 0.031, "stderr": 0.0049, "pass_at_k": 0.094, "n": 128, "k": 4},
    "context": {"mean": 0.41, "stderr": 0.02, "pass_at_k": 0.7, "n": 128, "k": 4},
    "weights": {"mean": 0.3, "stderr": 0.02, "pass_at_k": 0.5, "n": 128, "k": 4},
    "both": {"mean": 1.0, "stderr": 0.0, "pass_at_k": 1.0, "n": 128, "k": 4},
}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def step_of(console: Console, step: int, seconds: float, **fields: Any) -> None:
    record = {"step": step, "cycle": 2, "reward": 0.31249, "kl": 0.00214, **fields}
    console.step(record, {"step": step, "seconds": seconds, "tokens_per_s": 1234.4})


def test_without_a_terminal_there_is_one_line_per_step_and_one_per_new_phase() -> None:
    out = io.StringIO()
    console = Console(total_steps=10, stream=out)
    for step in (1, 2, 3):
        for phase in ("rollout", "train"):
            console.phase(phase)
        step_of(console, step, 100 + 10 * step)
    assert out.getvalue().splitlines() == [
        "rollout ...",
        "train ...",
        "step 1/10  cycle 2  reward 0.312  KL 0.0021  1,234 tokens/s",
        "step 2/10  cycle 2  reward 0.312  KL 0.0021  1,234 tokens/s  1m20s left",
        "step 3/10  cycle 2  reward 0.312  KL 0.0021  1,234 tokens/s  1m10s left",
    ]


def test_a_value_that_does_not_exist_is_a_dash() -> None:
    out = io.StringIO()
    Console(total_steps=10, stream=out).step({"step": 1, "reward": None}, {"seconds": 1.0})
    assert out.getvalue() == "step 1/10  cycle 0  reward -  KL -\n"


def test_a_cycle_tells_what_was_proposed_and_the_best_context() -> None:
    out = io.StringIO()
    population = [
        {"text": "solve .", "mean": 0.1},
        {"text": "trace [back]\nfirst", "mean": 0.5},
        {"text": "new", "mean": None},
    ]
    Console(total_steps=10, stream=out).cycle(
        {
            "cycle": 3,
            "population": population,
            "proposed": 8,
            "admitted": 2,
            "refused": {"long": 1, "known": 2},
            "best_mean": 0.5,
            "seed_mean": 0.1,
        }
    )
    assert out.getvalue().splitlines() == [
        "cycle 3: 8 contexts proposed, 2 admitted, 3 refused (long 1, known 2); mean reward 0.500 best, 0.100 seed",
        "  best context: trace [back] first",
    ]


def test_an_evaluation_is_one_line_with_the_cells_that_were_measured() -> None:
    out = io.StringIO()
    channels = {**{name: CHANNELS[name] for name in ("both", "neither")}, "weights": {"n": 0}}
    Console(total_steps=10, stream=out).evaluation(
        {"step": 20, "channels": channels, "kl_seed": 0.01234, "kl_evolved": None}
    )
    assert (
        out.getvalue()
        == "evaluation at step 20: neither 3.1 ± 0.5 %, both 100.0 ± 0.0 %; KL to base: seed 0.0123\n"
    )


def test_the_final_table_shows_the_four_cells_in_columns() -> None:
    out = io.StringIO()
    Console(total_steps=10, stream=out).final_table(
        {**CHANNELS, "weights": {"mean": 0.0, "stderr": 0.0, "pass_at_k": 0.0, "n": 0}}
    )
    assert out.getvalue().splitlines() == [
        "",
        "Reward on the validation problems",
        "----------------------------------------------------------------------------",
        "                                                 mean@4    pass@4   problems",
        "----------------------------------------------------------------------------",
        "neither: base weights, seed context         3.1 ± 0.5 %     9.4 %        128",
        "context: base weights, evolved contexts    41.0 ± 2.0 %    70.0 %        128",
        "weights: trained weights, seed context     not measured                     ",
        "both: trained weights, evolved contexts   100.0 ± 0.0 %   100.0 %        128",
        "----------------------------------------------------------------------------",
    ]


def test_a_stream_without_the_plus_minus_sign_gets_it_spelled() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(total_steps=10, stream=out)
    console.evaluation({"step": 1, "channels": {"both": CHANNELS["neither"]}})
    console.note("größer")
    out.flush()
    assert raw.getvalue() == b"evaluation at step 1: both 3.1 +- 0.5 %\ngr??er\n"


def test_other_ranks_say_nothing() -> None:
    for out in (io.StringIO(), Terminal()):
        with Console(total_steps=10, enabled=False, stream=out) as console:
            console.phase("rollout")
            step_of(console, 1, 1.0)
            console.cycle({"cycle": 1})
            console.evaluation({"step": 1, "channels": CHANNELS})
            console.final_table(CHANNELS)
            console.note("hello")
        assert out.getvalue() == ""


def test_on_a_terminal_the_status_is_live_and_notes_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    console = Console(total_steps=10, stream=out)
    console.phase("rollout")
    assert console._live is not None
    step_of(console, 1, 1.0)
    step_of(console, 2, 3.0)
    console._live.refresh()
    console.note("[bold]a note[/bold]")
    console.final_table(CHANNELS)
    console.close()
    console.close()
    text = out.getvalue()
    for part in (
        "rollout",
        "step 2/10",
        "16s left",
        "reward 0.312   KL 0.0021   1,234 tokens/s",
        "[bold]a note[/bold]",
        "41.0 ± 2.0 %",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.6, "1m00s"), (190, "3m10s"), (7500, "2h05m"), (-3, "0s")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
