"""The row kernel of csrc/policy_rows.cu, run by host threads, against autograd of the definitions in fp64; and mode B on top of it."""

import itertools
from pathlib import Path

import pytest
import torch

from fst_kernels import PolicyObjective, backends, policy_terms
from fst_kernels import library as library_module
from fst_kernels.linear_policy_loss.cuda import CHOOSE, Launch, device_chunk_rows, policy_rows
from fst_kernels.linear_policy_loss.program import coefficient_program
from tests.kernels.test_linear_policy_loss import KINDS, fused_loss, gradients, leaves, make_case

RESIDENT, CLUSTER, TWO_READS = Launch(64, 1, 1), Launch(32, 2, 1), Launch(64, 1, 0)
LAUNCHES = (RESIDENT, CLUSTER, TWO_READS)
EXACT = ("reverse", "forward")


def make_rows(rows, vocabulary, *, labels_per_row=1, scale=3.0, seed=0, spread=0.5):
    """Logits and what each label brings; the first and last column are labels."""
    g = torch.Generator().manual_seed(seed)
    count = rows * labels_per_row
    labels = torch.randint(0, vocabulary, (count,), generator=g)
    labels[0], labels[-1] = 0, vocabulary - 1
    x = torch.randn(rows, vocabulary, generator=g) * scale
    at = torch.arange(rows).repeat_interleave(labels_per_row)
    logprob = x.double().log_softmax(-1)[at, labels].float()
    return {
        "logits": x, "ref": x + torch.randn(rows, vocabulary, generator=g) * spread, "labels": labels, "at": at,
        "temperature": torch.rand(rows, generator=g) + 0.5, "softcap": None,
        "inputs": {
            "token_weight": torch.rand(count, generator=g) + 0.1, "advantages": torch.randn(count, generator=g),
            "old_logprob": logprob + 0.2 * torch.randn(count, generator=g), "rollout_weight": torch.rand(count, generator=g) + 0.5,
        },
    }  # fmt: skip


def run(case, objective, launch=CHOOSE, out=None, library_name="host", **change):
    case = case | change
    x = case["logits"]
    out = torch.empty(x.shape) if out is None else out
    use_ref = objective.kl is not None
    given = frozenset(case["inputs"]) | ({"ref_logprob"} if objective.kl == "k3" else frozenset())
    got = policy_rows(
        x, case["temperature"], case["at"], case["labels"], ref=case["ref"] if use_ref else None,
        kl=objective.kl if objective.kl in EXACT else None, softcap=case["softcap"], d_logits=out, inputs=case["inputs"],
        program=coefficient_program(objective, given), kl_coef=objective.kl_coef, entropy_coef=objective.entropy_coef,
        library_name=library_name, launch=launch,
    )  # fmt: skip
    return got, out


def truth(case, objective):
    """dLoss/dlogits by autograd in fp64, and the row quantities. The coefficients are those of policy_terms in fp64."""

    def log_softmax(x):
        x = x if case["softcap"] is None else case["softcap"] * torch.tanh(x / case["softcap"])
        return (x / case["temperature"].double().unsqueeze(1)).log_softmax(-1)

    x = case["logits"].double().requires_grad_()
    p, q = log_softmax(x), log_softmax(case["ref"].double())
    at = case["at"], case["labels"]
    inputs = {name: v.double() for name, v in case["inputs"].items()}
    if objective.kl == "k3":
        inputs["ref_logprob"] = q[at]
    terms = policy_terms(p[at].detach(), objective=objective, **inputs)
    n = torch.zeros(len(x), dtype=torch.float64).index_add_(0, case["at"], inputs["token_weight"])
    entropy = -(p.exp() * p).sum(1)
    kl = (p.exp() * (p - q)).sum(1) if objective.kl == "reverse" else (q.exp() * (q - p)).sum(1)
    loss = (terms.coefficient * p[at]).sum() - objective.entropy_coef * (n * entropy).sum()
    if objective.kl in EXACT:
        loss = loss + objective.kl_coef * (n * kl).sum()
    (gradient,) = torch.autograd.grad(loss, x)
    return {
        "logprob": p[at],
        "ref_logprob": q[at],
        "entropy": entropy,
        "kl": kl,
        "coefficient": terms.coefficient,
    }, gradient


def assert_matches(case, objective, launch=CHOOSE, tolerance=1e-5):
    got, d = run(case, objective, launch)
    numbers, want = truth(case, objective)
    for name in (
        "logprob",
        "entropy",
        "coefficient",
        *(["kl"] if objective.kl in EXACT else []),
        *(["ref_logprob"] if objective.kl else []),
    ):
        torch.testing.assert_close(
            getattr(got, name).double(),
            numbers[name].detach(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    torch.testing.assert_close(d.double(), want, rtol=tolerance, atol=tolerance)
    return d, want


@pytest.mark.parametrize("kl", [None, "k3", "reverse", "forward"])
@pytest.mark.parametrize("launch", LAUNCHES, ids=["resident", "cluster", "two reads"])
def test_gradient_and_statistics_are_those_of_the_dense_formula(launch, kl):
    for i, (vocabulary, labels, softcap) in enumerate(
        itertools.product((1, 5, 123, 600), (1, 4), (None, 4.0))
    ):
        objective = PolicyObjective(
            KINDS[i % 5], ratio_cap=1.1, kl=kl, kl_coef=0.7, entropy_coef=0.3 * (i % 2)
        )
        case = make_rows(3, vocabulary, labels_per_row=labels, seed=i) | {"softcap": softcap}
        _, want = assert_matches(case, objective, launch)
        assert vocabulary == 1 or want.abs().max() > 1e-2


def test_k3_times_the_ratio_is_a_program_too():
    objective = PolicyObjective("ppo", kl="k3", kl_coef=0.7, kl_unbiased=True)
    plain = PolicyObjective("ppo", kl="k3", kl_coef=0.7)
    case = make_rows(3, 123, labels_per_row=4)
    _, want = assert_matches(case, objective)
    assert (want - truth(case, plain)[1]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("vocabulary", "kl"), [(50257, "reverse"), (129920, "k3"), (151936, "forward"), (151936, None)]
)
def test_rows_of_real_vocabularies(vocabulary, kl):
    objective = PolicyObjective("cispo", kl=kl, kl_coef=0.5, entropy_coef=0.1)
    d, _ = assert_matches(make_rows(1, vocabulary, labels_per_row=3), objective)
    assert abs(d.double().sum()) < 2e-5 * d.double().abs().sum()


@pytest.mark.parametrize("launch", LAUNCHES, ids=["resident", "cluster", "two reads"])
def test_extreme_rows_stay_exact(launch):
    case = make_rows(8, 123)
    x, r = case["logits"], case["ref"]
    x[0], x[1], x[2] = x[0] - 200, x[1] + 200, 0.0
    x[3] = 0
    x[3, 7] = 200  # one-hot, its label elsewhere
    x[4], r[4] = x[4] * 100, r[4] - 200
    x[5] = -200
    r[6] = 200
    case["temperature"] = torch.tensor([1.0, 1.0, 1.0, 1.0, 10.0, 0.01, 1.0, 10.0])
    case["inputs"]["old_logprob"] = torch.full((8,), -1.0)
    # an importance ratio multiplies the error of the log-prob, up to the cap of cispo
    for kl in (None, "reverse", "forward"):
        objective = PolicyObjective("cispo", ratio_cap=4.0, kl=kl, kl_coef=0.01, entropy_coef=0.01)
        d, _ = assert_matches(case, objective, launch, tolerance=4e-5)
        assert ((d.double().sum(1) * case["temperature"]).abs() < 2e-5).all()


def test_huge_logits_and_a_nan_stay_in_their_row():
    case, objective = make_rows(4, 130), PolicyObjective(kl="reverse", kl_coef=0.1, entropy_coef=0.1)
    _, alone = run(case, objective)
    case["logits"][1] = case["logits"][1] * 1e4
    case["logits"][2, 77] = torch.nan
    got, d = run(case, objective)
    assert torch.isfinite(d[1]).all()
    assert torch.isnan(d[2]).all()
    assert torch.isnan(got.logprob[2])
    assert torch.equal(d[[0, 3]], alone[[0, 3]])


def test_every_row_sums_to_zero():
    objective = PolicyObjective("reinforce", kl="reverse", kl_coef=0.5, entropy_coef=0.2)
    for launch in LAUNCHES:
        _, d = run(make_rows(6, 601, labels_per_row=3, scale=8.0), objective, launch)
        assert (d.double().sum(1).abs() < 1e-5).all()
        assert (d.abs().amax(1) > 1e-2).all()


@pytest.mark.parametrize("launch", LAUNCHES, ids=["resident", "cluster", "two reads"])
def test_a_row_with_hundreds_of_labels_some_of_them_equal(launch):
    case = make_rows(2, 57, labels_per_row=150)
    keep = torch.ones(300, dtype=torch.bool)
    keep[151:] = False  # the second row keeps one label
    case["inputs"] = {name: x[keep] for name, x in case["inputs"].items()}
    case |= {"labels": case["labels"][keep], "at": case["at"][keep]}
    assert_matches(
        case, PolicyObjective("grpo", kl="reverse", kl_coef=0.1, entropy_coef=0.1), launch, tolerance=3e-5
    )


def test_rows_without_labels_get_a_zero_gradient():
    case = make_rows(4, 50)
    case["at"] = torch.tensor([0, 0, 3, 3])
    _, d = run(case, PolicyObjective(kl="forward", kl_coef=0.5, entropy_coef=0.5))
    assert (d[1:3] == 0).all()
    assert (d[[0, 3]].abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("launch", LAUNCHES, ids=["resident", "cluster", "two reads"])
@pytest.mark.parametrize("vocabulary", [603, 1024])
def test_in_place_and_bf16_write_the_same_gradient(launch, vocabulary):
    case, objective = make_rows(3, vocabulary, labels_per_row=2), PolicyObjective(kl="reverse", kl_coef=0.5)
    _, want = run(case, objective, launch)
    x = case["logits"].clone()
    run(case, objective, launch, out=x, logits=x)
    assert torch.equal(x, want)
    half = torch.empty(3, vocabulary, dtype=torch.bfloat16)
    run(case, objective, launch, out=half)
    assert torch.equal(half, want.bfloat16())
    x = case["logits"].clone()
    run(case, objective, launch, out=x.view(torch.bfloat16)[:, :vocabulary], logits=x)
    assert torch.equal(x.view(torch.bfloat16)[:, :vocabulary], want.bfloat16())


def test_bf16_rounds_ties_to_even():
    # the label's probability is 0, so that its gradient is the coefficient itself
    ties = 1 + torch.arange(1, 8, 2) / 256
    count = len(ties)
    case = {
        "logits": torch.tensor([[0.0, -1000.0]]).repeat(count, 1), "ref": None, "labels": torch.ones(count, dtype=torch.int64),
        "at": torch.arange(count), "temperature": torch.ones(count), "softcap": None,
        "inputs": {"token_weight": torch.ones(count), "advantages": -ties},
    }  # fmt: skip
    _, d = run(case, PolicyObjective("reinforce"), out=torch.empty(count, 2, dtype=torch.bfloat16))
    assert torch.equal(d[:, 1], ties.bfloat16())


def test_rows_may_lie_apart_and_start_anywhere():
    case, objective = make_rows(3, 64), PolicyObjective(kl="forward", kl_coef=0.5)
    _, want = run(case, objective)
    wide, wide_ref, wide_out = (torch.zeros(3, 71) for _ in range(3))
    for offset in (1, 4):
        x, r, d = (w[:, offset : offset + 64] for w in (wide, wide_ref, wide_out))
        x.copy_(case["logits"]), r.copy_(case["ref"])
        wide_out.fill_(7.0)
        run(case, objective, out=d, logits=x, ref=r)
        assert torch.equal(d, want)
        assert (wide_out[:, :offset] == 7).all()
        assert (wide_out[:, offset + 64 :] == 7).all()


@pytest.mark.parametrize("launch", LAUNCHES, ids=["resident", "cluster", "two reads"])
def test_reruns_neighbours_and_a_pass_without_gradient_give_the_same_bits(launch):
    case, objective = make_rows(5, 301), PolicyObjective(kl="reverse", kl_coef=0.5, entropy_coef=0.1)
    got, d = run(case, objective, launch)
    again, d_again = run(case, objective, launch)
    assert torch.equal(d, d_again)
    one = {k: case[k][3:4] for k in ("logits", "ref", "labels", "temperature")} | {"at": torch.tensor([0])}
    one |= {"inputs": {name: x[3:4] for name, x in case["inputs"].items()}}
    alone, d_alone = run(case | one, objective, launch)
    assert torch.equal(d_alone[0], d[3])
    stats = policy_rows(
        case["logits"], case["temperature"], case["at"], case["labels"], ref=case["ref"], kl="reverse", library_name="host", launch=launch
    )  # fmt: skip
    assert stats.coefficient is None
    for name in ("lse", "entropy", "kl", "logprob", "ref_logprob"):
        assert torch.equal(getattr(got, name), getattr(again, name))
        assert torch.equal(getattr(got, name)[3], getattr(alone, name)[0])
        assert torch.equal(getattr(got, name), getattr(stats, name))
    # scored by the same kernel, the ratio is exactly 1: coefficients are the advantages
    inputs = {
        "token_weight": torch.ones(5),
        "advantages": case["inputs"]["advantages"],
        "old_logprob": stats.logprob,
    }
    on_policy, _ = run(case, PolicyObjective("cispo"), launch, inputs=inputs)
    assert torch.equal(on_policy.coefficient, -inputs["advantages"])


def test_no_rows_at_all():
    case = make_rows(1, 9)
    empty = {k: case[k][:0] for k in ("logits", "ref", "labels", "temperature", "at")}
    got, d = run(case | empty | {"inputs": {n: x[:0] for n, x in case["inputs"].items()}}, PolicyObjective())
    assert d.shape == (0, 9)
    assert got.logprob.shape == (0,)


# ------------------------------------------------------------------------------------------------------------- mode B


@pytest.mark.parametrize("kl", [None, "k3", "reverse", "forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_mode_b_on_the_row_kernel_equals_the_reference(kind, kl):
    for i, (entropy, multi, softcap) in enumerate(itertools.product((0.0, 0.3), (False, True), (None, 3.0))):
        case = make_case(
            multi=multi, bias=i % 2 == 0, per_row=i % 3 != 0, softcap=softcap, old=i % 4 != 3, ref="own" if i % 3 else "policy",
            seed=i, dtype=torch.float32,
        )  # fmt: skip
        objective = PolicyObjective(
            kind, ratio_cap=1.2, clip_low=0.3, clip_high=0.4, kl=kl, kl_coef=0.1, entropy_coef=entropy
        )
        inputs = leaves(case)
        want_loss, want = fused_loss(case, objective, *inputs, backend="reference")
        loss, stats = fused_loss(case, objective, *inputs, backend="host", chunk_rows=4 if i % 2 else None)
        torch.testing.assert_close(stats.sums, want.sums, rtol=1e-5, atol=1e-5)
        assert stats.sums[6] == want.sums[6]
        for got, exact in zip(gradients(loss, inputs), gradients(want_loss, inputs), strict=True):
            assert (got - exact).norm() <= 1e-5 * exact.norm()


def test_masked_batches_and_frozen_inputs():
    case = make_case(dtype=torch.float32)
    objective = PolicyObjective(kl="reverse", kl_coef=1.0, entropy_coef=1.0)
    for change in ({"labels": torch.full_like(case["labels"], -100)}, {"token_weight": torch.zeros(16)}):
        inputs = leaves(case)
        loss, stats = fused_loss(case | change, objective, *inputs, backend="host")
        assert loss == 0
        assert (stats.sums == 0).all()
        assert all((x == 0).all() for x in gradients(loss, inputs))
    inputs = leaves(case)
    want = gradients(fused_loss(case, objective, *inputs, backend="host")[0], inputs)
    for i in range(3):
        alone = [x.detach().requires_grad_(i == j) for j, x in enumerate(inputs)]
        (-2.0 * fused_loss(case, objective, *alone, backend="host")[0]).backward()
        assert torch.equal(alone[i].grad, -2.0 * want[i])
    with torch.no_grad():
        loss, _ = fused_loss(case, objective, *inputs, backend="host")
    torch.testing.assert_close(loss, fused_loss(case, objective, *inputs, backend="reference")[0].detach())


def test_rows_of_zero_coefficients_leave_the_products_and_bf16_inputs_are_close():
    case = make_case(dtype=torch.float32, softcap=None)
    case["advantages"][case["rows"] == 2] = 0
    case["hidden"][8] = torch.nan  # no label has this row
    inputs = leaves(case)
    got = gradients(fused_loss(case, PolicyObjective(), *inputs, backend="host")[0], inputs)
    assert (got[0][[2, 8]] == 0).all()
    assert all(torch.isfinite(x).all() for x in got)
    low = {
        k: case[k].bfloat16() for k in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    }
    low["hidden"][8] = 0
    inputs = leaves(case | low)
    objective = PolicyObjective(kl="reverse", kl_coef=0.1)
    runs = [
        gradients(fused_loss(case | low, objective, *inputs, backend=b)[0], inputs)
        for b in ("host", "reference")
    ]
    for a, b in zip(*runs, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b.float()).norm() <= 4e-3 * b.float().norm()


# ------------------------------------------------------------------------------------------------------------- what cannot run says so


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    case = make_case(dtype=torch.float32)
    with pytest.raises(
        RuntimeError,
        match=r"backend=cuda cannot run: it needs a CUDA device, the tensors are on cpu; reference or .*host can",
    ):
        fused_loss(case, PolicyObjective(), *leaves(case), backend="cuda")
    double = make_case()
    with pytest.raises(
        RuntimeError, match="backend=host cannot run: its kernels sum in float32, the tensors are float64"
    ):
        fused_loss(double, PolicyObjective(), *leaves(double), backend="host")
    with pytest.raises(ValueError, match="logits is on cpu; backend=cuda works on cuda tensors"):
        policy_rows(torch.zeros(1, 3), torch.ones(1), torch.zeros(1).long(), torch.zeros(1).long())
    case = make_rows(1, 99)
    for launch in (
        Launch(threads=33),
        Launch(threads=1024),
        Launch(cluster=3),
        Launch(cluster=4),
        Launch(64, 2, 0),
    ):
        with pytest.raises(
            RuntimeError,
            match=r"policy_rows on \[1, 99\] with Launch.*: an argument is out of range \(code -1\)",
        ):
            run(case, PolicyObjective(), launch)
    with pytest.raises(RuntimeError, match="an argument is out of range"):  # 600 KB do not fit into one block
        run(make_rows(1, 151936), PolicyObjective(), RESIDENT)
    report = backends()["linear_policy_loss"]
    assert report["taken"] != "host"
    assert "for tests" in report["others"]["host"]
    monkeypatch.setattr(library_module, "_CHECKOUT", Path("/nowhere"))
    monkeypatch.setattr(library_module, "_PACKAGE", Path("/nowhere"))
    assert "it compiles /nowhere/csrc, which is not there" in library_module.missing("host")
    assert "cmake --build build/csrc" in library_module.missing("cuda")


def test_a_library_built_from_other_sources_is_refused(monkeypatch):
    from fst_kernels.linear_policy_loss import cuda

    fields = [*cuda._PolicyRows._fields_, ("more", cuda.ctypes.c_int64)]
    monkeypatch.setattr(
        cuda, "_PolicyRows", type("_PolicyRows", (cuda.ctypes.Structure,), {"_fields_": fields})
    )
    with pytest.raises(
        RuntimeError,
        match=r"was built from other sources \(its arguments take \d+ bytes, \d+ expected\); build it again",
    ):
        cuda._library.__wrapped__("host")


def test_chunks_on_a_device_take_a_fixed_share_of_memory():
    for vocabulary in (123, 50257, 151936, 10**7):
        for matrices in (1, 2):
            rows = device_chunk_rows(vocabulary, matrices)
            assert rows % 64 == 0
            assert rows == 64 or rows * vocabulary * 4 * matrices <= 768 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("kl", [None, "k3", "reverse", "forward"])
def test_on_a_gpu_every_launch_gives_the_gradient_of_the_dense_formula(kl):
    if (reason := library_module.missing("cuda")) is not None:
        pytest.skip(reason)
    objective = PolicyObjective("cispo", kl=kl, kl_coef=0.5, entropy_coef=0.1)
    newest = torch.cuda.get_device_capability()[0] >= 9
    launches = [CHOOSE, Launch(resident=0), *(Launch(cluster=c) for c in ((2, 4, 8) if newest else ()))]
    for vocabulary, bf16, launch in itertools.product((123, 50257, 151936), (False, True), launches):
        if launch.cluster in (2, 4) and vocabulary == 151936:
            continue  # with a reference the row does not fit
        case = make_rows(5, vocabulary, labels_per_row=3)
        numbers, want = truth(case, objective)
        device = {name: x.cuda() for name, x in case.items() if isinstance(x, torch.Tensor)}
        device["inputs"] = {name: x.cuda() for name, x in case["inputs"].items()}
        runs = []
        for _ in range(2):
            x = device["logits"].clone()
            out = x.view(torch.bfloat16)[:, :vocabulary] if bf16 else x
            got, d = run(case | device, objective, launch, out=out, logits=x, library_name="cuda")
            runs.append((d.clone(), *(y for y in got if y is not None)))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        torch.testing.assert_close(
            got.logprob.cpu().double(), numbers["logprob"].detach(), rtol=1e-5, atol=1e-5
        )
        tolerance = 4e-3 if bf16 else 1e-5
        torch.testing.assert_close(d.cpu().double(), want, rtol=tolerance, atol=1e-5)
