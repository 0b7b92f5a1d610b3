"""One optimiser step: groups of rollouts in, one forest per micro-batch, one fused loss, one update.

The loss is a sum over tokens of n_t [ PG_t + kl_coef KL_t - entropy_coef H_t ] whose weights n_t carry ONE denominator for the whole
step, over all micro-batches and processes; so the update does not depend on how the step is cut. Behaviour log-probs are the ones stored
when the tokens were sampled (arXiv 2605.12484, Eq. 4: rho = pi_theta / pi_behaviour), also for rollouts reused from the fast phase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.forest import Leaf
from fst_fast.policy import head
from fst_fast.policy.packing import model_inputs, send
from fst_fast.policy.scoring import MicroBatch, hidden_rows, logprobs, micro_batches
from fst_fast.policy.trained import NonFiniteError, Policy
from fst_fast.slow.groups import Group, token_weights
from fst_kernels import PolicyObjective, PolicyStats
from fst_kernels.linear_policy_loss.objective import SUMS

ReferenceRows = Callable[[MicroBatch], Tensor]
"""Hidden states [R, H] of the reference for a micro-batch's labelled rows."""


@dataclass(frozen=True)
class Sequences:
    """The step's training sequences on this process and their per-token numbers, concatenated in leaf order."""

    leaves: list[Leaf]
    start: NDArray[np.int64]  # [L], where each leaf's tokens begin in the arrays below
    advantages: NDArray[np.float32]  # [T]
    weights: NDArray[np.float32]  # [T], n_t
    behaviour: NDArray[np.float32]  # [T], log-probs as sampled


def objective(config: Config) -> PolicyObjective:
    slow = config.slow
    return PolicyObjective(
        kind=slow.objective,
        ratio_cap=slow.ratio_cap,
        clip_low=slow.clip_low,
        clip_high=slow.clip_high,
        kl=_kl(config),
        kl_coef=slow.kl_coef,
        entropy_coef=slow.entropy_coef,
    )


def _kl(config: Config) -> Any:
    return None if config.slow.kl == "none" or config.slow.kl_coef == 0 else config.slow.kl


def sequences(
    groups: Sequence[Group], prompts: Sequence[Sequence[NDArray[np.int64]]], aggregation: str
) -> Sequences:
    """Flatten the kept groups. prompts: the prompt ids of every member of every group. All processes must call it."""
    weights, denominator = token_weights(groups, aggregation)
    [denominator] = distributed.total([denominator])
    leaves, a, n, old = [], [], [], []
    for group, group_prompts, group_weights in zip(groups, prompts, weights, strict=True):
        assert group.advantages is not None
        for member, prompt, advantage, weight in zip(
            group.sampled, group_prompts, group.advantages, group_weights, strict=True
        ):
            length = len(member.rollout.response_ids)
            leaves.append(Leaf(prompt, member.rollout.response_ids))
            a.append(np.full(length, advantage, np.float32))
            n.append(np.full(length, weight / denominator, np.float32))
            old.append(member.rollout.logprobs.astype(np.float32))
    lengths = np.array([len(leaf.response_ids) for leaf in leaves], np.int64)
    empty = [np.zeros(0, np.float32)]
    return Sequences(
        leaves=leaves,
        start=np.cumsum(lengths) - lengths,
        advantages=np.concatenate(a or empty),
        weights=np.concatenate(n or empty),
        behaviour=np.concatenate(old or empty),
    )


def optimise(
    policy: Policy,
    reference: nn.Module | None,
    data: Sequences,
    config: Config,
    *,
    step: int,
    pad_id: int,
    reference_rows: ReferenceRows | None = None,
) -> dict[str, Any]:
    """Forward, backward and update on `data`; returns the step's numbers, summed over processes. All processes must call it.

    With no sequence anywhere (every group had zero variance) nothing is updated and the loss is 0. reference_rows: the reference's hidden
    states where it reads other prompts than the policy; None: the same.
    """
    [anywhere] = distributed.total([len(data.leaves)])
    if not anywhere:
        return {"grad_norm": 0.0, "lr": policy.lr(step), "tokens": 0, "unshared": 0, **_means(None)}
    check_finite(data)
    micros, jobs = micro_jobs(data, config, reference, pad_id, reference_rows)
    # Every process runs the same number of micro-batches: ZeRO's collectives are inside them. A filler has zero weight.
    filler = Leaf(np.array([pad_id]), np.array([pad_id]))
    for _ in range(distributed.largest(len(micros)) - len(micros)):
        [micro] = micro_batches([filler], config, pad_id)
        jobs.append(_job(micro, _filler_data(filler), config, reference, None))
    policy.forward_backward(jobs)
    grad_norm = policy.step(policy.lr(step))
    passes = 1 if _kl(config) is None else 2
    tokens = passes * sum(m.batch.tokens for m in micros)
    unshared = passes * sum(m.batch.unshared for m in micros)
    stats = None
    for _, job in jobs:
        assert job.stats is not None
        stats = job.stats if stats is None else stats + job.stats
    return {
        "grad_norm": grad_norm,
        "lr": policy.lr(step),
        "tokens": tokens,
        "unshared": unshared,
        **_means(stats),
    }


def check_finite(data: Sequences) -> None:
    """Raises NonFiniteError, on all processes, where a log-prob or an advantage of any of them is NaN or Inf. All processes call it."""
    bad = distributed.total([float((~np.isfinite(x)).sum()) for x in (data.behaviour, data.advantages)])
    if any(bad):
        raise NonFiniteError(
            f"{int(bad[0])} non-finite log-probs of sampled tokens, {int(bad[1])} tokens with a non-finite advantage"
        )


def micro_jobs(
    data: Sequences,
    config: Config,
    reference: nn.Module | None,
    pad_id: int,
    reference_rows: ReferenceRows | None = None,
) -> tuple[list[MicroBatch], list[tuple[dict[str, Any], head.LossJob]]]:
    """This process's micro-batches, and the forward/backward jobs they are."""
    micros = micro_batches(data.leaves, config, pad_id) if data.leaves else []
    return micros, [_job(micro, data, config, reference, reference_rows) for micro in micros]


def skipped(lr: float) -> dict[str, Any]:
    """The numbers of a step that was not taken: none."""
    return {"grad_norm": None, "lr": lr, "tokens": 0, "unshared": 0, **dict.fromkeys(_means(None))}


def _filler_data(leaf: Leaf) -> Sequences:
    zero = np.zeros(1, np.float32)
    return Sequences([leaf], np.zeros(1, np.int64), zero, zero, zero)


def _job(
    micro: MicroBatch,
    data: Sequences,
    config: Config,
    reference: nn.Module | None,
    reference_rows: ReferenceRows | None,
) -> tuple[dict[str, Any], head.LossJob]:
    device = micro.at.labels.device
    leaf = np.asarray(micro.leaves)[micro.batch.leaf.numpy()]
    at = torch.from_numpy(data.start[leaf] + micro.batch.offset.numpy())

    def tokens(values: NDArray[np.float32]) -> Tensor:
        return send(torch.from_numpy(values)[at], device)

    job = head.LossJob(
        at=micro.at,
        objective=objective(config),
        advantages=tokens(data.advantages),
        token_weight=tokens(data.weights),
        old_logprob=tokens(data.behaviour),
        temperature=config.rollout.temperature,
        chunk_rows=config.slow.head_chunk_rows,
    )
    form = _kl(config)
    if form is not None:
        assert reference is not None
        if form == "k3":
            job.ref_logprob = logprobs(
                reference,
                micro,
                temperature=config.rollout.temperature,
                chunk_rows=config.slow.head_chunk_rows,
            )
        else:
            ref_head = reference.get_output_embeddings()  # type: ignore[operator]
            job.ref_hidden = reference_rows(micro) if reference_rows else hidden_rows(reference, micro)
            job.ref_weight, job.ref_bias = ref_head.weight.detach(), ref_head.bias
    return model_inputs(micro.batch), job


def _means(stats: PolicyStats | None) -> dict[str, float]:
    """The logged means over all processes' tokens."""
    sums = torch.zeros(len(SUMS), dtype=torch.float64) if stats is None else stats.sums.cpu()
    everywhere = PolicyStats(torch.tensor(distributed.total(sums.tolist()), dtype=torch.float64))
    return {
        "loss": float(everywhere.loss),
        "kl": float(everywhere.kl),
        "entropy": float(everywhere.entropy),
        "ratio_mean": float(everywhere.ratio),
        "clipped_fraction": float(everywhere.clipped_fraction),
        "mismatch_kl": float(everywhere.mismatch_kl),
    }
