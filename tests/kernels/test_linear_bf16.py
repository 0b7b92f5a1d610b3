"""linear_logprob and linear_policy_loss with bf16 inputs against dense autograd of the upcast inputs, and what must hold bit for bit.

Every claim runs twice: on the CPU at small sizes with the reference, so that the claim itself is known to work, and on a GPU (marked) at
the vocabularies of real models with every backend that runs there.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fst_kernels import PolicyObjective, linear_logprob, linear_policy_loss, policy_loss

BF16 = torch.bfloat16


class Place(NamedTuple):
    device: str
    exact: torch.dtype  # of the truth
    vocabularies: tuple[int, ...]
    rows: int
    hidden: int


CPU = Place("cpu", torch.float64, (123, 3001), 70, 40)
GPU = Place("cuda", torch.float32, (50257, 151936), 300, 512)


def on(*backends: str) -> pytest.MarkDecorator:
    """The reference on the CPU; `backends` on a GPU."""
    return pytest.mark.parametrize(
        ("place", "backend"),
        [
            pytest.param(CPU, "reference", id="cpu-reference"),
            *(pytest.param(GPU, b, id=f"gpu-{b}", marks=pytest.mark.gpu) for b in backends),
        ],
    )


class Case(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    ref_hidden: Tensor  # [N, H]
    temperature: Tensor  # [N]
    rows: Tensor  # [M] of each label
    labels: Tensor  # [M]
    advantages: Tensor
    token_weight: Tensor
    old_logprob: Tensor


def make(place: Place, vocabulary: int, rows: int | None = None, hidden: int | None = None) -> Case:
    """Half of the rows have one label, some have three, some none; labels lie in the first and the last column, too."""
    n, h = rows or place.rows, hidden or place.hidden
    g = torch.Generator().manual_seed(vocabulary + n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    row = torch.cat((torch.arange(n - n // 8), torch.arange(n // 4), torch.arange(n // 4)))
    labels = torch.randint(0, vocabulary, row.shape, generator=g)
    labels[0], labels[1], labels[2] = 0, vocabulary - 1, -100
    weight = normal(vocabulary, h) * (2 / math.sqrt(h))
    states = normal(n, h)
    states[row] += 3 * torch.rand(len(row), 1, generator=g) * weight[labels.clamp(min=0)]
    case = Case(
        states.to(BF16), weight.to(BF16), normal(vocabulary).to(BF16), (states + 0.2 * normal(n, h)).to(BF16),
        0.5 + torch.rand(n, generator=g), row, labels, normal(len(row)), torch.rand(len(row), generator=g),
        -3 * torch.rand(len(row), generator=g),
    )  # fmt: skip
    return Case(*(x.to(place.device) for x in case))


class Truth(NamedTuple):
    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    ref_logprob: Tensor
    kl: Tensor | None


def dense(
    case: Case, inputs: list[Tensor], dtype: torch.dtype, kl: str | None, softcap: float | None
) -> Truth:
    """Plain torch over full logits."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = hidden @ weight.t() + bias
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return z / case.temperature.to(dtype).unsqueeze(1)

    z = logits(*inputs)
    with torch.no_grad():
        log_q = torch.log_softmax(logits(case.ref_hidden.to(dtype), *(x.detach() for x in inputs[1:])), -1)
    log_p = torch.log_softmax(z, -1)
    at = case.rows, case.labels.clamp(min=0)
    live = (case.labels != -100).to(dtype)
    divergence = None
    if kl is not None:
        a, b = (log_p, log_q) if kl == "reverse" else (log_q, log_p)
        divergence = (a.exp() * (a - b)).sum(-1)
    return Truth(
        log_p[at] * live, -(log_p.exp() * log_p).sum(-1), z.logsumexp(-1), log_q[at] * live, divergence
    )


def upcast(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.weight, case.bias)]


def fused(case: Case, inputs: list[Tensor], kl: str | None, softcap: float | None, backend: str, **more):
    return linear_logprob(inputs[0], inputs[1], case.labels, rows=case.rows, bias=inputs[2], temperature=case.temperature,
        softcap=softcap, ref_hidden=case.ref_hidden, kl=kl, backend=backend, **more,
    )  # fmt: skip


def loss_of(case: Case, inputs: list[Tensor], objective: PolicyObjective, backend: str, **more):
    arguments = {
        "rows": case.rows, "bias": inputs[2], "temperature": case.temperature, "token_weight": case.token_weight,
        "old_logprob": case.old_logprob, "ref_hidden": case.ref_hidden if objective.kl else None, "softcap": None,
    }  # fmt: skip
    return linear_policy_loss(inputs[0], inputs[1], case.labels, case.advantages, objective=objective, backend=backend,
        **arguments | more,
    )  # fmt: skip


def assert_gradients(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("hidden", "weight", "bias"), got, want, strict=True):
        assert b.norm() > 0, name
        assert (a.to(b.dtype) - b).norm() <= 4e-3 * b.norm(), name


@on("reference", "triton")
@pytest.mark.parametrize("kl", [None, "reverse", "forward"])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_statistics_and_gradients_of_mode_a_stay_within_their_caps(place, backend, kl, softcap):
    for vocabulary in place.vocabularies:
        case = make(place, vocabulary)
        exact = upcast(case, place.exact)
        want = dense(case, exact, place.exact, kl, softcap)
        inputs = upcast(case, BF16)
        got = fused(case, inputs, kl, softcap, backend)
        for name, most, mean in (
            ("logprob", 1e-3, 1e-4), ("lse", 1e-3, 1e-4), ("ref_logprob", 1e-3, 1e-4), ("entropy", 2e-3, 2e-3),
            *([("kl", 2e-3, 2e-3)] if kl else []),
        ):  # fmt: skip
            error = (getattr(got, name).to(place.exact) - getattr(want, name)).abs()
            assert error.max() <= most, (name, vocabulary)
            assert error.mean() <= mean, (name, vocabulary)

        def loss(x):
            slope = torch.linspace(-1, 2, len(x.logprob), device=x.logprob.device)
            of_row = torch.linspace(-1, 1, len(x.entropy), device=x.entropy.device)
            total = (x.logprob * slope).sum() + (x.entropy * of_row).sum()
            return total if x.kl is None else total + (x.kl * of_row.flip(0)).sum()

        assert_gradients(torch.autograd.grad(loss(got), inputs), torch.autograd.grad(loss(want), exact))


@on("reference", "triton")
@pytest.mark.parametrize("kl", [None, "k3", "reverse", "forward"])
def test_gradients_of_mode_b_are_those_of_the_composed_loss_in_full_precision(place, backend, kl):
    objective = PolicyObjective(
        "cispo", ratio_cap=2.0, kl=kl, kl_coef=0.3 if kl else 0.0, entropy_coef=0.05 if kl else 0.0
    )
    for vocabulary in place.vocabularies:
        case = make(place, vocabulary)
        exact = upcast(case, place.exact)
        want = dense(case, exact, place.exact, objective.exact_kl, 15.0)
        ratio = torch.exp(want.logprob.detach() - case.old_logprob).clamp(max=2.0)
        n = case.token_weight * (case.labels != -100)
        loss = -(n * ratio * case.advantages * want.logprob).sum()
        if kl == "k3":
            gap = want.ref_logprob - want.logprob
            loss = loss + 0.3 * (n * (gap.exp() - gap - 1)).sum()
        if want.kl is not None:
            loss = loss + 0.3 * (n * want.kl[case.rows]).sum()
        if kl:
            loss = loss - 0.05 * (n * want.entropy[case.rows]).sum()
        inputs = upcast(case, BF16)
        got, stats = loss_of(case, inputs, objective, backend, softcap=15.0)
        torch.testing.assert_close(got.detach().to(place.exact), loss.detach(), rtol=1e-3, atol=1e-3)
        assert 0 < float(stats.clipped_fraction) < 1
        assert_gradients(torch.autograd.grad(2 * got, inputs), torch.autograd.grad(2 * loss, exact))


@on("triton")
def test_a_row_has_the_same_bits_in_any_batch_any_chunk_and_with_any_option(place, backend):
    """The backend that training takes. cuBLAS, under the reference on a GPU, chooses its algorithm by the number of rows."""
    case = make(place, place.vocabularies[-1])
    plain = {"temperature": 0.7, "backend": backend}
    labels = case.labels[: place.rows].clamp(min=0)
    labels = torch.cat((labels, labels.new_zeros(place.rows - len(labels))))
    whole = linear_logprob(case.hidden, case.weight, labels, **plain)
    n = place.rows
    for at in (slice(0, 1), slice(n // 4, n // 2 + 1), slice(n - 1, n)):
        part = linear_logprob(
            case.hidden[at], case.weight, labels[at], ref_hidden=case.ref_hidden[at], kl="reverse", chunk_rows=64, **plain
        )  # fmt: skip
        for name in ("logprob", "entropy", "lse"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[at]), name


@on("triton")
@pytest.mark.parametrize("kl", [None, "reverse"])
def test_on_policy_the_ratio_is_exactly_one_between_scoring_and_training(place, backend, kl):
    case = make(place, place.vocabularies[-1])
    with torch.no_grad():
        old = linear_logprob(case.hidden, case.weight, case.labels, rows=case.rows, bias=case.bias,
            temperature=case.temperature, backend=backend,
        ).logprob  # fmt: skip
    token_weight = case.token_weight.clone()
    token_weight[::3] = 0  # rows drop out, so that the others stand elsewhere
    objective = PolicyObjective("ppo", clip_low=0.0, clip_high=0.0, kl=kl, kl_coef=0.1 if kl else 0.0)
    for chunk_rows in (64, 192, 10**6):
        inputs = upcast(case, BF16)
        _, stats = loss_of(
            case,
            inputs,
            objective,
            backend,
            old_logprob=old,
            token_weight=token_weight,
            chunk_rows=chunk_rows,
        )
        assert float(stats.mismatch_kl) == 0
        assert float(stats.clipped_fraction) == 0
        assert float(stats.ratio) == 1


@on("reference", "triton")
@pytest.mark.parametrize("kl", [None, "reverse"])
def test_a_rerun_has_the_same_bits(place, backend, kl):
    case = make(place, place.vocabularies[-1])
    objective = PolicyObjective("cispo", kl=kl, kl_coef=0.1 if kl else 0.0)
    runs = []
    for _ in range(2):
        inputs = upcast(case, BF16)
        loss, stats = loss_of(case, inputs, objective, backend)
        runs.append([loss.detach(), stats.sums, *torch.autograd.grad(loss, inputs)])
        out = fused(case, inputs, kl, None, backend)
        total = out.logprob.sum() + out.entropy.square().sum()
        runs[-1] += [*(x.detach() for x in out if x is not None), *torch.autograd.grad(total, inputs)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@on("reference", "triton")
def test_rows_that_weigh_nothing_get_exactly_zero_and_all_masked_is_no_error(place, backend):
    case = make(place, place.vocabularies[0])
    token_weight = case.token_weight.clone()
    silent = case.rows % 5 == 2
    token_weight[silent] = 0
    inputs = upcast(case, BF16)
    loss, _ = loss_of(case, inputs, PolicyObjective(), backend, token_weight=token_weight)
    d_hidden = torch.autograd.grad(loss, inputs)[0]
    assert not d_hidden[case.rows[silent].unique()].any()
    assert d_hidden.any()
    loss, stats = loss_of(
        case, inputs, PolicyObjective(), backend, token_weight=torch.zeros_like(token_weight)
    )
    assert float(loss) == 0
    assert float(stats.count) == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, inputs))


@on("reference", "triton")
@pytest.mark.parametrize("level", [-200.0, 200.0])
@pytest.mark.parametrize("advantage", [1e4, -1e4])
def test_extreme_rows_and_advantages_stay_finite_and_right(place, backend, level, advantage):
    """Row 0: all logits equal. Row 1: one logit 400 above the rest. Row 2: a temperature of 0.01."""
    vocabulary = place.vocabularies[-1]
    hidden = torch.zeros(3, 64, dtype=BF16, device=place.device)
    hidden[0, 0], hidden[1, 1], hidden[2, 2] = level, 400, 1
    weight = torch.zeros(vocabulary, 64, dtype=BF16, device=place.device)
    weight[:, 0], weight[5, 1], weight[7, 2] = 1, 1, 1
    labels = torch.tensor([vocabulary - 1, 5, 7], device=place.device)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss, stats = linear_policy_loss(*inputs, labels, torch.full((3,), advantage, device=place.device), backend=backend,
        objective=PolicyObjective(entropy_coef=0.1), token_weight=torch.ones(3, device=place.device),
        old_logprob=torch.tensor([-1000.0, 0.0, 0.0], device=place.device),
        temperature=torch.tensor([1.0, 1.0, 0.01], device=place.device),
    )  # fmt: skip
    d_hidden, d_weight = torch.autograd.grad(loss, inputs)
    assert math.isfinite(float(loss))
    assert torch.isfinite(d_hidden).all()
    assert torch.isfinite(d_weight).all()
    log_v = math.log(vocabulary)
    assert float(stats.entropy) == pytest.approx(log_v / 3, abs=1e-3)  # rows 1 and 2 are certain
    capped = 4.0 * advantage * log_v - 0.1 * log_v
    assert float(loss) == pytest.approx(capped, rel=1e-4)
    uniform = torch.full((vocabulary,), 4 * advantage / vocabulary, device=place.device)
    uniform[-1] -= 4 * advantage
    torch.testing.assert_close(d_weight[:, 0].float(), uniform * level, rtol=1e-2, atol=1e-6 * abs(advantage))


@pytest.mark.parametrize(
    ("place", "backend", "rows", "vocabulary"),
    [
        pytest.param(CPU, "reference", 70, 3001, id="cpu-reference"),
        *(
            pytest.param(GPU, b, 14400, 151936, id=f"gpu-{b}", marks=pytest.mark.gpu)
            for b in ("reference", "triton")
        ),
    ],
)
def test_a_chunk_of_more_than_two_to_the_31_logits_is_right_to_its_last_row(place, backend, rows, vocabulary):
    """One chunk of all rows: its last rows, beyond element 2^31 on the GPU, are those of a chunk of their own."""
    assert place is CPU or rows * vocabulary > 2**31
    case = make(place, vocabulary, rows, 64)
    labels = torch.arange(rows, device=place.device) * 7 % vocabulary
    token_weight = torch.zeros(rows, device=place.device)
    token_weight[-5:] = 1
    advantages = torch.ones(rows, device=place.device)
    gradients = []
    for at in (slice(None), slice(rows - 5, None)):
        hidden = case.hidden[at].detach().requires_grad_()
        loss, _ = linear_policy_loss(hidden, case.weight, labels[at], advantages[at], objective=PolicyObjective(),
            token_weight=torch.where(token_weight[at] > 0, 1.0, 1e-30), chunk_rows=rows, backend=backend,
        )  # fmt: skip
        found = [torch.autograd.grad(loss, hidden)[0][-5:]]
        out = linear_logprob(hidden, case.weight, labels[at], chunk_rows=rows, backend=backend)
        found += [
            out.logprob[-5:].detach(),
            out.entropy[-5:].detach(),
            torch.autograd.grad(out.logprob.sum(), hidden)[0][-5:],
        ]
        gradients.append(found)
    for a, b in zip(*gradients, strict=True):
        assert b.any()
        assert (a.float() - b.float()).norm() <= 4e-3 * b.float().norm()


@on("triton")
def test_mode_a_composed_is_mode_b(place, backend):
    objective = PolicyObjective("dapo", kl="reverse", kl_coef=0.2, entropy_coef=0.01)
    case = make(place, place.vocabularies[0])
    inputs = upcast(case, BF16)
    fused_loss, stats = loss_of(case, inputs, objective, backend)
    out = linear_logprob(inputs[0], inputs[1], case.labels, rows=case.rows, bias=inputs[2], temperature=case.temperature,
        ref_hidden=case.ref_hidden, kl="reverse", backend=backend,
    )  # fmt: skip
    composed, again = policy_loss(
        out, case.labels, case.advantages, objective=objective, token_weight=case.token_weight, rows=case.rows,
        old_logprob=case.old_logprob,
    )  # fmt: skip
    torch.testing.assert_close(stats.sums, again.sums, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(fused_loss, inputs), torch.autograd.grad(composed, inputs), strict=True
    ):
        assert (a.float() - b.float()).norm() <= 4e-3 * b.float().norm()
