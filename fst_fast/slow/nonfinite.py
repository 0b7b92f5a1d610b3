"""The batch of a step that gave NaN or Inf, written so that `fst replay` can repeat the step exactly: its tokens and numbers, and the weights.

    RUN/dumps/step-000012/
        dump.json              step, reason, loss of every micro-batch, what each sequence answers and its reward
        rank-0.safetensors     the sequences of each process: prompts, responses, advantages, token weights, log-probs as sampled
        config.yaml  model/    the configuration, and the weights as they were before the step, which are those after it too
        adapter/               with policy.lora: the adapters alone

safetensors and JSON only: a dump may come from elsewhere. It is there whole or not at all; the oldest go (`KEPT`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.forest import Leaf
from fst_fast.policy import lora
from fst_fast.policy.trained import NonFiniteError, Policy, load
from fst_fast.run.folder import disk_errors, fsync_folder, write_atomic
from fst_fast.slow.groups import Group
from fst_fast.slow.update import Sequences, check_finite, micro_jobs

FORMAT = 1
KEPT = 2  # dumps, each with the weights


def write(
    run_dir: Path,
    error: NonFiniteError,
    data: Sequences,
    groups: Sequence[Group],
    config: Config,
    *,
    step: int,
    pad_id: int,
    model: nn.Module,
) -> Path:
    """Write the dump of `step`; all processes call it, `data` and `groups` are their own. model: the whole weights, on rank 0."""
    folder = run_dir / "dumps" / f"step-{step:06d}"
    tmp = folder.with_name(f".tmp-{folder.name}")
    losses = distributed.all_gather([repr(loss) for loss in error.losses])
    sequences = distributed.all_gather([_line(m) for g in groups for m in g.sampled])
    with disk_errors(f"{folder} cannot be written"):
        if distributed.rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        distributed.barrier()
        save_file(sequences_to_arrays(data), tmp / f"rank-{distributed.rank()}.safetensors")
        distributed.barrier()
        if distributed.rank() == 0:
            lora.save(model, tmp)
            write_atomic(tmp / "config.yaml", config_load.dump(config).encode())
            tree = {
                "format": FORMAT, "step": step, "reason": str(error), "losses": losses, "sequences": sequences, "pad_id": pad_id,
            }  # fmt: skip
            write_atomic(tmp / "dump.json", json.dumps(tree, indent=1, allow_nan=False).encode())
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(tmp, folder)
            fsync_folder(folder.parent)
            for old in sorted(folder.parent.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
    distributed.barrier()
    return folder


def replay(folder: Path, say: Callable[[str], None]) -> bool:
    """Repeat the dumped step on this process, saying every micro-batch's loss beside the dumped one. Returns whether all are the same.

    Raises UserError where `folder` is no dump."""
    try:
        tree = json.loads((folder / "dump.json").read_text())
        shares = [
            arrays_to_sequences(load_file(folder / f"rank-{rank}.safetensors"))
            for rank in range(len(tree["losses"]))
        ]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a whole dump of a step, such as RUN/dumps/step-000012 ({error})"
        ) from None
    if tree["format"] != FORMAT:
        raise UserError(
            f"{folder / 'dump.json'} has format {tree['format']!r}, this version of fst reads {FORMAT}"
        )
    config = config_load.load(folder / "config.yaml")
    distributed.init()
    if distributed.world_size() > 1:
        raise UserError("fst replay runs on one process; start it without a launcher")
    reference = load(config)
    if config.policy.lora is None:
        at = config.model.model_copy(update={"path": str(folder / "model")})
        policy = Policy(config.model_copy(update={"model": at}))
    else:
        policy = Policy(config, reference)
        policy.load_adapters(folder)
    say(f"step {tree['step']}, dumped because of {tree['reason']}")
    dumped = [loss for share in tree["losses"] for loss in share]
    reason, losses = "", []
    try:
        for share in shares:
            check_finite(share)
        jobs = [job for share in shares for job in micro_jobs(share, config, reference, tree["pad_id"])[1]]
        policy.forward_backward(jobs)
    except NonFiniteError as again:
        reason, losses = str(again), [repr(loss) for loss in again.losses]
    for i, (now, then) in enumerate(zip(losses, dumped, strict=False)):
        say(f"micro-batch {i}: loss {now}, dumped as {then}")
    say(f"now: {reason or 'every loss and gradient is finite'}")
    same = losses == dumped and reason == tree["reason"]
    say("the same numbers" if same else "NOT the same numbers")
    return same


def _line(sampled: Any) -> dict[str, Any]:
    r, reward = sampled.rollout, sampled.verdict.reward
    return {
        "problem_id": r.problem_id, "context_id": r.context_id, "sample": r.sample, "finish": r.finish,
        "reward": reward if reward is None or np.isfinite(reward) else repr(float(reward)),
    }  # fmt: skip


def sequences_to_arrays(data: Sequences) -> dict[str, NDArray[Any]]:
    """The sequences as flat arrays with the length of each piece."""
    prompts = [np.asarray(leaf.prompt_ids, np.int64) for leaf in data.leaves]
    responses = [np.asarray(leaf.response_ids, np.int64) for leaf in data.leaves]
    empty = [np.zeros(0, np.int64)]
    return {
        "prompt_ids": np.concatenate(prompts or empty),
        "prompt_lengths": np.array([len(p) for p in prompts], np.int64),
        "response_ids": np.concatenate(responses or empty),
        "response_lengths": np.array([len(r) for r in responses], np.int64),
        "advantages": data.advantages,
        "weights": data.weights,
        "behaviour": data.behaviour,
    }


def arrays_to_sequences(arrays: dict[str, NDArray[Any]]) -> Sequences:
    """Undo `sequences_to_arrays`."""
    lengths = arrays["response_lengths"]
    prompts = np.split(arrays["prompt_ids"], np.cumsum(arrays["prompt_lengths"])[:-1])
    responses = np.split(arrays["response_ids"], np.cumsum(lengths)[:-1])
    return Sequences(
        leaves=[Leaf(p, r) for p, r in zip(prompts, responses, strict=True)] if len(lengths) else [],
        start=np.cumsum(lengths) - lengths,
        advantages=arrays["advantages"],
        weights=arrays["weights"],
        behaviour=arrays["behaviour"],
    )
