"""Forward passes for scoring only: log-probs and exact KL of rollouts packed as a forest or padded batch.

Used for the reference's log-probs in the slow phase and for KL(train||base) in the evaluation. Training and scoring
both cut leaves into micro-batches here, so they cut a forest in the same way. CpuForward replaces the model's forward where it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.forest import Leaf, split
from fst_fast.policy import head
from fst_fast.policy.attention import TreePlan
from fst_fast.policy.cpu_forward import CpuForward, unsupported_reason
from fst_fast.policy.packing import PackedBatch, forest_batch, model_inputs, padded_batch
from fst_kernels import LogprobOutput


@dataclass(frozen=True)
class Batching:
    """How leaves are cut into micro-batches, and how the head processes them.

    tokens: per micro-batch and process. head_rows: rows of logits that exist at one time. temperature: of all
    log-probs. pad_id: pads padded batches."""

    packing: Literal["forest", "padded"]
    tokens: int
    head_rows: int
    temperature: float
    pad_id: int

    @classmethod
    def of(cls, config: Config, pad_id: int) -> Batching:
        """The batching that the config sets for training."""
        slow = config.slow
        return cls(
            config.policy.packing, slow.tokens_per_micro_batch, slow.head_chunk_rows, config.rollout.temperature, pad_id
        )  # fmt: skip


@dataclass
class MicroBatch:
    """Some leaves, packed. `leaves` are indices into the caller's list; `batch.leaf` counts within the micro-batch."""

    leaves: list[int]
    batch: PackedBatch
    at: head.Labels


def micro_batches(leaves: Sequence[Leaf], batching: Batching) -> list[MicroBatch]:
    """Cut by subtree into parts of at most `batching.tokens` and pack (forest), or cut in order and pad (padded)."""
    forest = batching.packing == "forest"
    parts = split(leaves, batching.tokens) if forest else _padded_parts(leaves, batching.tokens)
    out = []
    for part in parts:
        chosen = [leaves[i] for i in part]
        batch = forest_batch(chosen, share="prompts", device=distributed.device()) if forest else padded_batch(
            chosen, pad_id=batching.pad_id, device=distributed.device()
        )  # fmt: skip
        out.append(MicroBatch(part, batch, head.Labels.of(batch.rows, batch.labels, distributed.device())))
    return out


def _padded_parts(leaves: Sequence[Leaf], budget: int) -> list[list[int]]:
    """Micro-batches of a padded pass: similar lengths together, at most `budget` tokens with padding, at least one leaf."""
    lengths = [len(leaf.prompt_ids) + len(leaf.response_ids) for leaf in leaves]
    parts: list[list[int]] = []
    for i in sorted(range(len(leaves)), key=lambda i: lengths[i]):
        if parts and (len(parts[-1]) + 1) * lengths[i] <= budget:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts


class Scorer:
    """Scoring passes with one model, whose weights must not change while the scorer lives: on a CPU the first pass makes a fused copy of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._fused: CpuForward | None = None

    @torch.no_grad()
    def hidden_rows(self, micro: MicroBatch) -> Tensor:
        """Hidden states of the labelled rows: [R, H]."""
        if (plan := self._cpu_plan(micro)) is not None:
            self._fused = self._fused or CpuForward(self.model)
            ids, positions = micro.batch.input_ids[0], micro.batch.position_ids[0]
            return self._fused.hidden(ids, positions, plan, micro.at.unique)
        with head.running(self.model, head.HiddenJob(micro.at)):
            out: Tensor = self.model(**model_inputs(micro.batch)).logits
        return out

    @torch.no_grad()
    def logprobs(self, micro: MicroBatch, batching: Batching) -> Tensor:
        """Log-prob of every label at the batching's temperature: [M] fp32."""
        return self.run(micro, head.ScoreJob(micro.at, batching.temperature, batching.head_rows)).logprob

    @torch.no_grad()
    def run(self, micro: MicroBatch, job: head.ScoreJob) -> LogprobOutput:
        """The job inside the model's head module, where ZeRO-3 has gathered its weight, or after CpuForward, which needs no gathering."""
        if self._cpu_plan(micro) is not None:
            rows = self.hidden_rows(micro)
            lm_head = self.model.get_output_embeddings()  # type: ignore[operator]
            job.at = replace(micro.at, unique=torch.arange(len(rows), device=rows.device))
            job(rows, lm_head.weight, lm_head.bias)
        else:
            with head.running(self.model, job):
                self.model(**model_inputs(micro.batch))
        assert job.out is not None
        return job.out

    def _cpu_plan(self, micro: MicroBatch) -> TreePlan | None:
        """The micro-batch's plan where CpuForward can run it."""
        plan = micro.batch.plan
        return plan if isinstance(plan, TreePlan) and unsupported_reason(self.model) is None else None


@torch.no_grad()
def kl_to_reference(
    model: nn.Module, reference: nn.Module, leaves: Sequence[Leaf], batching: Batching
) -> tuple[float, int]:
    """(exact KL(model || reference) over the vocabulary, summed over the response tokens of `leaves`; number of these tokens)."""
    ref_head = reference.get_output_embeddings()  # type: ignore[operator]
    total, count = 0.0, 0
    scorer, ref_scorer = Scorer(model), Scorer(reference)
    for micro in micro_batches(leaves, batching):
        job = head.ScoreJob(
            micro.at, batching.temperature, batching.head_rows,
            ref_hidden=ref_scorer.hidden_rows(micro), ref_weight=ref_head.weight, ref_bias=ref_head.bias,
        )  # fmt: skip
        scored = scorer.run(micro, job)
        assert scored.kl is not None
        total += float(scored.kl[micro.at.row_of].sum(dtype=torch.float64))
        count += len(micro.at.labels)
    return total, count
