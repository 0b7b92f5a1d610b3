"""Objectives at their edges, by ratios set by hand: caps and clips by the sign of the advantage, sequences, empty responses, what is refused."""

import dataclasses

import pytest
import torch

from fst_kernels import PolicyObjective, linear_logprob, linear_policy_loss, policy_loss
from tests.kernels.test_linear_policy_loss import H, N, V, gradients, leaves, make_case


def on_ratios(ratios, advantages, objective, **change):
    """Uniform rows: the log-prob of every label is -log V, so that the ratio of label i is ratios[i]. Gradient by the log-prob, stats."""
    n, y = len(ratios), torch.zeros(len(ratios), dtype=torch.int64)
    hidden, weight = (
        torch.zeros(n, H, dtype=torch.float64, requires_grad=True),
        torch.randn(V, H, dtype=torch.float64),
    )
    out = linear_logprob(hidden, weight, y)
    old = out.logprob.detach() - torch.tensor(ratios, dtype=torch.float64).log()
    loss, stats = policy_loss(
        out, y, torch.tensor(advantages, dtype=torch.float64), objective=objective, token_weight=torch.ones(n), old_logprob=old,
        **change,
    )  # fmt: skip
    if objective.kind != "gspo":
        _, fused = linear_policy_loss(
            hidden, weight, y, torch.tensor(advantages, dtype=torch.float64), objective=objective, token_weight=torch.ones(n),
            old_logprob=old,
        )  # fmt: skip
        assert torch.equal(fused.sums[5:], stats.sums[5:])
    return torch.autograd.grad(loss, out.logprob)[0], stats


def test_a_cap_below_one_scales_what_is_near_the_old_policy_and_leaves_what_is_below_it():
    """The peers' settings 0.2 taken as an absolute cap: on-policy labels keep a fifth of their weight."""
    slope, stats = on_ratios(
        [1.0, 1.0, 0.1, 3.0], [1.0, -2.0, 1.0, 1.0], PolicyObjective("cispo", ratio_cap=0.2)
    )
    torch.testing.assert_close(slope, torch.tensor([-0.2, 0.4, -0.1, -0.2], dtype=torch.float64))
    assert stats.clipped_fraction == 0.75
    assert stats.clipped_high_fraction == 0.5  # that of negative advantage left out
    for kind in ("cispo", "grpo"):
        uncapped, _ = on_ratios([9.0], [-1.0], PolicyObjective(kind, ratio_cap=float("inf"), clip_high=1e6))
        torch.testing.assert_close(uncapped, torch.tensor([9.0], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["ppo", "grpo", "dapo"])
def test_clips_from_below_and_above_are_counted_by_the_sign_of_the_advantage(kind):
    ratios = [0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 2.0, 0.5, 2.0, 1.1]
    advantages = [1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 3.0, 0.0, 0.0, 1.0]
    slope, stats = on_ratios(ratios, advantages, PolicyObjective(kind, clip_low=0.2, clip_high=0.3))
    assert stats.clipped_low_fraction == 0.1  # below with A < 0: the second
    assert stats.clipped_high_fraction == 0.2  # above with A > 0: the fifth and the seventh
    assert stats.clipped_region_fraction == pytest.approx(0.3)
    assert stats.clipped_fraction == pytest.approx(0.3)
    assert (slope == 0).tolist() == [False, True, False, False, True, False, True, True, True, False]


def test_cispo_has_no_lower_bound_and_counts_all_it_caps_apart_from_those_it_caps_upwards():
    _, stats = on_ratios(
        [5.0, 5.0, 0.01, 1.0, 6.0], [1.0, -1.0, -1.0, 1.0, 0.0], PolicyObjective("cispo", ratio_cap=4.0)
    )
    assert stats.clipped_fraction == pytest.approx(0.6)
    assert stats.clipped_low_fraction == 0
    assert stats.clipped_high_fraction == pytest.approx(0.2)
    assert stats.clipped_region_fraction == pytest.approx(0.2)


def test_gspo_counts_the_labels_of_clipped_sequences():
    """Geometric means: 2, 1 and 0.5; the labels' own ratios do not matter."""
    ratios, sequence = [4.0, 1.0, 3.0, 1 / 3, 0.5, 0.5], torch.tensor([7, 7, 3, 3, 9, 9])
    for sign, low, high in ((1.0, 0, 2), (-1.0, 2, 0)):
        _, stats = on_ratios(ratios, [sign] * 6, PolicyObjective("gspo"), sequence=sequence)
        assert stats.clipped_low_fraction == pytest.approx(low / 6)
        assert stats.clipped_high_fraction == pytest.approx(high / 6)


@pytest.mark.parametrize("kl_ratio", ["token", "sequence"])
def test_the_kl_of_gspo_takes_the_ratio_it_is_told_to_take(kl_ratio):
    """Ratios 4 and 1 in one sequence, so s = 2; a reference that finds every label e times as probable: k3 = e - 2 = 0.718."""
    ratios, k3 = [4.0, 1.0], torch.e - 2
    objective = PolicyObjective("gspo", kl="k3", kl_coef=1.0, kl_unbiased=True, kl_ratio=kl_ratio)
    ref = torch.full((2,), -torch.tensor(float(V)).log().item() + 1, dtype=torch.float64)
    slope, stats = on_ratios(
        ratios, [0.0, 0.0], objective, sequence=torch.zeros(2, dtype=torch.int64), ref_logprob=ref
    )
    # By hand, (rho k3)' = rho (k3 - (e - 1)) = -rho for the label's own; with s: 2 (1 - e) + (2 k3 + 2 k3) / 2 for either.
    weights, want = ([4.0, 1.0], [-4.0, -1.0]) if kl_ratio == "token" else ([2.0, 2.0], [-2.0, -2.0])
    torch.testing.assert_close(stats.kl, torch.tensor(sum(weights) / 2 * k3, dtype=torch.float64))
    torch.testing.assert_close(slope, torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["cispo", "grpo", "gspo"])
def test_an_empty_response_weighs_nothing_and_divides_nothing_by_zero(kind):
    """Sequence 1 has no label that counts; with and without it loss, gradient and statistics are the same."""
    case, objective = (
        make_case(multi=False, softcap=None),
        PolicyObjective(kind, kl="k3", kl_coef=0.1, entropy_coef=0.01),
    )
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    ended = case["labels"].clone()
    ended[sequence == 1] = -100
    found = []
    for keep in (torch.ones(N, dtype=torch.bool), sequence != 1):
        inputs = leaves(case)
        out = linear_logprob(
            *inputs[:2], ended, bias=inputs[2], temperature=case["temperature"], ref_hidden=case["ref_hidden"]
        )
        given_ = {"rows": torch.arange(N)[keep], "labels": ended[keep], "sequence": sequence[keep]}
        given_ |= {name: case[name][keep] for name in ("advantages", "token_weight")}
        picked = out._replace(logprob=out.logprob[keep], ref_logprob=out.ref_logprob[keep])
        loss, stats = policy_loss(picked, objective=objective, old_logprob=case["old"][keep], **given_)
        found.append([loss.detach(), stats.sums, *gradients(loss, inputs)])
    assert all(torch.isfinite(x).all() for x in found[0])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert found[0][2].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio_cap": 0.0}, "ratio_cap=0.0; allowed: > 0, an absolute cap"),
        ({"ratio_cap": -1.0}, "ratio_cap=-1.0; allowed: > 0"),
        ({"ratio_cap": float("nan")}, "ratio_cap=nan"),
        ({"kl_unbiased": True}, "kl_unbiased=True with kl=None; allowed: kl='k3'"),
        (
            {"kind": "gspo", "kl": "k3", "kl_unbiased": True},
            "kl_unbiased=True with kind='gspo' needs kl_ratio: 'token', .* or 'sequence', as in TRL and Liger",
        ),
        ({"kl_ratio": "sequence"}, "kl_ratio='sequence' with kind='cispo'; allowed: None or 'token'"),
        ({"kl_ratio": "batch"}, "kl_ratio='batch'; allowed: None, 'token', 'sequence'"),
        ({"kind": "trpo"}, "kind='trpo'; allowed: 'cispo'"),
        ({"kl": "k1"}, "kl='k1'; allowed: None, 'k3'"),
        ({"clip_low": 1.0}, "clip_low=1.0"),
        ({"clip_high": -0.1}, "clip_high=-0.1"),
        ({"kl_coef": -1.0}, "kl_coef=-1.0"),
        ({"entropy_coef": float("inf")}, "entropy_coef=inf"),
    ],
)
def test_impossible_objectives_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PolicyObjective(), **change)
