"""Sampling ahead in parts: what passes between samplers and trainers, where a segment ends, what is refused. Whole runs: tests/integration/test_ahead.py."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fst_fast import distributed
from fst_fast.ahead import last_sampled, segment_end
from fst_fast.config import Config
from fst_fast.contracts import Problem, Rollout, ScoredRollout, Verdict
from fst_fast.data.stages import Stage
from fst_fast.distributed import Split
from fst_fast.errors import UserError
from fst_fast.rollout import link as links
from fst_fast.rollout.link import Order, RankLink, ThreadLink
from fst_fast.run.troubles import fresh_mismatch
from fst_fast.slow.batch import Batch, share_of
from fst_fast.state import batch_from_json, batch_to_json

AHEAD = {"rollout": {"ahead": 1, "sampler_ranks": 1}}


def made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).to(torch.bfloat16), nn.Linear(2, 5))


MODELS = [made(seed) for seed in range(4)]  # here, since threads share the generator


def model(seed: int) -> nn.Module:
    return copy.deepcopy(MODELS[seed])


NAMES = [name for name, _ in model(0).named_parameters()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("bucket", [1, 16, 10**6])
def test_weights_of_several_dtypes_and_any_bucket_arrive_bit_by_bit(
    bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "GATHER_BUCKET", bucket)
    packed = links.pack(model(1), NAMES)
    assert (len(packed) == len(NAMES)) == (bucket == 1)
    other = model(2)
    links.unpack(packed, other, NAMES)
    assert equal(other, model(1))


def test_only_the_named_weights_are_replaced() -> None:
    other = model(2)
    links.unpack(links.pack(model(1), NAMES[:1]), other, NAMES[:1])
    assert torch.equal(other.get_parameter(NAMES[0]), model(1).get_parameter(NAMES[0]))
    assert torch.equal(other.get_parameter(NAMES[1]), model(2).get_parameter(NAMES[1]))


def pair(trainer: Callable[[RankLink], Any], sampler: Callable[[RankLink], Any]) -> tuple[Any, Any]:
    """What a trainer and a sampler return that are linked over gloo, each in a thread."""
    store = dist.HashStore()
    kept: list[RankLink] = []  # a group that is dropped cuts off what is under way

    def play(rank: int, role: Callable[[RankLink], Any]) -> Any:
        groups = [
            dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, 2, timedelta(seconds=20))
            for name in ("whole", "link")
        ]
        kept.append(RankLink(Split(1, *groups), NAMES, model(2) if rank else None))
        return role(kept[-1])

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(play, 0, trainer), pool.submit(play, 1, sampler)
        return one.result(), other.result()


def test_a_trainer_may_send_several_versions_before_the_sampler_takes_one() -> None:
    sent = threading.Event()

    def trainer(link: RankLink) -> None:
        assert not link.samples
        trained = model(1)
        for step in (3, 4):
            link.send(trained, Order(step, pause=step == 4))
            with torch.no_grad():
                trained.get_parameter(NAMES[0]).add_(1)  # a later step does not reach what is under way
        sent.set()
        assert link.take() == "done"

    def sampler(link: RankLink) -> list[tuple[Order, bool]]:
        assert link.samples
        sent.wait()
        expected, seen = model(1), []
        for _ in range(2):
            order = link.receive()
            seen.append((order, equal(link.copy, expected)))
            with torch.no_grad():
                expected.get_parameter(NAMES[0]).add_(1)
        link.put("done")
        return seen

    _, seen = pair(trainer, sampler)
    assert seen == [(Order(3, False), True), (Order(4, True), True)]


def test_batches_arrive_in_order_and_an_error_arrives_before_its_process_ends() -> None:
    def sampler(link: RankLink) -> None:
        link.put({"batch": 1})
        link.put({"batch": 2, "ids": np.arange(5)})
        link.put(UserError("no more"))

    seen, _ = pair(lambda link: [link.take() for _ in range(3)], sampler)
    assert [seen[0]["batch"], seen[1]["batch"], str(seen[2])] == [1, 2, "no more"]
    assert seen[1]["ids"].tolist() == [0, 1, 2, 3, 4]


def test_a_sampler_whose_weights_are_not_those_that_were_sent_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "unpack", lambda *_: None)

    def sampler(link: RankLink) -> None:
        with pytest.raises(RuntimeError, match="holds other weights than the trainer sent"):
            link.receive()
        link.put("done")

    pair(lambda link: (link.send(model(1), Order(0, True)), link.take()), sampler)


def test_a_thread_samples_until_the_trainer_pauses_it_and_its_error_is_the_trainers() -> None:
    link = ThreadLink(NAMES, model(2))
    link.send(model(1), Order(0, True))
    link.receive()
    assert equal(link.copy, model(1))
    seen: list[Any] = []

    def sample() -> None:
        assert distributed.world_size() == 1
        while not seen or not seen[-1].pause:
            link.put(f"batch {len(seen)}")
            seen.append(link.receive())

    with link.sampling(sample):
        assert link.take() == "batch 0"
        link.send(model(3), Order(1, False))
        assert link.take() == "batch 1"
        link.send(model(3), Order(2, True))
    assert seen == [Order(1, False), Order(2, True)]  # the thread has ended
    assert equal(link.copy, model(3))

    def fail() -> None:
        raise UserError("the server is gone")

    with link.sampling(fail):
        assert str(link.take()) == "the server is gone"


def test_a_trainer_that_fails_ends_the_thread() -> None:
    link = ThreadLink(NAMES, model(2))
    ended = threading.Event()

    def sample() -> None:
        try:
            link.receive()
        finally:
            ended.set()

    with pytest.raises(UserError, match="not finite"), link.sampling(sample):
        raise UserError("not finite")
    assert ended.wait(20)


def stage(first: int, end: int) -> Stage:
    return Stage(0, "task", first, end, end, [], [])


def test_a_segment_ends_at_the_next_fast_phase_and_at_the_end_of_the_stage() -> None:
    config = Config.model_validate({**AHEAD, "fast": {"cycle_steps": 4}})
    assert [segment_end(config, stage(10, 20), step) for step in (10, 13, 14, 18, 19)] == [14, 14, 18, 20, 20]
    rl = Config.model_validate({**AHEAD, "method": "rl"})
    assert segment_end(rl, stage(10, 20), 11) == 20


def test_sampling_is_at_most_n_steps_ahead_and_stays_in_its_segment() -> None:
    assert [last_sampled(step, 2, 14) for step in (10, 11, 12, 13)] == [12, 13, 13, 13]


def batch() -> Batch:
    def rollout(problem: str, sample: int, version: int) -> ScoredRollout:
        ids = np.arange(3 + sample)
        return ScoredRollout(
            Rollout(problem, "c", sample, ids, np.full(len(ids), -0.1, np.float32), "stop", version, 1.0),
            Verdict(float(sample % 2), "so so"),
            "text",
        )

    rollouts = [rollout(p, s, v) for p, v in (("b", 4), ("a", 6)) for s in range(2)]
    return Batch(7, rollouts, 2, 1, 1, (50, 90), {"verify_timeouts": 0}, {"rollout_s": 3.0}, 7)


def test_a_batch_comes_back_from_a_checkpoint_without_the_seconds_that_it_took() -> None:
    again = batch_from_json(batch_to_json(batch()))
    assert (again.step, again.reused, again.reused_tokens, again.tokens) == (7, 2, 7, (50, 90))
    assert again.seconds == {}
    for one, other in zip(again.rollouts, batch().rollouts, strict=True):
        assert one.rollout.policy_version == other.rollout.policy_version
        np.testing.assert_array_equal(one.rollout.response_ids, other.rollout.response_ids)
        np.testing.assert_array_equal(one.rollout.logprobs, other.rollout.logprobs)


def test_staleness_is_the_mean_over_rollouts_of_the_steps_since_their_weights() -> None:
    assert batch().staleness == (3 + 3 + 1 + 1) / 4


def test_the_trainers_share_a_batch_by_whole_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem(key, [{"role": "user", "content": "?"}], None) for key in "ba"]
    whole = share_of(batch(), problems, Config())
    assert [g.problem_id for g in whole.groups] == ["b", "a"]
    assert (whole.reused, whole.reused_tokens, whole.refill_rounds, whole.refill_groups) == (2, 7, 1, 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(share_of(batch(), problems, Config()))
    assert sorted(g.problem_id for share in shares for g in share.groups) == ["a", "b"]
    assert [len(share.rollouts) for share in shares] == [2, 2]


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"rollout": {"ahead": 1}}, "rollout.ahead=1 needs processes that sample while others train"),
        ({"rollout": {"sampler_ranks": 1}}, "rollout.sampler_ranks=1 has no effect with rollout.ahead=0"),
        ({**AHEAD, "method": "gepa"}, "has no effect with method=gepa"),
        ({**AHEAD, "fast": {"cycle_steps": 1}}, "at most 0"),
        ({"rollout": {**AHEAD["rollout"], "backend": "vllm"}}, "whose servers sample"),
        ({**AHEAD, "slow": {"distill_steps": 2}}, "does not go with slow.distill_steps=2"),
        ({**AHEAD, "slow": {"objective": "reinforce"}}, "slow.mismatch=tis or mis does"),
        ({"rollout": {"ahead": -1}}, "greater than or equal to 0"),
    ],
)  # fmt: skip
def test_what_sampling_ahead_does_not_go_with_is_refused(tree: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Config.model_validate(tree)


def test_a_run_without_a_process_that_trains_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"rollout\.sampler_ranks=1 leaves no process to train: the run has 1"
    ):
        distributed.init(10, samplers=1)


def test_log_probs_of_older_weights_are_no_mismatch_of_engines() -> None:
    record = {"reused_rollouts": 0, "mismatch_kl": 0.5}
    assert fresh_mismatch([record]) == 0.5
    assert fresh_mismatch([{**record, "rollout_staleness": 1.0}]) is None
    assert fresh_mismatch([{**record, "rollout_staleness": 0.0}]) == 0.5
