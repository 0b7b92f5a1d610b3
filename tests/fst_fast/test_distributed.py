"""How work is shared among processes: plain arithmetic. With collectives: tests/integration/two_ranks.py."""

from __future__ import annotations

import pytest

from fst_fast import distributed
from fst_fast.contracts import Context, Problem
from fst_fast.evaluate import requests_of


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_shares_are_neighbours_of_even_length_and_join_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, processes: int, count: int
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    items = list(range(count))
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share(items))
    assert distributed.join_shares(shares) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_dealing_levels_the_load_and_moves_nothing_where_it_is_level() -> None:
    assert distributed.assign([[5, 5], [5, 5]]) == [[0, 0], [1, 1]]
    assert distributed.assign([[], []]) == [[], []]
    costs = [[9, 9, 9, 1], [], [2, 3]]
    homes = distributed.assign(costs)
    load = [0] * 3
    for own, to in zip(costs, homes, strict=True):
        for cost, home in zip(own, to, strict=True):
            load[home] += cost
    assert sorted(load) == [10, 11, 12]


def test_items_that_all_hold_are_shared_by_their_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four problems whose rollouts are there already do not make their process idle."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    costs = [0, 0, 0, 0, 8, 8, 8, 8, 2]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.share_by_cost(range(9), costs))
    assert sorted(shares[0] + shares[1]) == list(range(9))
    assert all(share == sorted(share) for share in shares)
    assert {sum(costs[i] for i in share) for share in shares} == {16, 18}


def test_a_wave_is_shared_without_computing_its_prompts_on_every_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contexts = [Context.of(f"context {i}") for i in range(4)]
    problems = [Problem(f"p{i}", [{"role": "user", "content": "?"}], None) for i in range(12)]
    whole = requests_of(problems, contexts, 8)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    prompts = 0
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        prompts += len({(context.id, problem.id) for context, problem, _ in distributed.share(whole)})
    assert 48 <= prompts <= 48 + 2, "two seams"
