"""On-policy context distillation: what the evolved contexts know moves into the weights.

The weights as they are when distillation begins are the teacher, frozen. The student samples under the seed context; at every token of its
response the loss is the exact reverse KL over the vocabulary, KL(student under the seed context || teacher under an evolved context), both
at the training temperature. Sampling from the student and the reverse direction are those of on-policy distillation (arXiv 2306.13649,
2306.08543); one model as teacher with its context and as student without it is context distillation (arXiv 2209.15189).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fst_fast.contracts import Context, ScoredRollout
from fst_fast.forest import Leaf
from fst_fast.policy.scoring import Batching, MicroBatch, micro_batches
from fst_fast.slow.groups import Group
from fst_fast.slow.update import Reference
from fst_kernels import PolicyObjective

OBJECTIVE = PolicyObjective("reinforce", kl="reverse", kl_coef=1.0)
"""With advantages of 0 the KL to the teacher is the whole loss."""


def teacher_contexts(problems: int, first: int, population: Sequence[Context]) -> list[Context]:
    """The teacher's context for each of a step's problems: the population in turn, `first` problems having gone before."""
    return [population[(first + i) % len(population)] for i in range(problems)]


def distillation_groups(scored: Sequence[ScoredRollout]) -> list[Group]:
    """Rollouts by problem, in order, with advantages of 0."""
    by_problem: dict[str, list[ScoredRollout]] = {}
    for s in scored:
        by_problem.setdefault(s.rollout.problem_id, []).append(s)
    return [Group(i, members, np.zeros(len(members), np.float32)) for i, members in by_problem.items()]


class Teacher(Reference):
    """The frozen teacher as the reference of a step: it reads each of the step's leaves behind a prompt of its own.

    leaves: the step's leaves, in the order of its sequences, with the teacher's prompts."""

    def __init__(self, model: nn.Module, leaves: Sequence[Leaf], batching: Batching) -> None:
        super().__init__(model)
        self._leaves, self._batching = leaves, batching

    def hidden(self, micro: MicroBatch) -> Tensor:
        """Hidden states for the student's labelled rows: [R, H].

        Rows of one response have other indices behind another prompt, so they are matched by (leaf, offset). A row that leaves share (a
        prompt's last token, before several responses) is one row for student and teacher: a problem has one teacher context."""
        out: Tensor | None = None
        place = _row_by_label(micro)
        for part in micro_batches([self._leaves[i] for i in micro.leaves], self._batching):
            self.count(part)
            hidden = self.scorer.hidden_rows(part)  # [r, H]
            if out is None:
                out = hidden.new_empty(len(micro.at.unique), hidden.shape[1])
            leaf = np.asarray(part.leaves)[part.batch.leaf.numpy()]
            to = torch.from_numpy(place[leaf, part.batch.offset.numpy()]).to(hidden.device)
            out[to] = hidden[part.at.row_of]
        assert out is not None, "a micro-batch has leaves"
        return out


def _row_by_label(micro: MicroBatch) -> NDArray[np.int64]:
    """[leaves, longest response]: the labelled row that predicts a leaf's token at an offset, -1 where there is none."""
    leaf, offset = micro.batch.leaf.numpy(), micro.batch.offset.numpy()
    place = np.full((len(micro.leaves), int(offset.max()) + 1), -1, np.int64)
    place[leaf, offset] = micro.at.row_of.cpu().numpy()
    return place
