"""The objective as a program that the row kernel runs: it is policy_terms, at every boundary."""

import pytest
import torch

from fst_kernels import PolicyObjective, policy_terms
from fst_kernels.linear_policy_loss.program import INPUTS, Op, coefficient_program, compile_program
from tests.kernels.test_linear_policy_loss import KINDS
from tests.kernels.test_policy_rows import run


def interpret(program, inputs):
    values = []
    two = {
        Op.ADD: torch.add,
        Op.SUB: torch.sub,
        Op.MUL: torch.mul,
        Op.MIN: torch.minimum,
        Op.MAX: torch.maximum,
        Op.GT: torch.gt,
        Op.LE: torch.le,
    }
    for i in program:
        match i.op:
            case Op.INPUT:
                values.append(inputs[INPUTS[i.a]])
            case Op.CONSTANT:
                values.append(torch.full_like(inputs["logprob"], i.constant))
            case Op.WHERE:
                values.append(torch.where(values[i.a] != 0, values[i.b], values[i.c]))
            case Op.NEG | Op.EXP | Op.EXPM1:
                values.append(
                    {Op.NEG: torch.neg, Op.EXP: torch.exp, Op.EXPM1: torch.expm1}[i.op](values[i.a])
                )
            case _:
                values.append(two[i.op](values[i.a], values[i.b]).double())
    return values[-1]


@pytest.mark.parametrize("kl", [None, "k3"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_program_is_policy_terms(kind, kl):
    g = torch.Generator().manual_seed(1)
    for given in ((), ("old_logprob",), ("old_logprob", "rollout_weight"), ("rollout_weight",)):
        inputs = {name: torch.randn(400, generator=g, dtype=torch.float64) for name in INPUTS}
        inputs["old_logprob"][:20] = -1000.0
        inputs["ref_logprob"][20:40] = 900.0
        inputs["advantages"][40:60] = 0.0
        inputs["token_weight"] = inputs["token_weight"].abs()
        names = {*given, *(["ref_logprob"] if kl else [])}
        objective = PolicyObjective(kind, ratio_cap=1.3, clip_low=0.3, clip_high=0.4, kl=kl, kl_coef=0.7)
        program = coefficient_program(objective, frozenset(names))
        kept = {n: x for n, x in inputs.items() if n in {*names, "logprob", "token_weight", "advantages"}}
        want = policy_terms(objective=objective, **kept).coefficient
        assert torch.equal(interpret(program, inputs), want)
        assert want.abs().max() > 0.1
        assert len(program) <= 40


def test_the_kernel_clips_beyond_the_boundary_and_not_on_it():
    # uniform rows: every log-prob is -log 4, so that the ratio is what old_logprob says
    advantages = torch.tensor([1.0, 1.0, -1.0, 0.0, 1e4, -1e4])
    count, old = len(advantages), torch.tensor([-1000.0, -2.0, -1.0, -2.0, -2.0, -1.0])
    case = {
        "logits": torch.zeros(count, 4), "ref": None, "labels": torch.zeros(count, dtype=torch.int64), "at": torch.arange(count),
        "temperature": torch.ones(count), "softcap": None,
        "inputs": {"token_weight": torch.ones(count), "advantages": advantages, "old_logprob": old},
    }  # fmt: skip
    reinforce, _ = run(case, PolicyObjective("reinforce"))
    rho = (reinforce.logprob - old).exp()  # [huge, e^2 / 4, e / 4, ...]: 1.847 and 0.680
    free = -rho * advantages
    low, high = float(rho[2]), float(rho[1])
    for inside, clip_low, clip_high in ((True, 1 - low, high - 1), (False, 1 - low - 1e-5, high - 1 - 1e-5)):
        got, d = run(case, PolicyObjective("ppo", clip_low=clip_low, clip_high=clip_high))
        assert torch.isfinite(d).all()
        assert got.coefficient[0] == 0
        assert got.coefficient[3] == 0
        assert (d[3] == 0).all()
        for m in (1, 2, 4, 5):
            torch.testing.assert_close(
                got.coefficient[m], free[m] if inside else free[m] * 0, rtol=1e-6, atol=0
            )
        got, _ = run(case, PolicyObjective("cispo", ratio_cap=clip_high + 1))
        torch.testing.assert_close(
            got.coefficient, -rho.clamp(max=clip_high + 1) * advantages, rtol=1e-6, atol=0
        )


def test_the_kernel_holds_log_ratios_beyond_twenty_and_not_at_twenty():
    case = {
        "logits": torch.zeros(2, 1), "ref": None, "labels": torch.zeros(2, dtype=torch.int64), "at": torch.arange(2),
        "temperature": torch.ones(2), "softcap": None,
        "inputs": {"token_weight": torch.ones(2), "advantages": -torch.ones(2), "old_logprob": torch.tensor([-20.0, -20.00001])},
    }  # fmt: skip
    got, _ = run(case, PolicyObjective("ppo"))
    torch.testing.assert_close(got.coefficient, torch.tensor([20.0, -torch.inf]).exp(), rtol=1e-6, atol=0)


def test_an_objective_that_the_kernels_cannot_run_is_an_error():
    with pytest.raises(
        RuntimeError, match=r"label_terms uses .*sin.*, which the kernels' programs do not have"
    ):
        compile_program(lambda logprob, **_: torch.sin(logprob), frozenset())

    def long(logprob, advantages, **_):
        for i in range(80):
            logprob = logprob * advantages + i
        return logprob

    with pytest.raises(RuntimeError, match=r"takes 2\d\d operations per label; the kernels run 64"):
        compile_program(long, frozenset())
