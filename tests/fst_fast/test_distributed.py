"""How work is divided among processes (pure arithmetic). tests/integration/two_ranks.py tests the collectives."""

from __future__ import annotations

import pytest

from fst_fast import distributed
from fst_fast.contracts import Context, Problem
from fst_fast.evaluate import requests_of


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 12])
def test_shards_are_contiguous_balanced_and_concatenate_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, processes: int, count: int
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    items = list(range(count))
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.local_shard(items))
    assert distributed.concat_shards(shares) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_assignment_balances_the_load_and_moves_nothing_if_it_is_balanced() -> None:
    assert distributed.assign_ranks([[5, 5], [5, 5]]) == [[0, 0], [1, 1]]
    assert distributed.assign_ranks([[], []]) == [[], []]
    costs = [[9, 9, 9, 1], [], [2, 3]]
    homes = distributed.assign_ranks(costs)
    load = [0] * 3
    for own, to in zip(costs, homes, strict=True):
        for cost, home in zip(own, to, strict=True):
            load[home] += cost
    assert sorted(load) == [10, 11, 12]


def test_replicated_items_are_sharded_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four problems whose rollouts already exist do not leave their process idle."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    costs = [0, 0, 0, 0, 8, 8, 8, 8, 2]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.local_shard_by_cost(range(9), costs))
    assert sorted(shares[0] + shares[1]) == list(range(9))
    assert all(share == sorted(share) for share in shares)
    assert {sum(costs[i] for i in share) for share in shares} == {16, 18}


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_contiguous_shards_by_cost_have_about_equal_costs(
    monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    costs = [400, 400, 10, 10, 10, 10, 10, 10, 200, 200, 10, 400, 10, 10]
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(distributed.contiguous_shard_by_cost(range(14), costs))
    assert distributed.concat_shards(shares) == list(range(14))
    load = [sum(costs[i] for i in share) for share in shares]
    assert max(load) <= sum(costs) / processes + max(costs) / 2
    by_count = [sum(costs[14 * r // processes : 14 * (r + 1) // processes]) for r in range(processes)]
    assert max(load) <= max(by_count)
    assert distributed.contiguous_shard_by_cost([], []) == []


def test_sharding_requests_duplicates_only_the_prompts_at_shard_boundaries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contexts = [Context.of(f"context {i}") for i in range(4)]
    problems = [Problem(f"p{i}", [{"role": "user", "content": "?"}], None) for i in range(12)]
    whole = requests_of(problems, contexts, 8)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    prompts = 0
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        prompts += len({(context.id, problem.id) for context, problem, _ in distributed.local_shard(whole)})
    assert 48 <= prompts <= 48 + 2, "two seams"
