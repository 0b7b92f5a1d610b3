"""On-policy context distillation: what the evolved contexts know moves into the weights, so that it is there without them.

The weights as they are when it begins are the teacher, frozen. The student samples under the seed context; at every token of its response
the loss is the exact reverse KL over the vocabulary, KL(student under the seed context || teacher under an evolved context), both at the
training temperature. Sampling from the student and the reverse direction are those of on-policy distillation (arXiv 2306.13649, 2306.08543);
that teacher and student are one model with and without its context is context distillation (arXiv 2209.15189).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fst_fast.config import Config
from fst_fast.contracts import Context, Sampled
from fst_fast.forest import Leaf
from fst_fast.policy.packing import PackedBatch
from fst_fast.policy.scoring import MicroBatch, hidden_rows, micro_batches
from fst_fast.policy.trained import Policy
from fst_fast.slow.groups import Group
from fst_fast.slow.update import optimise, sequences


def contexts_of(problems: int, first: int, population: Sequence[Context]) -> list[Context]:
    """The teacher's context for each of a step's problems: the population in turn, going on from step to step."""
    return [population[(first + i) % len(population)] for i in range(problems)]


def groups(sampled: Sequence[Sampled]) -> list[Group]:
    """Rollouts by problem, in order; there are no advantages here, so none is left out."""
    by_problem: dict[str, list[Sampled]] = {}
    for s in sampled:
        by_problem.setdefault(s.rollout.problem_id, []).append(s)
    return [Group(i, some, np.zeros(len(some), np.float32)) for i, some in by_problem.items()]


def distil(
    policy: Policy,
    teacher: nn.Module,
    kept: Sequence[Group],
    prompts: Sequence[Sequence[NDArray[np.int64]]],
    teacher_prompts: Sequence[Sequence[NDArray[np.int64]]],
    config: Config,
    *,
    step: int,
    pad_id: int,
) -> dict[str, Any]:
    """One optimiser step; returns what slow.step.optimise returns, `kl` being the KL to the teacher. All processes must call it.

    prompts, teacher_prompts: of every member of every group, with the seed context and with the teacher's."""
    data = sequences(kept, prompts, config.slow.aggregation)
    flat = [prompt for group in teacher_prompts for prompt in group]
    read = [Leaf(prompt, leaf.response_ids) for prompt, leaf in zip(flat, data.leaves, strict=True)]
    counted = [0, 0]

    def rows(micro: MicroBatch) -> Tensor:
        hidden, batches = teacher_rows(teacher, micro, read, config, pad_id)
        counted[0] += sum(batch.tokens for batch in batches)
        counted[1] += sum(batch.unshared for batch in batches)
        return hidden

    slow = {"kl": "reverse", "kl_coef": 1.0, "entropy_coef": 0.0, "objective": "reinforce"}
    only_kl = config.model_copy(update={"slow": config.slow.model_copy(update=slow)})
    numbers = optimise(
        policy, teacher, data, only_kl, step=step, pad_id=pad_id, reference_rows=rows
    )  # its count takes the teacher's pass for one over the student's prompts
    numbers["tokens"] = numbers["tokens"] // 2 + counted[0]
    numbers["unshared"] = numbers["unshared"] // 2 + counted[1]
    return numbers


def teacher_rows(
    teacher: nn.Module, micro: MicroBatch, read: Sequence[Leaf], config: Config, pad_id: int
) -> tuple[Tensor, list[PackedBatch]]:
    """The teacher's hidden states for the student's labelled rows: [R, H], and the batches that it read. read: all of the step's leaves
    behind the teacher's prompts.

    Rows of one response stand at other places behind another prompt, so they are matched by (leaf, offset). A row that leaves share (a
    prompt's last token, before several responses) is one row for the student and for the teacher: a problem has one teacher's context."""
    out: Tensor | None = None
    batches = []
    place = _first_label(micro)
    for part in micro_batches([read[i] for i in micro.leaves], config, pad_id):
        hidden = hidden_rows(teacher, part)  # [r, H]
        if out is None:
            out = hidden.new_empty(len(micro.at.unique), hidden.shape[1])
        leaf = np.asarray(part.leaves)[part.batch.leaf.numpy()]
        to = torch.from_numpy(place[leaf, part.batch.offset.numpy()]).to(hidden.device)
        out[to] = hidden[part.at.row_of]
        batches.append(part.batch)
    assert out is not None, "a micro-batch has leaves"
    return out, batches


def _first_label(micro: MicroBatch) -> NDArray[np.int64]:
    """[leaves, longest response]: the row among the labelled ones that predicts a leaf's token at an offset."""
    leaf, offset = micro.batch.leaf.numpy(), micro.batch.offset.numpy()
    place = np.full((len(micro.leaves), int(offset.max()) + 1), -1, np.int64)
    place[leaf, offset] = micro.at.row_of.cpu().numpy()
    return place
