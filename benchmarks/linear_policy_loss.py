"""linear_policy_loss (mode B) and its peers: from hidden states to the loss and its gradients, and the loss alone.

    python -m pytest benchmarks/linear_policy_loss.py [--size N,H,V] [--rounds R] [--threads T] [--out benchmarks/results]
    python -m benchmarks.linear_policy_loss N,H,V [ROUNDS]     on a CPU: peak memory and time versus eager PyTorch, as JSON

Variants: `step` is loss and gradients of hidden states and weight; `step, KL` the same with the exact KL to a
reference; `forward` is the loss under no_grad. Floors in operations: 6, 8 and 2 NHV (docs/benchmarks.md). Two cases
alternate, so that no round finds its inputs in a cache. bf16 on a GPU, fp32 on a CPU.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import head_peers as heads
from benchmarks import head_rows, measure
from benchmarks.head_peers import Case, Size
from benchmarks.head_rows import COLUMNS, DEFAULT_SIZE, Work

__all__ = ["COLUMNS", "DEFAULT_SIZE"]

OPERATIONS = {"step": 6, "step, KL": 8, "forward": 2}
OURS = ("ours, reference", "ours, triton")
MODE_A, GRPO = "ours, mode A + policy_loss", "Liger fused linear GRPO"
NAMES = (*OURS, MODE_A, *(n for n in heads.LOGPROBS if not n.startswith("ours")), GRPO)


def unable(name: str, variant: str) -> str | None:
    if name in OURS:
        try:
            heads.fused_loss(name.removeprefix("ours, "), heads.make_case((1, 8, 8), heads.dtype(), 0), False)
        except RuntimeError as error:
            return str(error).partition("cannot run: ")[2] or str(error)
        return None
    if name == MODE_A:
        return None
    if name == GRPO:
        lacking = {"step, KL": "it has no exact KL", "forward": "it has no forward without gradients"}
        return lacking.get(variant) or heads.missing("liger_kernel")
    peer = heads.LOGPROBS[name]
    return "it has no KL" if variant == "step, KL" and not peer.kl else peer.unable(heads.dtype())


def loss_of(name: str, case: Case, kl: bool) -> Tensor:
    if name in OURS:
        return heads.fused_loss(name.removeprefix("ours, "), case, kl)
    if name == MODE_A:
        return heads.mode_a_loss(case, kl)
    if name == GRPO:
        return heads.liger_grpo_loss(case)
    ref_hidden = case.ref_hidden if kl else None
    values = heads.LOGPROBS[name].values(case.hidden, case.weight, case.labels, ref_hidden, False)
    return heads.composed_loss(values, case)


def call(name: str, variant: str, case: Case) -> head_rows.Call:
    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss_of(name, case, False),)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of(name, case, variant == "step, KL"), (case.hidden, case.weight))

    return forward if variant == "forward" else step


def errors(name: str, variant: str, case: Case) -> measure.Row:
    if variant == "forward":
        return {}
    size = (*case.hidden.shape, case.weight.shape[0])
    d_hidden, d_weight = call(name, variant, case)()
    return head_rows.gradient_errors(
        d_hidden, d_weight, head_rows.truth_of_case(size, heads.composed_loss, variant == "step, KL")
    )


WORK = Work("benchmarks.linear_policy_loss", OPERATIONS, call, errors)


def in_child(name: str, variant: str, size: list[int]) -> tuple[measure.Run, measure.Run]:
    return head_rows.child_calls(WORK, name, variant, size)


@pytest.mark.benchmark(timer=measure.clock)
@pytest.mark.parametrize(("variant", "name"), head_rows.cases_to_run(NAMES, OPERATIONS))
def test_linear_policy_loss(
    variant: str, name: str, benchmark: Any, results: measure.Results, size: Size, rounds: int
) -> None:
    reason = unable(name, variant)
    head_rows.run_row(
        WORK, variant, name, reason, benchmark=benchmark, results=results, size=size, rounds=rounds
    )


if __name__ == "__main__":
    n, h, v = map(int, sys.argv[1].split(","))
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    comparison = [
        {"implementation": name, **head_rows.compare_full_size(WORK.module, name, (n, h, v), rounds)}
        for name in ("ours, reference", MODE_A)
    ]
    result = {
        "benchmark": "linear_policy_loss against eager",
        "command": " ".join(["python -m benchmarks.linear_policy_loss", *sys.argv[1:]]),
        "dtype": "float32",
        "hardware": measure.hardware(),
        "versions": measure.versions(),
        "comparison": comparison,
    }
    print(json.dumps(result, indent=1))
