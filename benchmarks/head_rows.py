"""How linear_logprob.py and linear_policy_loss.py measure one row: accuracy against a dense truth, time, share of the floor, memory.

A peer's row may record an error, and any row may record that it runs out of memory; other errors of our own operations fail the run.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.head_peers import CHUNK_BYTES, Case, Size, Values, dtype, make_case

# ------------------------------------------------------------------------------------------------------------------------ truth


class Truth(NamedTuple):
    values: Values
    d_hidden: Tensor  # [N, H]
    d_weight: Tensor  # [V, H]


def truth(case: Case, loss: Callable[[Values, Case], Tensor], kl: bool) -> Truth:
    """Values and gradients by autograd over chunks of rows: fp64 on a CPU, fp32 (no TF32) on a GPU. `loss` must be a sum over rows."""
    dtype = torch.float32 if case.hidden.is_cuda else torch.float64
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    weight = case.weight.detach().to(dtype).requires_grad_()
    d_weight = torch.zeros_like(weight)
    rows = max(1, CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
    found, d_hidden = [], []
    for begin in range(0, case.hidden.shape[0], rows):
        at = slice(begin, begin + rows)
        hidden = case.hidden.detach()[at].to(dtype).requires_grad_()
        log_p = torch.log_softmax(hidden @ weight.t(), -1)
        logprob = log_p.gather(1, case.labels[at].unsqueeze(1)).squeeze(1)
        divergence = None
        if kl:
            with torch.no_grad():
                log_q = torch.log_softmax(case.ref_hidden[at].to(dtype) @ weight.t(), -1)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        part = Values(logprob, -(log_p.exp() * log_p).sum(-1).detach(), divergence)
        piece = case._replace(
            old_logprob=case.old_logprob[at],
            token_weight=case.token_weight[at],
            advantages=case.advantages[at],
            upstream=(case.upstream[0][at], case.upstream[1][at]),
        )
        of_hidden, of_weight = torch.autograd.grad(loss(part, piece), (hidden, weight))
        d_hidden.append(of_hidden)
        d_weight += of_weight
        found.append([None if x is None else x.detach() for x in part])
        del log_p, logprob, divergence, part, of_hidden, of_weight
    torch.set_float32_matmul_precision(precision)
    joined = [None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True)]
    return Truth(Values(*joined), torch.cat(d_hidden), d_weight)  # type: ignore[arg-type]


def value_errors(got: Values, want: Values) -> measure.Row:
    """Absolute errors, in nats."""
    row: measure.Row = {}
    for name in Values._fields:
        a, b = getattr(got, name), getattr(want, name)
        if a is not None and b is not None:
            difference = (a.detach().to(b.dtype) - b).abs()
            row |= {f"{name}_max": float(difference.max()), f"{name}_mean": float(difference.mean())}
    return row


def gradient_errors(d_hidden: Tensor, d_weight: Tensor, want: Truth) -> measure.Row:
    """Relative errors in the Frobenius norm."""
    row: measure.Row = {}
    for name, a, b in (("d_hidden", d_hidden, want.d_hidden), ("d_weight", d_weight, want.d_weight)):
        row[name] = float(torch.linalg.vector_norm(a.to(b.dtype) - b) / torch.linalg.vector_norm(b))
    return row


# ------------------------------------------------------------------------------------------------------------------------ one row

DEFAULT_SIZE = {"cpu": (512, 128, 16384), "cuda": (16384, 4096, 151936)}
COLUMNS = (
    ("variant", "variant", ""), ("name", "implementation", ""), ("ms", "ms", ".2f"), ("cpu_ms", "CPU ms", ".1f"),
    ("tflop_per_s", "TFLOP/s", ".3g"), ("percent_of_floor", "% of floor", ".0f"), ("peak_mb", "peak MB", ".0f"),
    ("gradient_mb", "gradients", ".0f"), ("logprob_max", "dlogp max", ".1e"), ("logprob_mean", "mean", ".1e"),
    ("d_hidden", "dHidden", ".1e"), ("d_weight", "dW", ".1e"),
)  # fmt: skip

Call = Callable[[], tuple[Tensor, ...]]


class Work(NamedTuple):
    """The operation that one of the two benchmarks times."""

    module: str  # name of the benchmark module, for the child that measures memory on a CPU
    operations: dict[str, int]  # variant -> floor in units of NHV
    call: Callable[[str, str, Case], Call]  # the timed call of (implementation, variant, case)
    errors: Callable[[str, str, Case], measure.Row]  # accuracy columns of the same call


SLOW = ("torch.compile", "ours, reference")


def cases_to_run(names: Iterable[str], variants: Iterable[str]) -> list[tuple[str, str]]:
    """(variant, implementation), slowest last, so that an interrupted run has measured the rest."""
    every = [(variant, name) for variant in variants for name in names]
    return sorted(every, key=lambda case: case[1] in SLOW)


@functools.lru_cache(1)
def two_cases(size: Size) -> tuple[Case, Case]:
    return make_case(size, dtype(), 0), make_case(size, dtype(), 1)


@functools.lru_cache(2)
def truth_of_case(size: Size, loss: Callable[[Values, Case], Tensor], kl: bool) -> Truth:
    return truth(two_cases(size)[0], loss, kl)


@functools.lru_cache(1)
def product_rate(size: Size) -> float:
    return measure.matmul_rate(min(size[0], 4096), size[1], size[2], dtype())


def run_row(
    work: Work, variant: str, name: str, unable: str | None, *, benchmark: Any, results: measure.Results, size: Size, rounds: int
) -> None:  # fmt: skip
    """Measure and record one row; it is skipped if its implementation is unable."""
    rate = product_rate(size)
    results.about |= {"dtype": str(dtype()).removeprefix("torch."), "matmul_tflop_per_s": rate / 1e12}
    row: measure.Row = {"variant": variant, "name": name}
    if unable is None:
        try:
            row |= _measured(work, variant, name, benchmark, size, rounds, rate)
        except Exception as error:  # a failing peer is a result; ours may only run out of memory
            if name.startswith("ours") and not isinstance(error, torch.OutOfMemoryError):
                raise
            unable = f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[0][:200]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    results.add(row | {"skipped": unable})
    if unable is not None:
        pytest.skip(f"{name}: {unable}")


def _measured(
    work: Work, variant: str, name: str, benchmark: Any, size: Size, rounds: int, rate: float
) -> measure.Row:
    cases = two_cases(size)
    row = work.errors(name, variant, cases[0])
    if not variant.startswith("forward"):
        row["gradient_mb"] = cases[0].gradient_bytes / 1e6
    turn = itertools.cycle(cases)

    def prepared() -> measure.Run:
        call = work.call(name, variant, next(turn))
        return lambda: _drop(call)

    times = measure.timed_rounds(benchmark, prepared, rounds, 1.5 if torch.cuda.is_available() else 30)
    seconds, cpu = (statistics.median(x) for x in times)
    spent = seconds if torch.cuda.is_available() else cpu
    floor = work.operations[variant] * math.prod(size) / rate
    row |= {
        "ms": seconds * 1e3, "cpu_ms": None if torch.cuda.is_available() else cpu * 1e3,
        "rounds_ms": [s * 1e3 for s in times.seconds], "tflop_per_s": floor * rate / spent / 1e12,
        "floor_ms": floor * 1e3, "percent_of_floor": 100 * floor / spent,
    }  # fmt: skip
    if torch.cuda.is_available():
        call = work.call(name, variant, cases[0])
        row["peak_mb"] = measure.cuda_peak_bytes(lambda: _drop(call)) / 1e6
    else:
        peak = measure.in_child(work.module, "in_child", name, variant, size).peak_bytes
        row["peak_mb"] = None if peak is None else peak / 1e6
    return row


def _drop(call: Call) -> None:
    """Discard the result, so that the memory of one round is free in the next."""
    call()


def child_calls(work: Work, name: str, variant: str, size: list[int]) -> tuple[measure.Run, measure.Run]:
    """In the child process that measures memory: (warm-up, call). The warm-up is small except for what is compiled per shape."""
    n, h, v = size
    case = make_case((n, h, v), dtype(), 0)
    warm = case if name == "torch.compile" else make_case((64, h, 1024), dtype(), 1)
    calls = [work.call(name, variant, x) for x in (warm, case)]
    return lambda: _drop(calls[0]), lambda: _drop(calls[1])


# ------------------------------------------------------------------------------------------------------------------------ full size


def compare_full_size(module: str, ours: str, size: Size, rounds: int) -> measure.Row:
    """`ours` against eager PyTorch, forward and backward, alternating, each in a fresh process: time, and in another one peak memory.

    time_ratio, cpu_time_ratio: medians of the rounds' ratios ours / eager, [smallest, largest] in *_range.
    """
    found: dict[str, list[dict[str, Any]]] = {ours: [], "torch eager": []}
    for _ in range(rounds):
        for name, reports in found.items():
            timed = measure.in_child(module, "in_child", name, "step", size, for_time=True)
            held = measure.in_child(module, "in_child", name, "step", size)
            reports.append(timed._asdict() | {"peak_bytes": held.peak_bytes})
    row: measure.Row = {"size": list(size), "rounds": rounds}
    for name, reports in found.items():
        row[name] = {key: [r[key] for r in reports] for key in ("peak_bytes", "seconds", "cpu_seconds")}
    keys = {"memory_ratio": "peak_bytes", "time_ratio": "seconds", "cpu_time_ratio": "cpu_seconds"}
    for name, key in keys.items():
        ratios = [a / b for a, b in zip(row[ours][key], row["torch eager"][key], strict=True)]
        row |= {name: statistics.median(ratios), f"{name}_range": [min(ratios), max(ratios)]}
    return row
