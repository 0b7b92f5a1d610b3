"""Run by test_hand_over.py, alone or on two processes: samples waves of uneven size, then spoils the weights of one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, RolloutRequest
from fst_fast.policy.trained import TrainedPolicy
from fst_fast.rollout.sampler import Sampler
from fst_fast.run.environment import prepare_environment
from fst_fast.tasks.registry import load_task


def main() -> None:
    prepare_environment()
    config = Config.model_validate(
        {
            "task_args": {"form": "mini", "arms": 5, "path": 4, "ids": 40},
            "rollout": {"max_response_tokens": 16},
            "policy": {"zero_stage": 1},
        }
    )
    distributed.init(60.0)
    problems = load_task(config.task, config.task_args).problems("train")
    contexts = [Context.of("solve the problem ."), Context.of("start at the goal and go back to the start .")]
    waves = []
    with Sampler.open(config) as sampler:
        policy = TrainedPolicy(config)
        policy.hand_over()
        engine = sampler.engine(policy.rollout_model)
        for size in (1, 7, 0):  # a process without work, more than the other, and none at all
            wave = [RolloutRequest(contexts[i % 2], problems[i // 2], i) for i in range(size)]
            sampled = sampler.spread(engine, wave, stream=(0, "test"), policy_version=0, temperature=1.0)
            waves.append(
                [
                    (
                        s.rollout.problem_id,
                        s.rollout.response_ids.tolist(),
                        s.rollout.logprobs.tolist(),
                        s.verdict.reward,
                    )
                    for s in sampled
                ]
            )
        if distributed.rank() == 1:
            with torch.no_grad():
                next(policy.module.parameters())[3, 3] += 1e-3
        try:
            policy.hand_over()
            said = ""
        except RuntimeError as error:
            said = str(error)
    everybody = distributed.all_gather((waves, said))
    unequal = [(distributed.rank(), i, "x" * 1000) for i in range(1 + 6 * distributed.rank())]
    dealt = distributed.rebalance(unequal, [10] * len(unequal))
    assert dealt == sorted(dealt)
    shares = distributed.all_gather(dealt)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1, [len(share) for share in shares]
    assert sorted(item for share in shares for item in share) == sorted(
        item for own in distributed.all_gather(unequal) for item in own
    )
    if distributed.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(everybody))
    distributed.shut_down()
    assert torch.distributed.is_initialized() == (distributed.world_size() == 1)


if __name__ == "__main__":
    main()
