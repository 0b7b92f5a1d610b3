"""`fst replay DUMP`: repeat a step that gave NaN or Inf from what the run dumped of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fst_fast import distributed
from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.policy.scoring import Batching
from fst_fast.policy.sequence_loss import Mismatch
from fst_fast.policy.trained import NonFiniteError, TrainedPolicy, load
from fst_fast.run.environment import grow_segments
from fst_fast.slow.nonfinite import REFERENCE, read_dump
from fst_fast.slow.slow_phase import objective_of
from fst_fast.slow.update import Reference, check_finite, micro_jobs


def replay(folder: Path, say: Callable[[str], None]) -> bool:
    """Repeat the dumped step on this process and print each micro-batch's loss beside the dumped one; returns whether all are the same.

    Raises UserError where `folder` is no dump."""
    tree, shares = read_dump(folder)
    config = config_load.load(folder / "config.yaml")
    grow_segments()
    distributed.init()
    if distributed.world_size() > 1:
        raise UserError("fst replay runs on one process; start it without a launcher")
    reference = load(config)
    if config.policy.lora is None:
        at = config.model.model_copy(update={"path": str(folder / "model"), "revision": None})
        policy = TrainedPolicy(config.model_copy(update={"model": at}))
    else:
        policy = TrainedPolicy(config, reference)
        policy.load_adapters(folder)
    if (folder / REFERENCE).is_dir():
        reference = load(config, folder / REFERENCE)
    say(f"step {tree['step']}, dumped because of {tree['reason']}")
    dumped = [loss for share in tree["losses"] for loss in share]
    batching, objective = Batching.of(config, tree["pad_id"]), objective_of(config.slow)
    reason, losses = "", []
    try:
        for share in shares:
            check_finite(share)
        jobs = [
            job
            for share in shares
            for job in micro_jobs(share, Reference(reference), objective, batching, Mismatch.of(config.slow))[
                1
            ]
        ]
        policy.forward_backward(jobs)
    except NonFiniteError as again:
        reason, losses = str(again), [repr(loss) for loss in again.losses]
    for i, (now, then) in enumerate(zip(losses, dumped, strict=False)):
        say(f"micro-batch {i}: loss {now}, dumped as {then}")
    say(f"now: {reason or 'every loss and gradient is finite'}")
    same = losses == dumped and reason == tree["reason"]
    say("the same numbers" if same else "NOT the same numbers")
    return same
