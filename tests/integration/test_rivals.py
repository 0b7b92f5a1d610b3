"""Rivals in whole runs: when the contexts evolve, what is counted, and that a killed run continues bit-equal."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.integration.crash import same, train
from tests.integration.launch import records

E_SPL = ("--fast.evolver=e_spl", "--fast.crossover=0.5", "--slow.advantage_group=context")
TOGETHER = (
    "--fast.phases=first_and_last",
    "--fast.evolver=gepa",
    "--fast.rollout_budget=24",
    "--fast.population=1",
)


def test_e_spl_evolves_after_every_step_without_rollouts_of_its_own_and_a_killed_run_continues_bit_equal(
    tmp_path: Path,
) -> None:
    code, printed = train(tmp_path / "whole", *E_SPL)
    assert code == 0, printed
    cycles = records(tmp_path / "whole", "cycle")
    assert [c["step"] for c in cycles] == [1, 2, 3, 4]
    assert all(c["fast_rollouts"] == 0 for c in cycles)
    assert records(tmp_path / "whole", "eval")[-1]["rollouts"] == 4 * 2 * 4
    code, printed = train(tmp_path / "run", *E_SPL, fault="optimiser:3")
    assert code == -signal.SIGKILL, printed
    code, printed = train(tmp_path / "run", *E_SPL, "--resume")
    assert code == 0, printed
    same(tmp_path / "run", tmp_path / "whole")


def test_contexts_first_and_last_evolve_twice_are_frozen_between_and_a_killed_run_continues_bit_equal(
    tmp_path: Path,
) -> None:
    code, printed = train(tmp_path / "whole", *TOGETHER)
    assert code == 0, printed
    cycles = records(tmp_path / "whole", "cycle")
    assert [(c["cycle"], c["step"]) for c in cycles] == [(0, 0), (1, 4)]
    code, printed = train(tmp_path / "run", *TOGETHER, fault="optimiser:3")
    assert code == -signal.SIGKILL, printed
    code, printed = train(tmp_path / "run", *TOGETHER, "--resume")
    assert code == 0, printed
    same(tmp_path / "run", tmp_path / "whole")
