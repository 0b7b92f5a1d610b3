"""The fused losses as torch operators: torch.compile traces them in one graph, fake kernels agree with the real ones, and the operators
hold what torch asks of any operator.
"""

import pytest
import torch

from fst_kernels import PolicyObjective, linear_logprob, linear_policy_loss, policy_loss

N, H, V = 7, 6, 13


def case(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias, ref = (
        torch.randn(*s, generator=g, dtype=dtype) for s in ((N, H), (V, H), (V,), (N, H))
    )
    labels = torch.randint(0, V, (12,), generator=g)
    labels[4] = -100
    return {
        "hidden": hidden, "weight": weight, "bias": bias, "ref": ref, "labels": labels,
        "rows": torch.randint(0, N, (12,), generator=g), "advantages": torch.randn(12, generator=g),
        "token_weight": torch.rand(12, generator=g), "old": -3 * torch.rand(12, generator=g),
    }  # fmt: skip


def fused(c, objective, hidden, weight, bias):
    loss, stats = linear_policy_loss(
        hidden, weight, c["labels"], c["advantages"], objective=objective, token_weight=c["token_weight"], rows=c["rows"],
        old_logprob=c["old"], bias=bias, temperature=0.8, ref_hidden=c["ref"] if objective.kl else None,
    )  # fmt: skip
    return loss, stats.sums, stats.kl


def composed(c, objective, hidden, weight, bias):
    out = linear_logprob(
        hidden, weight, c["labels"], rows=c["rows"], bias=bias, temperature=0.8, ref_hidden=c["ref"], kl=objective.exact_kl
    )  # fmt: skip
    loss, stats = policy_loss(
        out, c["labels"], c["advantages"], objective=objective, token_weight=c["token_weight"], rows=c["rows"],
        old_logprob=c["old"], sequence=c["rows"] % 3,
    )  # fmt: skip
    return loss, stats.sums, stats.kl


def run(function, c, objective, needed=(True, True, True)):
    inputs = [
        c[name].clone().requires_grad_(need)
        for name, need in zip(("hidden", "weight", "bias"), needed, strict=True)
    ]
    loss, *numbers = function(c, objective, *inputs)
    (3 * loss).backward()
    return [loss.detach(), *numbers, *(x.grad for x in inputs)]


@pytest.mark.parametrize(
    ("function", "objective"),
    [
        (fused, PolicyObjective("cispo", ratio_cap=1.5)),
        (fused, PolicyObjective("grpo", kl="reverse", kl_coef=0.2, entropy_coef=0.1)),
        (fused, PolicyObjective("ppo", kl="k3", kl_coef=0.2, kl_unbiased=True)),
        (composed, PolicyObjective("dapo", kl="forward", kl_coef=0.2)),
        (composed, PolicyObjective("gspo", kl="k3", kl_coef=0.2)),
    ],
    ids=["fused cispo", "fused reverse KL", "fused k3", "composed forward KL", "composed gspo"],
)
def test_compiled_in_one_graph_they_give_the_same_bits(function, objective):
    torch._dynamo.reset()
    c = case()
    want = run(function, c, objective)
    got = run(torch.compile(function, fullgraph=True, backend="aot_eager"), c, objective)
    assert want[3].norm() > 0
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_compiled_with_a_frozen_weight_and_without_any_gradient():
    torch._dynamo.reset()
    c, objective = case(), PolicyObjective()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    frozen = run(compiled, c, objective, needed=(True, False, False))
    assert torch.equal(frozen[3], run(fused, c, objective)[3])
    assert frozen[4] is None
    assert frozen[5] is None
    with torch.no_grad():
        loss, *_ = compiled(c, objective, c["hidden"], c["weight"], c["bias"])
    assert torch.equal(loss, frozen[0])
    assert not loss.requires_grad


def test_values_are_checked_under_torch_compile_too():
    torch._dynamo.reset()
    c, objective = case(), PolicyObjective()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"labels\[0\]=13; allowed: 0 <= labels < 13"):
        run(compiled, c | {"labels": torch.full((12,), V)}, objective)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.mark.parametrize("kl", [None, "reverse"])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logprob_is_an_operator_as_torch_wants_it(kl, frozen):
    c = case()
    hidden, weight = c["hidden"].requires_grad_(), c["weight"].requires_grad_(not frozen)
    torch.library.opcheck(
        torch.ops.fst_kernels.linear_logprob.default,
        (hidden, weight, c["bias"], c["labels"], c["rows"], c["ref"] if kl else None, None, None, None),
        {"temperature": 0.7, "softcap": 5.0, "kl": kl, "backend": "reference", "chunk_rows": 4},
        test_utils=CHECKS,
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_linear_policy_loss_is_an_operator_as_torch_wants_it(frozen):
    c = case()
    hidden, weight = c["hidden"].requires_grad_(), c["weight"].requires_grad_(not frozen)
    tensors = (hidden, weight, None, c["labels"], c["rows"], None, None, None, torch.full((N,), 0.9), None)
    torch.library.opcheck(
        torch.ops.fst_kernels.linear_policy_loss.default,
        (*tensors, c["advantages"], c["token_weight"], c["old"], None, None),
        {
            "bounds": [], "temperature": 1.0, "softcap": None, "kind": "ppo", "ratio_cap": 4.0, "clip_low": 0.2, "clip_high": 0.2, "kl": None,
            "kl_coef": 0.0, "entropy_coef": 0.1, "kl_unbiased": False, "backend": "reference", "chunk_rows": 4, "need_hidden": True,
            "need_weight": not frozen, "need_bias": False,
        },
        test_utils=CHECKS,
    )  # fmt: skip
