"""One optimiser step: groups of rollouts in, one forest per micro-batch, one fused loss, one update.

The loss is a sum over tokens of n_t [ PG_t + kl_coef KL_t - entropy_coef H_t ] whose weights n_t carry ONE denominator for the whole
step, over all micro-batches and processes; so the update does not depend on how the step is cut. Behaviour log-probs are the ones stored
when the tokens were sampled (arXiv 2605.12484, Eq. 4: rho = pi_theta / pi_behaviour), also for rollouts reused from the fast phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fst_fast import distributed
from fst_fast.forest import Leaf
from fst_fast.policy import head
from fst_fast.policy.packing import model_inputs, to_device
from fst_fast.policy.scoring import Batching, MicroBatch, Scorer, micro_batches
from fst_fast.policy.sequence_loss import SEQUENCE_SUMS, Mismatch, SequenceLossJob
from fst_fast.policy.trained import NonFiniteError, TrainedPolicy
from fst_fast.rollout.turns import leaves_of
from fst_fast.slow.groups import Group, token_weights
from fst_kernels import PolicyObjective, PolicyStats
from fst_kernels.linear_policy_loss.objective import SUMS


@dataclass(frozen=True)
class Sequences:
    """The step's training sequences on this process and their per-token numbers, concatenated in leaf order."""

    leaves: list[Leaf]
    start: NDArray[np.int64]  # [L], where each leaf's tokens begin in the arrays below
    advantages: NDArray[np.float32]  # [T]
    weights: NDArray[np.float32]  # [T], n_t
    behaviour: NDArray[np.float32]  # [T], log-probs as sampled


class Reference:
    """The frozen model that the KL term compares the policy with. It reads the policy's own prompts; a subclass may read others.

    tokens, unshared: computed so far, and the same work without sharing."""

    def __init__(self, model: nn.Module, scorer: Scorer | None = None) -> None:
        self.model = model
        self.scorer = scorer or Scorer(model)
        self.tokens = self.unshared = 0

    def hidden(self, micro: MicroBatch) -> Tensor:
        """Hidden states of the micro-batch's labelled rows: [R, H]."""
        self.count(micro)
        return self.scorer.hidden_rows(micro)

    def logprobs(self, micro: MicroBatch, batching: Batching) -> Tensor:
        """Log-probs of the micro-batch's labels: [M] fp32."""
        self.count(micro)
        return self.scorer.logprobs(micro, batching)

    def count(self, micro: MicroBatch) -> None:
        self.tokens += micro.batch.tokens
        self.unshared += micro.batch.unshared


def sequences(
    groups: Sequence[Group],
    prompts: Sequence[Sequence[NDArray[np.int64]]],
    aggregation: str,
    constant: float | None = None,
) -> Sequences:
    """Flatten the kept groups. prompts: the prompt ids of every member of every group. constant: the denominator, where the number of tokens
    does not give it. All processes must call it.

    A response without tokens has nothing to train and becomes no sequence."""
    weights, denominator = token_weights(groups, aggregation)
    [denominator] = distributed.all_reduce_sum([denominator]) if constant is None else [constant]
    leaves, a, n, old = [], [], [], []
    for group, group_prompts, group_weights in zip(groups, prompts, weights, strict=True):
        assert group.advantages is not None
        for member, prompt, advantage, weight in zip(
            group.members, group_prompts, group.advantages, group_weights, strict=True
        ):
            for leaf, behaviour in leaves_of(prompt, member.rollout):
                leaves.append(leaf)
                a.append(np.full(len(behaviour), advantage, np.float32))
                n.append(np.full(len(behaviour), weight / denominator, np.float32))
                old.append(behaviour)
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
    policy: TrainedPolicy,
    reference: Reference | None,
    data: Sequences,
    objective: PolicyObjective,
    batching: Batching,
    *,
    step: int,
    mismatch: Mismatch | None = None,
) -> dict[str, Any]:
    """Forward, backward and update on `data`; returns the step's numbers, summed over processes. All processes must call it.

    reference: needed where the objective has a KL term. With no sequence anywhere (every group had zero variance) nothing is updated and
    nothing measured. A number that was not measured is None, the KL of an objective without one too. `tokens` and `unshared` count this process's work, the reference's included. Raises NonFiniteError.
    """
    [anywhere] = distributed.all_reduce_sum([len(data.leaves)])
    if not anywhere:
        return unmeasured(policy.lr(step))
    check_finite(data)
    micros, jobs = micro_jobs(data, reference, objective, batching, mismatch)
    tokens = sum(m.batch.tokens for m in micros) + (reference.tokens if reference else 0)
    unshared = sum(m.batch.unshared for m in micros) + (reference.unshared if reference else 0)
    # Every process runs the same number of micro-batches: ZeRO's collectives are inside them. A filler has zero weight.
    filler = Leaf(np.array([batching.pad_id]), np.array([batching.pad_id]))
    for _ in range(distributed.all_reduce_max(len(micros)) - len(micros)):
        [micro] = micro_batches([filler], batching)
        plain = None if reference is None else Reference(reference.model, reference.scorer)
        jobs.append(_job(micro, _filler_data(filler), plain, objective, batching, mismatch))
    if reference is not None:
        reference.scorer = Scorer(reference.model)  # frees the fused copy of its weights
    try:
        policy.forward_backward(jobs)
    except NonFiniteError as error:
        error.losses = error.losses[: len(micros)]  # a dump holds no filler
        raise
    grad_norm = policy.step(policy.lr(step))
    return {
        "grad_norm": grad_norm,
        "lr": policy.lr(step),
        "tokens": tokens,
        "unshared": unshared,
        **_means([job for _, job in jobs], objective, mismatch),
    }


def check_finite(data: Sequences) -> None:
    """Raises NonFiniteError, on all processes, where a log-prob or an advantage of any of them is NaN or Inf. All processes call it."""
    bad = distributed.all_reduce_sum(
        [float((~np.isfinite(x)).sum()) for x in (data.behaviour, data.advantages)]
    )
    if any(bad):
        raise NonFiniteError(
            f"{int(bad[0])} non-finite log-probs of sampled tokens, {int(bad[1])} tokens with a non-finite advantage"
        )


def micro_jobs(
    data: Sequences,
    reference: Reference | None,
    objective: PolicyObjective,
    batching: Batching,
    mismatch: Mismatch | None = None,
) -> tuple[list[MicroBatch], list[tuple[dict[str, Any], head.LossJob]]]:
    """This process's micro-batches, and for each the model's inputs and the job of its head."""
    micros = micro_batches(data.leaves, batching) if data.leaves else []
    return micros, [_job(micro, data, reference, objective, batching, mismatch) for micro in micros]


def unmeasured(lr: float) -> dict[str, Any]:
    """The numbers of a step in which nothing was trained, or which was left out: none."""
    return {"grad_norm": None, "lr": lr, "tokens": 0, "unshared": 0, **dict.fromkeys(MEANS)}


def _filler_data(leaf: Leaf) -> Sequences:
    zero = np.zeros(1, np.float32)
    return Sequences([leaf], np.zeros(1, np.int64), zero, zero, zero)


def _job(
    micro: MicroBatch,
    data: Sequences,
    reference: Reference | None,
    objective: PolicyObjective,
    batching: Batching,
    mismatch: Mismatch | None,
) -> tuple[dict[str, Any], head.LossJob]:
    device = micro.at.labels.device
    leaf = np.asarray(micro.leaves)[micro.batch.leaf.numpy()]
    at = torch.from_numpy(data.start[leaf] + micro.batch.offset.numpy())

    def tokens(values: NDArray[np.float32]) -> Tensor:
        return to_device(torch.from_numpy(values)[at], device)

    given: dict[str, Any] = {
        "at": micro.at,
        "objective": objective,
        "advantages": tokens(data.advantages),
        "token_weight": tokens(data.weights),
        "old_logprob": tokens(data.behaviour),
        "temperature": batching.temperature,
        "chunk_rows": batching.head_rows,
    }
    if objective.kind == "gspo" or mismatch is not None:
        sequence = to_device(micro.batch.leaf, device)
        job: head.LossJob = SequenceLossJob(
            **given, sequence=sequence, sequences=len(micro.leaves), mismatch=mismatch
        )
    else:
        job = head.LossJob(**given)
    if objective.kl is not None:
        assert reference is not None, f"kl={objective.kl} needs a reference"
        if objective.kl == "k3":
            job.ref_logprob = reference.logprobs(micro, batching)
        else:
            ref_head = reference.model.get_output_embeddings()  # type: ignore[operator]
            job.ref_hidden = reference.hidden(micro)
            job.ref_weight, job.ref_bias = ref_head.weight.detach(), ref_head.bias
    return model_inputs(micro.batch), job


MEANS = (
    "loss", "kl", "entropy", "ratio_mean", "clipped_fraction", "clipped_low_fraction", "clipped_high_fraction", "mismatch_kl",
    "mismatch_weight", "mismatch_cut",
)  # fmt: skip


def _means(
    jobs: Sequence[head.LossJob], objective: PolicyObjective, mismatch: Mismatch | None
) -> dict[str, float | None]:
    """The logged means over all processes' tokens, by the names of MEANS; None for what the objective does not have, and where there is no
    token to take one over. For gspo the three fractions of clipped are of sequences, not of tokens."""
    sums = torch.zeros(len(SUMS) + SEQUENCE_SUMS, dtype=torch.float64)
    of_jobs = []
    for job in jobs:
        assert job.stats is not None
        more = job.sequence_sums if isinstance(job, SequenceLossJob) else None
        none = job.stats.sums.new_zeros(SEQUENCE_SUMS)
        of_jobs.append(torch.cat([job.stats.sums, none if more is None else more]))
    if of_jobs:
        for of_job in torch.stack(of_jobs).cpu():  # the device is waited for once
            sums += of_job
    everywhere = distributed.all_reduce_sum(sums.tolist())
    stats = PolicyStats(torch.tensor(everywhere[: len(SUMS)], dtype=torch.float64))
    weight, cut_labels, cut_sequences, sequences = everywhere[len(SUMS) :]
    labels = float(stats.count)
    if not labels:
        return dict.fromkeys(MEANS)
    found: dict[str, float | None] = dict.fromkeys(MEANS)
    found |= {
        "loss": float(stats.loss),
        "kl": None if objective.kl is None else float(stats.kl),
        "entropy": float(stats.entropy),
        "ratio_mean": float(stats.ratio),
        "mismatch_kl": float(stats.mismatch_kl),
    }
    if objective.kind != "reinforce":
        over = sequences if objective.kind == "gspo" else labels
        clipped, low, high = (
            everywhere[SUMS.index(n)] / over for n in ("clipped", "clipped_low", "clipped_high")
        )
        found |= {"clipped_fraction": clipped, "clipped_high_fraction": high}
        found["clipped_low_fraction"] = None if objective.kind == "cispo" else low
    if mismatch is not None:
        found["mismatch_weight"] = weight / labels
        found["mismatch_cut"] = (
            cut_labels / labels if mismatch.level == "token" else cut_sequences / sequences
        )
    return found
