"""The workload of linear_logprob.py and linear_policy_loss.py, and the implementations compared: our operations and
their peers, on the same tensors.

A case is a batch of hidden states with a policy-gradient loss: cispo with a cap of 4, token weights 1 / N, advantages
per sequence, old log-probs near the policy's. Labels get logits from far below to far above the log-sum-exp, as sampled
tokens do. The exact KL is KL(policy || reference), where the reference has other hidden states under the same head.

A peer that is not installed, or cannot run on this device, says why (Peer.unable). head_rows.py measures a row.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from fst_kernels import PolicyObjective, linear_logprob, linear_policy_loss, policy_loss

RATIO_CAP, KL_COEF, SEQUENCES = 4.0, 0.1, 16
CHUNK_BYTES = 2**30  # of logits at one time, if not all rows are needed
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


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


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
    rows = max(1, CHUNK_BYTES // (4 * v))
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
    """Full logits, converted to fp32 after the product; also the function that torch.compile compiles."""
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
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    nll = torch.nn.functional.linear_cross_entropy(hidden, weight, labels, reduction="none", **options)
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


def _torch_fused_cannot(chunked: bool, _: torch.dtype) -> str | None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    if chunked and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no LinearCrossEntropyOptions"
    return None


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
        functools.partial(_torch_fused, False), functools.partial(_torch_fused_cannot, False), entropy=False
    ),
    "F.linear_cross_entropy, chunked": Peer(
        functools.partial(_torch_fused, True), functools.partial(_torch_fused_cannot, True), entropy=False
    ),
    "Liger scaled cross-entropy": Peer(_liger_scaled, _liger_cannot),
    "cut-cross-entropy": Peer(functools.partial(_cut, "high"), _cut_cannot, entropy=False),
    "cut-cross-entropy, no filter": Peer(functools.partial(_cut, None), _cut_cannot, entropy=False),
}

# ------------------------------------------------------------------------------------------------------------------------ losses

OBJECTIVE = PolicyObjective("cispo", ratio_cap=RATIO_CAP)
KL_OBJECTIVE = PolicyObjective("cispo", ratio_cap=RATIO_CAP, kl="reverse", kl_coef=KL_COEF)


def composed_loss(values: Values, case: Case) -> Tensor:
    """The loss computed from another implementation's log-probs (and KL), by autograd."""
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
    """One sequence at a time, Liger's default. Its loss on [1, T] numbers is compiled on a GPU only, as that takes a minute on a CPU."""
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
