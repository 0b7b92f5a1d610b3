"""linear_policy_loss and policy_loss against autograd of the formulas written out densely."""

import importlib
import itertools
import weakref

import pytest
import torch
from torch import Tensor

from fst_kernels import PolicyObjective, PolicyStats, linear_logprob, linear_policy_loss, policy_loss
from fst_kernels.linear_logprob.rows import KnownRows

N, H, V = 9, 5, 11
KINDS = ("cispo", "grpo", "ppo", "dapo", "reinforce")


def dense_logits(hidden, weight, bias, temperature, softcap):
    x = hidden @ weight.t() + (0 if bias is None else bias)
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    return x / (temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature)


def naive_loss(case, objective, hidden, weight, bias, sequence=None):
    """The definition, on whole logits."""
    log_p = dense_logits(hidden, weight, bias, case["temperature"], case["softcap"]).log_softmax(-1)
    ref_weight, ref_bias = (
        (weight.detach(), bias) if case["ref_weight"] is None else (case["ref_weight"], case["ref_bias"])
    )
    log_q = (
        dense_logits(case["ref_hidden"], ref_weight, ref_bias, case["temperature"], case["softcap"])
        .log_softmax(-1)
        .detach()
    )
    rows = torch.arange(len(case["labels"])) if case["rows"] is None else case["rows"]
    live = ((case["labels"] != -100) & (case["token_weight"] != 0)).nonzero().squeeze(1)
    p, q, y = log_p[rows[live]], log_q[rows[live]], case["labels"][live].unsqueeze(1)
    logprob, ref_logprob = p.gather(1, y).squeeze(1), q.gather(1, y).squeeze(1)
    advantage = case["advantages"][live]
    rho = (logprob - (logprob.detach() if case["old"] is None else case["old"][live])).exp()
    if objective.kind == "gspo":
        same = (sequence[live].unsqueeze(1) == sequence[live]).to(rho.dtype)
        rho = (same @ rho.log() / same.sum(1)).exp()
    if objective.kind == "reinforce":
        policy = -advantage * logprob
    elif objective.kind == "cispo":
        policy = -torch.minimum(rho.detach(), rho.new_tensor(objective.ratio_cap)) * advantage * logprob
    else:
        bounded = rho.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage
        policy = -torch.minimum(rho * advantage, bounded)
    term = case["rollout_weight"][live] * policy - objective.entropy_coef * -(p.exp() * p).sum(1)
    if objective.kl == "k3" and objective.kl_ratio == "sequence":
        term = term + objective.kl_coef * rho * ((ref_logprob - logprob).exp() - (ref_logprob - logprob) - 1)
    elif objective.kl == "k3":
        k3 = (ref_logprob - logprob).exp() - (ref_logprob - logprob) - 1
        token_rho = (logprob - (logprob.detach() if case["old"] is None else case["old"][live])).exp()
        term = term + objective.kl_coef * k3 * (token_rho if objective.kl_unbiased else 1)
    elif objective.kl == "reverse":
        term = term + objective.kl_coef * (p.exp() * (p - q)).sum(1)
    elif objective.kl == "forward":
        term = term + objective.kl_coef * (q.exp() * (q - p)).sum(1)
    return (case["token_weight"][live] * term).sum()


def make_case(
    *, multi=True, bias=True, per_row=True, softcap=3.0, old=True, ref="own", seed=0, dtype=torch.float64
):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    m = 16 if multi else N
    labels = torch.randint(0, V, (m,), generator=g)
    labels[3], labels[-1], labels[0] = -100, V - 1, 0
    token_weight = torch.rand(m, generator=g, dtype=dtype) + 0.1
    token_weight[5] = 0
    return {
        "hidden": randn(N, H), "weight": randn(V, H), "bias": randn(V) if bias else None,
        "labels": labels, "rows": torch.randint(0, N - 1, (m,), generator=g) if multi else None,
        "advantages": randn(m), "token_weight": token_weight, "rollout_weight": torch.rand(m, generator=g, dtype=dtype) + 0.5,
        "old": -torch.rand(m, generator=g, dtype=dtype) * 4 - 0.5 if old else None,
        "temperature": torch.rand(N, generator=g, dtype=dtype) + 0.5 if per_row else 0.7, "softcap": softcap,
        "ref_hidden": randn(N, H), "ref_weight": randn(V, H) if ref == "own" else None,
        "ref_bias": randn(V) if ref == "own" and bias else None,
    }  # fmt: skip


def leaves(case):
    return [
        None if case[k] is None else case[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")
    ]


def fused_loss(case, objective, hidden, weight, bias, **kwargs):
    arguments = {
        "rows": case["rows"], "old_logprob": case["old"], "rollout_weight": case["rollout_weight"], "bias": bias,
        "temperature": case["temperature"], "softcap": case["softcap"], "ref_hidden": case["ref_hidden"],
        "ref_weight": case["ref_weight"], "ref_bias": case["ref_bias"], "token_weight": case["token_weight"],
    }  # fmt: skip
    return linear_policy_loss(
        hidden, weight, case["labels"], case["advantages"], objective=objective, **(arguments | kwargs)
    )


def composed_loss(case, objective, hidden, weight, bias, **kwargs):
    out = linear_logprob(
        hidden, weight, case["labels"], rows=case["rows"], bias=bias, temperature=case["temperature"], softcap=case["softcap"],
        ref_hidden=case["ref_hidden"], ref_weight=case["ref_weight"], ref_bias=case["ref_bias"],
        kl=objective.kl if objective.kl in ("reverse", "forward") else None,
    )  # fmt: skip
    return policy_loss(
        out, case["labels"], case["advantages"], objective=objective, token_weight=case["token_weight"], rows=case["rows"],
        old_logprob=case["old"], rollout_weight=case["rollout_weight"], **kwargs,
    )  # fmt: skip


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


def assert_same(got, want, atol=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("kl", [None, "k3", "k3 times rho", "reverse", "forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_equal_autograd_of_the_dense_formula(kind, kl):
    unbiased = kl == "k3 times rho"
    for i, (entropy, multi, bias, per_row, softcap) in enumerate(
        itertools.product((0.0, 0.3), (False, True), (False, True), (False, True), (None, 3.0))
    ):
        case = make_case(
            multi=multi,
            bias=bias,
            per_row=per_row,
            softcap=softcap,
            old=i % 3 != 2,
            ref="own" if i % 2 else "policy",
            seed=i,
        )
        objective = PolicyObjective(
            kind, ratio_cap=1.2, clip_low=0.3, clip_high=0.4, kl="k3" if unbiased else kl, kl_coef=0.7,
            entropy_coef=entropy, kl_unbiased=unbiased,
        )  # fmt: skip
        inputs = leaves(case)
        naive = naive_loss(case, objective, *inputs)
        want = gradients(naive, inputs)
        assert all(x.abs().max() > 1e-3 for x in want)
        for loss_of in (fused_loss, composed_loss):
            loss, stats = loss_of(case, objective, *inputs)
            torch.testing.assert_close(loss, naive)
            torch.testing.assert_close(stats.loss, naive.detach())
            assert_same(gradients(loss, inputs), want)


@pytest.mark.parametrize("kl_ratio", [None, "token", "sequence"])
def test_gspo_equals_autograd_of_the_sequence_formula_and_is_refused_by_the_fused_loss(kl_ratio):
    objective = PolicyObjective(
        "gspo", clip_low=0.3, clip_high=0.4, kl="k3", kl_coef=0.2, kl_unbiased=kl_ratio is not None, kl_ratio=kl_ratio
    )  # fmt: skip
    case = make_case()
    sequence = torch.arange(16) // 4
    inputs = leaves(case)
    naive = naive_loss(case, objective, *inputs, sequence=sequence)
    loss, stats = composed_loss(case, objective, *inputs, sequence=sequence)
    torch.testing.assert_close(loss, naive)
    torch.testing.assert_close(stats.loss, naive.detach())
    assert_same(gradients(loss, inputs), gradients(naive, inputs))
    with pytest.raises(ValueError, match=r"gspo.*use linear_logprob"):
        fused_loss(case, objective, *inputs)
    with pytest.raises(ValueError, match="needs sequence"):
        composed_loss(case, objective, *inputs)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_chunks_do_not_change_the_loss(chunk_rows):
    case, objective = make_case(), PolicyObjective(kl="reverse", kl_coef=0.5, entropy_coef=0.1)
    inputs = leaves(case)
    loss, stats = fused_loss(case, objective, *inputs, chunk_rows=chunk_rows)
    naive = naive_loss(case, objective, *inputs)
    torch.testing.assert_close(loss, naive)
    assert_same(gradients(loss, inputs), gradients(naive, inputs))
    assert stats.count == 14  # 16 labels, one ignored, one of weight 0


@pytest.mark.parametrize("chunk_rows", [2, 4, 1000])
@pytest.mark.parametrize("kl", [None, "k3", "reverse"])
def test_rows_known_to_the_host_change_nothing(kl, chunk_rows, monkeypatch):
    """As with hidden states on a GPU and rows on the host: labels that do not count stay and weigh nothing."""
    api = importlib.import_module("fst_kernels.linear_policy_loss.api")
    case, objective = make_case(), PolicyObjective("ppo", kl=kl, kl_coef=0.5, entropy_coef=0.1)
    case["old"][5] = float("nan")  # under a label of weight 0
    inputs = leaves(case)
    want, want_stats = fused_loss(case, objective, *inputs, chunk_rows=chunk_rows)
    operator, calls = api.linear_policy_loss_op, []

    def with_known_rows(*given, **named):
        calls.append(named)
        rows, order, bounds = KnownRows.of(case["rows"], N, chunk_rows, torch.device("cpu"))
        return operator(*given[:4], rows, *given[5:9], order, *given[10:], **named | {"bounds": bounds})

    monkeypatch.setattr(api, "linear_policy_loss_op", with_known_rows)
    loss, stats = fused_loss(case, objective, *inputs, chunk_rows=chunk_rows)
    assert len(calls) == 1
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(stats.sums, want_stats.sums)
    assert_same(gradients(loss, inputs), gradients(want, inputs))


def test_grad_output_scales_the_gradient_and_the_graph_can_be_walked_twice():
    case, objective = make_case(), PolicyObjective()
    inputs = leaves(case)
    loss, _ = fused_loss(case, objective, *inputs)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_same(torch.autograd.grad(-2.5 * loss, inputs), [-2.5 * x for x in once])


def test_second_derivatives_are_refused():
    case = make_case()
    inputs = leaves(case)
    loss, _ = fused_loss(case, PolicyObjective(), *inputs)
    with pytest.raises(RuntimeError, match="linear_policy_loss has first derivatives only"):
        torch.autograd.grad(loss, inputs[:1], create_graph=True)


def test_frozen_inputs_get_no_gradient_and_the_others_the_same_one():
    case, objective = make_case(), PolicyObjective(kl="forward", kl_coef=0.5)
    inputs = leaves(case)
    want = gradients(fused_loss(case, objective, *inputs)[0], inputs)
    for i in range(3):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        fused_loss(case, objective, *alone)[0].backward()
        assert torch.equal(alone[i].grad, want[i])
        assert all(x.grad is None for j, x in enumerate(alone) if j != i)
    with torch.no_grad():
        loss, _ = fused_loss(case, objective, *inputs)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, naive_loss(case, objective, *inputs).detach())


def test_the_weight_is_not_kept_for_the_backward():
    case = make_case()
    hidden, leaf, bias = leaves(case)
    weight = leaf.clone()
    loss, _ = fused_loss(case, PolicyObjective(), hidden, weight, bias)
    alive = weakref.ref(weight)
    del weight
    assert alive() is None
    loss.backward()
    assert leaf.grad.abs().max() > 0


def test_rows_that_do_not_count_are_never_read():
    case = make_case(softcap=None)
    dead = torch.tensor([8])  # no label has this row
    case["advantages"][case["rows"] == 2] = 0  # all coefficients of row 2 are zero
    inputs = leaves(case)
    want = gradients(fused_loss(case, PolicyObjective(), *inputs)[0], inputs)
    case["hidden"][dead] = torch.nan
    for name in ("advantages", "old", "rollout_weight"):
        case[name][[3, 5]] = torch.nan  # the ignored label and the one of weight 0
    spoilt = leaves(case)
    loss, stats = fused_loss(case, PolicyObjective(), *spoilt)
    got = gradients(loss, spoilt)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.isfinite(stats.sums).all()
    assert (got[0][[2, 8]] == 0).all()
    assert (got[0].abs().amax(1) > 0).sum() >= 5


def test_rows_with_zero_coefficients_drop_out_of_the_products(monkeypatch):
    from fst_kernels.linear_logprob.rows import Gradients

    case = make_case()
    case["advantages"][case["rows"] != 4] = 0
    seen, add = [], Gradients.add
    monkeypatch.setattr(
        Gradients,
        "add",
        lambda self, rows, d, h: (seen.append((rows.tolist(), len(d), len(h))), add(self, rows, d, h)),
    )
    fused_loss(case, PolicyObjective(), *leaves(case))
    assert seen == [([4], 1, 1)]


def test_all_labels_masked_gives_exactly_zero():
    case = make_case()
    for change in (
        {"labels": torch.full_like(case["labels"], -100)},
        {"token_weight": torch.zeros(16, dtype=torch.float64)},
    ):
        inputs = leaves(case)
        objective = PolicyObjective(kl="reverse", kl_coef=1.0, entropy_coef=1.0)
        for loss_of in (fused_loss, composed_loss):
            loss, stats = loss_of(case | change, objective, *inputs)
            assert loss == 0
            assert (stats.sums == 0).all()
            assert stats.kl == 0
            assert stats.ratio == 0
            assert all((x == 0).all() for x in gradients(loss, inputs))


def test_zero_advantage_gives_exactly_zero_gradient_and_huge_ones_scale():
    case = make_case()
    inputs = leaves(case)
    for kind in KINDS:
        zero = case | {"advantages": torch.zeros(16, dtype=torch.float64)}
        assert all(
            (x == 0).all() for x in gradients(fused_loss(zero, PolicyObjective(kind), *inputs)[0], inputs)
        )
        one = gradients(fused_loss(case, PolicyObjective(kind), *inputs)[0], inputs)
        huge = case | {"advantages": case["advantages"] * -1e4}
        got = gradients(fused_loss(huge, PolicyObjective("reinforce"), *inputs)[0], inputs)
        if kind == "reinforce":
            assert_same(got, [x * -1e4 for x in one], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_old_logprob_stays_finite(kind):
    case = make_case()
    case["old"] = torch.full_like(case["old"], -1000.0)
    inputs = leaves(case)
    loss, stats = fused_loss(case, PolicyObjective(kind), *inputs)
    assert torch.isfinite(loss)
    assert torch.isfinite(stats.sums).all()
    assert all(torch.isfinite(x).all() for x in gradients(loss, inputs))
    if kind == "cispo":
        assert stats.clipped_fraction == 1
    if kind in (
        "ppo",
        "grpo",
        "dapo",
    ):  # clipped for A > 0, held at e^20 for A < 0: no gradient on either side
        assert all(
            (x == 0).all() for x in gradients(fused_loss(case, PolicyObjective(kind), *inputs)[0], inputs)
        )


def test_an_impossible_label_under_k3_stays_finite_and_moves_nothing():
    case = make_case(softcap=None)
    inputs = leaves(case)
    loss, stats = fused_loss(
        case, PolicyObjective("reinforce", kl="k3", kl_coef=1.0), *inputs,
        ref_logprob=torch.full((16,), 990.0, dtype=torch.float64),
    )  # fmt: skip
    without, _ = fused_loss(case, PolicyObjective("reinforce"), *inputs)
    assert torch.isfinite(stats.sums).all()
    assert_same(gradients(loss, inputs), gradients(without, inputs))


def test_the_clip_includes_its_boundary():
    # uniform rows: the log-prob of every label is exactly -log V, so that rho is exactly what is asked for
    hidden, weight = (
        torch.zeros(4, H, dtype=torch.float64, requires_grad=True),
        torch.randn(V, H, dtype=torch.float64),
    )
    logprob = linear_logprob(hidden, weight, torch.arange(4)).logprob.detach()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    old = logprob - torch.tensor([1.25, 1.2500001, 0.75, 0.7499999], dtype=torch.float64).log()
    rho = (logprob - old).exp()
    objective = PolicyObjective("ppo", clip_low=1 - float(rho[2]), clip_high=float(rho[0]) - 1)
    loss, stats = linear_policy_loss(
        hidden,
        weight,
        torch.arange(4),
        advantages,
        objective=objective,
        token_weight=torch.ones(4),
        old_logprob=old,
    )
    loss.backward()
    assert (hidden.grad.abs().amax(1) > 0).tolist() == [True, False, True, False]
    assert stats.clipped_fraction == 0.5
    cap = PolicyObjective("cispo", ratio_cap=float(rho[0]))
    _, stats = linear_policy_loss(
        hidden,
        weight,
        torch.arange(4),
        advantages,
        objective=cap,
        token_weight=torch.ones(4),
        old_logprob=old,
    )
    assert stats.clipped_fraction == 0.25


@pytest.mark.parametrize("chunk_rows", [None, 64, 50])
def test_on_policy_the_ratio_is_exactly_one_whatever_the_batch(chunk_rows):
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(130, 48, generator=g), torch.randn(123, 48, generator=g)
    labels = torch.randint(0, 123, (130,), generator=g)
    old = linear_logprob(hidden, weight, labels, temperature=0.7).logprob
    pick = torch.randperm(130, generator=g)[:37]
    _, stats = linear_policy_loss(
        hidden[pick], weight, labels[pick], torch.randn(37, generator=g), objective=PolicyObjective(),
        token_weight=torch.ones(37), old_logprob=old[pick], temperature=0.7, chunk_rows=chunk_rows,
    )  # fmt: skip
    assert stats.ratio == 1
    assert stats.mismatch_kl == 0
    assert stats.sums[5] == 37


def test_stats_of_parts_add_up_to_those_of_the_whole():
    case = make_case()
    objective = PolicyObjective(ratio_cap=1.2, kl="reverse", kl_coef=0.3, entropy_coef=0.2)
    inputs = leaves(case)
    whole_loss, whole = fused_loss(case, objective, *inputs)
    per_label = ("labels", "rows", "advantages", "token_weight", "rollout_weight", "old")
    parts = [
        fused_loss(case | {k: case[k][s] for k in per_label}, objective, *inputs)
        for s in (slice(0, 7), slice(7, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole_loss)
    total = parts[0][1] + parts[1][1]
    torch.testing.assert_close(total.sums, whole.sums)
    # and they are what they say they are
    live = (case["labels"] != -100) & (case["token_weight"] != 0)
    out = linear_logprob(
        *inputs[:2], case["labels"], rows=case["rows"], bias=inputs[2], temperature=case["temperature"], softcap=3.0,
        ref_hidden=case["ref_hidden"], ref_weight=case["ref_weight"], ref_bias=case["ref_bias"], kl="reverse",
    )  # fmt: skip
    n, row = case["token_weight"][live], case["rows"][live]
    log_ratio = (out.logprob - case["old"]).detach()[live]
    torch.testing.assert_close(whole.kl, ((n * out.kl[row]).sum() / n.sum()).detach())
    torch.testing.assert_close(whole.entropy, ((n * out.entropy[row]).sum() / n.sum()).detach())
    torch.testing.assert_close(whole.ratio, log_ratio.exp().mean())
    torch.testing.assert_close(whole.mismatch_kl, (log_ratio.exp() - 1 - log_ratio).mean())
    assert whole.clipped_fraction == (log_ratio.exp() > 1.2).double().mean()
    assert whole.count == live.sum()
    torch.testing.assert_close(
        whole.policy_loss, whole.loss - 0.3 * whole.kl * n.sum() + 0.2 * whole.entropy * n.sum()
    )
    assert isinstance(total, PolicyStats)


def test_k3_takes_reference_logprobs_or_computes_them():
    case, objective = make_case(), PolicyObjective(kl="k3", kl_coef=0.5)
    inputs = leaves(case)
    out = linear_logprob(
        *inputs[:2], case["labels"], rows=case["rows"], bias=inputs[2], temperature=case["temperature"], softcap=3.0,
        ref_hidden=case["ref_hidden"], ref_weight=case["ref_weight"], ref_bias=case["ref_bias"],
    )  # fmt: skip
    computed, _ = fused_loss(case, objective, *inputs)
    given, _ = fused_loss(
        case, objective, *inputs, ref_logprob=out.ref_logprob, ref_hidden=None, ref_weight=None, ref_bias=None
    )
    torch.testing.assert_close(given, computed)
    assert_same(gradients(given, inputs), gradients(computed, inputs))


def test_reruns_are_bitwise_equal_and_low_precision_is_close():
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(softcap=None)
        objective = PolicyObjective(kl="reverse", kl_coef=0.3, entropy_coef=0.1)
        rounded = {
            k: case[k].to(dtype) for k in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
        }
        exact = case | {k: x.double() for k, x in rounded.items()}
        inputs = leaves(case | rounded)
        runs = [gradients(fused_loss(case | rounded, objective, *inputs)[0], inputs) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        truth = leaves(exact)
        for got, want in zip(runs[0], gradients(naive_loss(exact, objective, *truth), truth), strict=True):
            assert got.dtype == dtype
            assert (got.double() - want).norm() / want.norm() < (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_no_rows():
    hidden, weight = torch.zeros(0, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    empty = torch.zeros(0)
    loss, stats = linear_policy_loss(
        hidden,
        weight,
        torch.zeros(0, dtype=torch.int64),
        empty,
        objective=PolicyObjective(),
        token_weight=empty,
    )
    loss.backward()
    assert loss == 0
    assert stats.count == 0
    assert hidden.grad.shape == (0, H)
    assert (weight.grad == 0).all()


def test_bad_arguments_are_named():
    case = make_case(softcap=None)
    inputs = leaves(case)
    nan_old = case["old"].clone()
    nan_old[7] = torch.nan
    no_reference = {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
    for objective, change, message in (
        (PolicyObjective(), {"old_logprob": nan_old}, r"old_logprob\[7\]=nan under a live label"),
        (
            PolicyObjective(),
            {"token_weight": torch.ones(3)},
            r"token_weight has shape \[3\]; allowed: \[16\]",
        ),
        (
            PolicyObjective(),
            {"old_logprob": torch.ones(16, dtype=torch.int64)},
            "old_logprob has dtype int64; allowed: float32",
        ),
        (PolicyObjective(kl="k3"), no_reference, "kl='k3' needs ref_hidden or ref_logprob"),
        (PolicyObjective(kl="reverse"), no_reference, "kl='reverse' needs ref_hidden"),
        (PolicyObjective(), {"chunk_rows": 0}, "chunk_rows=0"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_loss(case, objective, *inputs, **change)
    with pytest.raises(RuntimeError, match="linear_policy_loss: backend=cuda cannot run"):
        fused_loss(case, PolicyObjective(), *inputs, backend="cuda")
