"""What happens to a step that gives NaN or Inf: its batch is dumped, then the run stops or leaves the step out (on_nonfinite).

`fst replay` repeats a dumped step exactly from its tokens, numbers and weights:

    RUN/dumps/step-000012/
        dump.json              step, reason, loss of every micro-batch, what each sequence answers and its reward
        rank-0.safetensors     the sequences of each process: prompts, responses, advantages, token weights, log-probs as sampled
        config.yaml  model/    the configuration, and the weights as they were before the step, which are those after it too
        adapter/               with policy.lora: the adapters alone
        reference/             with slow.reference.every: the reference of the KL penalty, once it is not the base model

safetensors and JSON only: a dump may come from elsewhere. It is there whole or not at all; the oldest go (`KEPT`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.config import load as config_load
from fst_fast.errors import UserError
from fst_fast.forest import Leaf, sampled_tokens
from fst_fast.policy import lora
from fst_fast.policy.trained import NonFiniteError, TrainedPolicy
from fst_fast.run.folder import disk_errors, fsync_folder, write_atomic
from fst_fast.slow.groups import Group
from fst_fast.slow.update import Sequences, unmeasured

FORMAT = 1
KEPT = 2  # dumps, each with the weights
REFERENCE = "reference"


def skip_or_stop(
    error: NonFiniteError,
    dump: Path | None,
    on_nonfinite: Literal["stop", "skip"],
    policy: TrainedPolicy,
    step: int,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """on_nonfinite=stop: raise UserError. skip: discard the gradients and return the numbers of a step that was left out.

    dump: folder of the dumped batch, None for a step of distillation, which is not dumped."""
    if on_nonfinite == "stop":
        batch = (
            f"The batch is in {dump}, which `fst replay` repeats; "
            if dump
            else "A step of distillation is not dumped; "
        )
        raise UserError(
            f"step {step}: {error}; the weights were not touched, on_nonfinite=stop. {batch}"
            "lower slow.lr or skip such batches, and continue with --resume --allow-config-change"
        ) from None
    policy.discard()
    note(f"step {step} is left out: {error}" + (f"; the batch is in {dump}" if dump else ""))
    return {**unmeasured(policy.lr(step)), "skipped": True}


def write_dump(
    run_dir: Path,
    error: NonFiniteError,
    data: Sequences,
    groups: Sequence[Group],
    config: Config,
    *,
    step: int,
    pad_id: int,
    model: nn.Module,
    reference: nn.Module | None = None,
) -> Path:
    """Write the dump of `step`; all processes call it, `data` and `groups` are their own. model: the whole weights, on rank 0. reference: of the KL
    penalty, None for the base model."""
    folder = run_dir / "dumps" / f"step-{step:06d}"
    tmp = folder.with_name(f".tmp-{folder.name}")
    losses = distributed.all_gather([repr(loss) for loss in error.losses])
    sequences = distributed.all_gather(
        [_line(m) for g in groups for m in g.members if len(m.rollout.response_ids)]
    )
    with disk_errors(f"{folder} cannot be written"):
        if distributed.rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        distributed.barrier()
        save_file(sequences_to_arrays(data), tmp / f"rank-{distributed.rank()}.safetensors")
        distributed.barrier()
        if distributed.rank() == 0:
            lora.save(model, tmp)
            if reference is not None:
                reference.save_pretrained(tmp / REFERENCE)  # type: ignore[operator]
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


def read_dump(folder: Path) -> tuple[dict[str, Any], list[Sequences]]:
    """dump.json, and the sequences of every process. Raises UserError where `folder` is no whole dump."""
    try:
        tree: dict[str, Any] = json.loads((folder / "dump.json").read_text())
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
    return tree, shares


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
    masked = any(leaf.sampled is not None for leaf in data.leaves)  # of episodes
    return {
        "prompt_ids": np.concatenate(prompts or empty),
        "prompt_lengths": np.array([len(p) for p in prompts], np.int64),
        "response_ids": np.concatenate(responses or empty),
        "response_lengths": np.array([len(r) for r in responses], np.int64),
        "advantages": data.advantages,
        "weights": data.weights,
        "behaviour": data.behaviour,
        **({"sampled": sampled_tokens(data.leaves)} if masked else {}),
    }


def arrays_to_sequences(arrays: dict[str, NDArray[Any]]) -> Sequences:
    """Undo `sequences_to_arrays`."""

    def pieces(values: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
        return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []

    ids, lengths = arrays["response_ids"], arrays["response_lengths"]
    prompts = pieces(arrays["prompt_ids"], arrays["prompt_lengths"])
    sampled = pieces(arrays.get("sampled", np.ones(len(ids), bool)), lengths)
    triples = zip(prompts, pieces(ids, lengths), sampled, strict=True)
    return Sequences(
        leaves=[Leaf(prompt, response, None if s.all() else s) for prompt, response, s in triples],
        start=np.cumsum(lengths) - lengths,
        advantages=arrays["advantages"],
        weights=arrays["weights"],
        behaviour=arrays["behaviour"],
    )
