"""The work of linear_logprob.py and linear_policy_loss.py, and who does it: our operations and their peers, on the same tensors.

A case is a batch of hidden states with a policy-gradient loss: cispo with a cap of 4, token weights 1 / N, advantages per sequence, old
log-probs near the policy's. Labels get logits from far below to far above the log-sum-exp, as sampled tokens do. The exact KL is
KL(policy || reference), the reference being other hidden states under the same head.

A peer that is not installed, or cannot run on this device, is left out with its reason. Only the row of a peer may end in an error that is
recorded; ours fail the run.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import shutil
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from fst_kernels import PolicyObjective, linear_logprob, linear_policy_loss, policy_loss

RATIO_CAP, KL_COEF, SEQUENCES = 4.0, 0.1, 16
TRUTH_CHUNK_BYTES = 2**30
Size = tuple[int, int, int]  # N, H, V


class Case(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    labels: Tensor  # [N]
    ref_hidden: Tensor  # [N, H]
    advantages: Tensor  # [N] fp32, equal within each of gcd(N, SEQUENCES) sequences
    old_logprob: Tensor  # [N] fp32
    token_weight: Tensor  # [N] fp32
    upstream: tuple[Tensor, Tensor]  # [N] fp32: dLoss/dlogprob and dLoss/dKL of a loss composed on mode A

    @property
    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes


def make_case(size: Size, dtype: torch.dtype, seed: int) -> Case:
    n, h, v = size
    device = measure.device()
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    weight = (normal(v, h) * (2 / math.sqrt(h))).to(dtype)
    labels = torch.randint(0, v, (n,), generator=g, device=device)
    boost = torch.rand(n, 1, generator=g, device=device) * 5
    hidden = (normal(n, h) + boost * weight[labels]).to(dtype)
    ref_hidden = (hidden.float() + 0.1 * normal(n, h)).to(dtype)
    sequences = math.gcd(n, SEQUENCES)
    advantages = normal(sequences).repeat_interleave(n // sequences)
    rows = max(1, TRUTH_CHUNK_BYTES // (4 * v))
    logprob = torch.cat(
        [
            torch.log_softmax((x @ weight.t()).float(), -1).gather(1, y.unsqueeze(1)).squeeze(1)
            for x, y in zip(hidden.split(rows), labels.split(rows), strict=True)
        ]
    )
    return Case(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        labels,
        ref_hidden,
        advantages,
        logprob.detach() + 0.1 * normal(n),
        torch.full((n,), 1 / n, device=device),
        (normal(n) / n, normal(n) / n),
    )


class Values(NamedTuple):
    logprob: Tensor  # [N]
    entropy: Tensor | None = None  # [N]
    kl: Tensor | None = None  # [N]


# ------------------------------------------------------------------------------------------------------------------ log-probabilities


def eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor | None, want_entropy: bool
) -> Values:
    """Full logits, in fp32 after the product; what torch.compile compiles, too."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    logprob = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1) if want_entropy else None
    kl = None
    if ref_hidden is not None:
        with torch.no_grad():
            log_q = torch.log_softmax((ref_hidden @ weight.t()).float(), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Values(logprob, entropy, kl)


@functools.cache
def _compiled() -> Callable[..., Values]:
    return torch.compile(eager, fullgraph=True, dynamic=False)


def _compiled_values(*arguments: Any) -> Values:
    return _compiled()(*arguments)


def _ours(
    backend: str, hidden: Tensor, weight: Tensor, labels: Tensor, ref_hidden: Tensor | None, _: bool
) -> Values:
    kl = None if ref_hidden is None else "reverse"
    out = linear_logprob(hidden, weight, labels, ref_hidden=ref_hidden, kl=kl, backend=backend)
    return Values(out.logprob, out.entropy, out.kl)


def _torch_fused(
    chunked: bool, hidden: Tensor, weight: Tensor, labels: Tensor, _: Tensor | None, __: bool
) -> Values:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    nll = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)
    return Values(-nll.float())


def _liger_scaled(
    hidden: Tensor, weight: Tensor, labels: Tensor, _: Tensor | None, want_entropy: bool
) -> Values:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    found = LigerFusedLinearScaledCrossEntropyFunction.apply(
        hidden, weight, labels, 1.0, -100, 1, want_entropy
    )
    return Values(-found[0], found[1]) if want_entropy else Values(-found)


def _cut(
    filter_eps: str | None, hidden: Tensor, weight: Tensor, labels: Tensor, _: Tensor | None, __: bool
) -> Values:
    from cut_cross_entropy import linear_cross_entropy

    return Values(
        -linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=filter_eps).float()
    )


class Peer(NamedTuple):
    values: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Values]
    unable: Callable[[torch.dtype], str | None]  # why it cannot run here
    entropy: bool = True
    kl: bool = False


def missing(package: str) -> str | None:
    return (
        None if importlib.util.find_spec(package) is not None else f"the package {package} is not installed"
    )


def _backend_cannot(backend: str, dtype: torch.dtype) -> str | None:
    x = torch.zeros(1, 8, dtype=dtype, device=measure.device())
    try:
        linear_logprob(x, x, torch.zeros(1, dtype=torch.int64, device=x.device), backend=backend)
    except RuntimeError as error:
        return str(error).partition("cannot run: ")[2] or str(error)
    return None


def _compile_cannot(_: torch.dtype) -> str | None:
    if measure.device().type == "cpu" and shutil.which("g++") is None:
        return "torch.compile needs g++ on the CPU"
    return None


def _torch_fused_cannot(_: torch.dtype) -> str | None:
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        return None
    return f"torch {torch.__version__} has no linear_cross_entropy"


def _liger_cannot(_: torch.dtype) -> str | None:
    if (reason := missing("liger_kernel")) is not None:
        return reason
    if measure.device().type == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        return missing("cutlass")  # its sm_90 kernels are written in nvidia-cutlass-dsl
    return None


def _cut_cannot(_: torch.dtype) -> str | None:
    if (reason := missing("cut_cross_entropy")) is not None:
        return reason
    return "its Triton kernels need a GPU, the tensors are on cpu" if measure.device().type == "cpu" else None


LOGPROBS: dict[str, Peer] = {
    "ours, reference": Peer(
        functools.partial(_ours, "reference"), functools.partial(_backend_cannot, "reference"), kl=True
    ),
    "ours, triton": Peer(
        functools.partial(_ours, "triton"), functools.partial(_backend_cannot, "triton"), kl=True
    ),
    "torch eager": Peer(eager, lambda _: None, kl=True),
    "torch.compile": Peer(_compiled_values, _compile_cannot, kl=True),
    "F.linear_cross_entropy": Peer(
        functools.partial(_torch_fused, False), _torch_fused_cannot, entropy=False
    ),
    "F.linear_cross_entropy, chunked": Peer(
        functools.partial(_torch_fused, True), _torch_fused_cannot, entropy=False
    ),
    "Liger scaled cross-entropy": Peer(_liger_scaled, _liger_cannot),
    "cut-cross-entropy": Peer(functools.partial(_cut, "high"), _cut_cannot, entropy=False),
    "cut-cross-entropy, no filter": Peer(functools.partial(_cut, None), _cut_cannot, entropy=False),
}

# ------------------------------------------------------------------------------------------------------------------------ losses

OBJECTIVE = PolicyObjective("cispo", ratio_cap=RATIO_CAP)
KL_OBJECTIVE = PolicyObjective("cispo", ratio_cap=RATIO_CAP, kl="reverse", kl_coef=KL_COEF)


def composed_loss(values: Values, case: Case) -> Tensor:
    """The loss on another's log-probs (and KL), by autograd."""
    capped = torch.exp(values.logprob.detach() - case.old_logprob).clamp(max=RATIO_CAP)
    loss = -(case.token_weight * capped * case.advantages * values.logprob).sum()
    return loss if values.kl is None else loss + KL_COEF * (case.token_weight * values.kl).sum()


def fused_loss(backend: str, case: Case, kl: bool) -> Tensor:
    loss, _ = linear_policy_loss(
        case.hidden, case.weight, case.labels, case.advantages, objective=KL_OBJECTIVE if kl else OBJECTIVE,
        token_weight=case.token_weight, old_logprob=case.old_logprob, ref_hidden=case.ref_hidden if kl else None,
        backend=backend,
    )  # fmt: skip
    return loss


def mode_a_loss(case: Case, kl: bool) -> Tensor:
    out = linear_logprob(
        case.hidden, case.weight, case.labels, ref_hidden=case.ref_hidden if kl else None,
        kl="reverse" if kl else None,
    )  # fmt: skip
    loss, _ = policy_loss(
        out, case.labels, case.advantages, objective=KL_OBJECTIVE if kl else OBJECTIVE, token_weight=case.token_weight,
        old_logprob=case.old_logprob,
    )  # fmt: skip
    return loss


def liger_grpo_loss(case: Case) -> Tensor:
    """One sequence at a time, its default. Its loss on [1, T] numbers is compiled on a GPU only: on a CPU that takes a minute."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="cispo", epsilon_high=RATIO_CAP, compiled=case.hidden.is_cuda
    )
    n = case.hidden.shape[0]
    sequences = math.gcd(n, SEQUENCES)
    shape = (sequences, n // sequences)
    value, _ = loss(
        case.hidden.view(*shape, -1), case.weight, case.labels.view(shape), torch.ones(shape, device=case.labels.device),
        case.advantages.view(shape)[:, 0], old_per_token_logps=case.old_logprob.view(shape),
    )  # fmt: skip
    return value  # type: ignore[no-any-return]


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
    rows = max(1, TRUTH_CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
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
    joined = [None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True)]  # type: ignore[arg-type]
    return Truth(Values(*joined), torch.cat(d_hidden), d_weight)  # type: ignore[arg-type]


def value_errors(got: Values, want: Values) -> measure.Row:
    """Absolute, in nats."""
    row: measure.Row = {}
    for name in Values._fields:
        a, b = getattr(got, name), getattr(want, name)
        if a is not None and b is not None:
            difference = (a.detach().to(b.dtype) - b).abs()
            row |= {f"{name}_max": float(difference.max()), f"{name}_mean": float(difference.mean())}
    return row


def gradient_errors(d_hidden: Tensor, d_weight: Tensor, want: Truth) -> measure.Row:
    """Relative, in the Frobenius norm."""
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
    """What one of the two benchmarks times."""

    module: str  # its name, for the child that measures memory on a CPU
    operations: dict[str, int]  # variant -> floor in units of NHV
    call: Callable[[str, str, Case], Call]  # the timed call of (implementation, variant, case)
    errors: Callable[[str, str, Case], measure.Row]  # columns of accuracy of the same


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


@functools.lru_cache(1)
def two_cases(size: Size) -> tuple[Case, Case]:
    return make_case(size, dtype(), 0), make_case(size, dtype(), 1)


@functools.lru_cache(1)
def truth_of_case(size: Size, loss: Callable[[Values, Case], Tensor], kl: bool) -> Truth:
    return truth(two_cases(size)[0], loss, kl)


@functools.lru_cache(1)
def product_rate(size: Size) -> float:
    return measure.matmul_rate(min(size[0], 4096), size[1], size[2], dtype())


def run_row(
    work: Work, variant: str, name: str, unable: str | None, *, benchmark: Any, results: measure.Results, size: Size, rounds: int
) -> str | None:  # fmt: skip
    """Measures and records one row; why it was left out, if it was."""
    rate = product_rate(size)
    results.about |= {"dtype": str(dtype()).removeprefix("torch."), "matmul_tflop_per_s": rate / 1e12}
    row: measure.Row = {"variant": variant, "name": name}
    if unable is None:
        try:
            row |= _measured(work, variant, name, benchmark, size, rounds, rate)
        except Exception as error:  # a peer that fails is a result; ours may only run out of memory
            if name.startswith("ours") and not isinstance(error, torch.OutOfMemoryError):
                raise
            unable = f"{type(error).__name__}: {(str(error).strip() or '(no message)').splitlines()[0][:200]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    results.add(row | {"skipped": unable})
    return unable


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

    times = measure.timed_rounds(benchmark, prepared, rounds)
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
    """Keeps nothing, so that the memory of one round is free in the next."""
    call()


def child_calls(work: Work, name: str, variant: str, size: list[int]) -> tuple[measure.Run, measure.Run]:
    """In the child process that measures memory: a warm-up, small except for what is compiled per shape, and the call."""
    n, h, v = size
    case = make_case((n, h, v), dtype(), 0)
    warm = case if name == "torch.compile" else make_case((64, h, 1024), dtype(), 1)
    calls = [work.call(name, variant, x) for x in (warm, case)]
    return lambda: _drop(calls[0]), lambda: _drop(calls[1])


# ------------------------------------------------------------------------------------------------------------------------ full size


def compare_full_size(module: str, ours: str, size: Size, rounds: int) -> measure.Row:
    """`ours` against eager PyTorch, forward and backward, in turn, each in a fresh process: peak memory and time of the same run."""
    reports: dict[str, list[measure.ChildReport]] = {ours: [], "torch eager": []}
    for _ in range(rounds):
        for name, found in reports.items():
            found.append(measure.in_child(module, "in_child", name, "step", size))
    row: measure.Row = {"size": list(size), "rounds": rounds}
    for name, found in reports.items():
        row[name] = {
            key: [getattr(r, key) for r in found] for key in ("peak_bytes", "seconds", "cpu_seconds")
        }

    def ratio(key: str) -> float:
        a, b = (statistics.median(getattr(r, key) for r in reports[name]) for name in reports)
        return float(a / b)

    return row | {
        "memory_ratio": ratio("peak_bytes"),
        "time_ratio": ratio("seconds"),
        "cpu_time_ratio": ratio("cpu_seconds"),
    }
