"""linear_logprob (mode A) and its peers: log-probs and entropy of labels, and the gradients of a loss composed of them.

    python -m pytest benchmarks/linear_logprob.py [--size N,H,V] [--rounds R] [--threads T] [--out benchmarks/results]

Variants: `forward` is log-probs and entropy under no_grad, the scoring pass (only log-probs for a peer without entropy;
the JSON then lacks the column `entropy_max`). `step` is forward and backward of log-probs with a given upstream
gradient; `backward` is that backward alone; `step, KL` also computes the exact KL to a reference and its gradient.
Floors in operations: 2, 8, 6 and 12 NHV (docs/benchmarks.md). Two cases alternate, so that no round finds its inputs in
a cache. bf16 on a GPU, fp32 on a CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import head_peers as heads
from benchmarks import head_rows, measure
from benchmarks.head_peers import Case, Size, Values
from benchmarks.head_rows import COLUMNS, DEFAULT_SIZE, Work

__all__ = ["COLUMNS", "DEFAULT_SIZE"]

OPERATIONS = {"forward": 2, "step": 8, "backward": 6, "step, KL": 12}


def unable(name: str, variant: str) -> str | None:
    peer = heads.LOGPROBS[name]
    return "it has no KL" if variant == "step, KL" and not peer.kl else peer.unable(heads.dtype())


def values_of(name: str, variant: str, case: Case) -> Values:
    peer = heads.LOGPROBS[name]
    entropy = variant == "forward" and peer.entropy
    ref_hidden = case.ref_hidden if variant == "step, KL" else None
    return peer.values(case.hidden, case.weight, case.labels, ref_hidden, entropy)


def composed(values: Values, case: Case) -> Tensor:
    """A loss whose gradients with respect to log-probs and KL are case.upstream."""
    loss = (values.logprob * case.upstream[0]).sum()
    return loss if values.kl is None else loss + (values.kl * case.upstream[1]).sum()


def gradients(values: Values, case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(composed(values, case), (case.hidden, case.weight))


def call(name: str, variant: str, case: Case) -> head_rows.Call:
    if variant == "backward":
        values = values_of(name, variant, case)
        return lambda: gradients(values, case)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(x for x in values_of(name, variant, case) if x is not None)

    return forward if variant == "forward" else lambda: gradients(values_of(name, variant, case), case)


def errors(name: str, variant: str, case: Case) -> measure.Row:
    if variant == "backward":
        return {}
    truth = head_rows.truth_of_case(
        (*case.hidden.shape, case.weight.shape[0]), composed, variant == "step, KL"
    )
    if variant == "forward":
        with torch.no_grad():
            return head_rows.value_errors(values_of(name, variant, case), truth.values)
    values = values_of(name, variant, case)
    row = head_rows.value_errors(values._replace(entropy=None), truth.values)
    return row | head_rows.gradient_errors(*gradients(values, case), truth)


WORK = Work("benchmarks.linear_logprob", OPERATIONS, call, errors)


def in_child(name: str, variant: str, size: list[int]) -> tuple[measure.Run, measure.Run]:
    return head_rows.child_calls(WORK, name, variant, size)


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize(("variant", "name"), head_rows.cases_to_run(heads.LOGPROBS, OPERATIONS))
def test_linear_logprob(
    variant: str, name: str, benchmark: Any, results: measure.Results, size: Size, rounds: int
) -> None:
    reason = unable(name, variant)
    head_rows.run_row(
        WORK, variant, name, reason, benchmark=benchmark, results=results, size=size, rounds=rounds
    )
