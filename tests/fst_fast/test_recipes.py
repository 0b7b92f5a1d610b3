"""The recipe knobs of the slow phase (docs/recipes.md): each against a plain computation of its own or TRL's, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from fst_fast.config import Config
from fst_fast.config.derived import derived
from fst_fast.config.load import check
from fst_fast.contracts import Context, Problem, Rollout, ScoredRollout, Turn, Verdict
from fst_fast.data.stream import minibatch, spare_problems
from fst_fast.errors import UserError
from fst_fast.policy import head, trained
from fst_fast.policy.scoring import Batching
from fst_fast.policy.sequence_loss import Mismatch
from fst_fast.rollout.lengths import ResponseLengths
from fst_fast.rollout.reuse import ReusePool
from fst_fast.slow.groups import advantages, make_groups, without_overlong
from fst_fast.slow.rewards import load_shaping, training_rewards
from fst_fast.slow.slow_phase import constant_denominator, objective_of, sample_groups
from fst_fast.slow.update import Reference, optimise, sequences
from tests.fst_fast import test_update
from tests.fst_fast.test_update import rollouts

models = test_update.models  # a fixture
LONGEST = 8  # of config_of


class Engine:
    """What `optimise` needs of TrainedPolicy, without DeepSpeed, which test_update.py and test_layouts.py have."""

    def __init__(self, config: Config) -> None:
        self.module = trained.load(config).requires_grad_(True)

    def lr(self, step: int) -> float:
        return 0.0

    def forward_backward(self, jobs: Sequence[Any]) -> None:
        for inputs, job in jobs:
            with head.running(self.module, job):
                self.module(**inputs).logits.backward()

    def step(self, lr: float) -> float:
        return float(
            torch.stack([p.grad.norm() for p in self.module.parameters() if p.grad is not None]).norm()
        )


SLOW = {"lr": 1e-2, "warmup_steps": 0, "max_grad_norm": 0.0, "kl_coef": 0.3}


def config_of(models: tuple[Path, Path], **slow: Any) -> Config:
    return Config.model_validate(
        {**test_update.config_of(models).model_dump(), "method": "rl", "slow": {**SLOW, **slow}}
    )


def take_step(
    config: Config, models: tuple[Path, Path], sampled: Sequence[ScoredRollout], prompts: Any
) -> dict[str, Any]:
    """One step of a new policy, through the parts of slow_step."""
    slow = config.slow
    groups = make_groups(
        sampled,
        slow.advantage_eps,
        scale=slow.advantage_scale,
        rewards=training_rewards(slow, LONGEST, [Problem(p, [], None) for p in prompts]),
    )
    groups = [without_overlong(g) if slow.mask_overlong else g for g in groups]
    kept = [g for g in groups if g.advantages is not None]
    data = sequences(
        kept, [[prompts[g.problem_id]] * len(g.members) for g in kept], slow.aggregation, constant_denominator(config)
    )  # fmt: skip
    reference = Reference(trained.load(config, models[1]))
    return optimise(
        Engine(config), reference, data, objective_of(slow), Batching.of(config, 0), step=0, mismatch=Mismatch.of(slow)
    )  # fmt: skip


class Plain:
    """Log-probs of whole logits, one sequence at a time: each [T], under the policy with gradient, and as sampled."""

    def __init__(self, models: tuple[Path, Path], sampled: Sequence[ScoredRollout], prompts: Any) -> None:
        self.model = Qwen3ForCausalLM.from_pretrained(models[0])
        self.logprob: list[Tensor] = []
        self.sampled = [torch.tensor(s.rollout.logprobs) for s in sampled]
        for s in sampled:
            ids = torch.tensor(np.concatenate([prompts[s.rollout.problem_id], s.rollout.response_ids]))
            t = len(s.rollout.response_ids)
            logits = self.model(input_ids=ids[None]).logits[0, -t - 1 : -1]
            self.logprob.append(logits.log_softmax(-1).gather(1, ids[-t:, None])[:, 0])

    def grad_norm(self, loss: Tensor) -> float:
        loss.backward()
        return float(
            torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm()
        )


def centred(sampled: Sequence[ScoredRollout], *, std: bool) -> list[float]:
    """Advantages over groups of four."""
    r = np.array([s.verdict.reward for s in sampled], float).reshape(-1, 4)
    a = r - r.mean(1, keepdims=True)
    return (a / (r.std(1, keepdims=True) + 1e-6) if std else a).ravel().tolist()


def clipped(ratio: Tensor, a: float, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def test_gspo_has_the_loss_gradient_and_clip_fractions_of_sequences(models: tuple[Path, Path]) -> None:
    config = config_of(models, objective="gspo", kl="none", clip_low=0.4, clip_high=0.7)
    assert config.slow.aggregation == "sequence"
    sampled, prompts = rollouts()
    plain, a = Plain(models, sampled, prompts), centred(sampled, std=True)
    ratios = [(new - old).mean().exp() for new, old in zip(plain.logprob, plain.sampled, strict=True)]
    terms = torch.stack([clipped(s, x, 0.4, 0.7) for s, x in zip(ratios, a, strict=True)])
    loss, size = terms.mean(), terms.detach().abs().mean().item()  # the terms cancel to a 500th of their size
    got = take_step(config, models, sampled, prompts)
    assert got["loss"] == pytest.approx(loss.item(), abs=1e-6 * size)
    assert got["grad_norm"] == pytest.approx(plain.grad_norm(loss), rel=1e-5)
    low = np.mean([s.item() < 0.6 and x < 0 for s, x in zip(ratios, a, strict=True)])
    high = np.mean([s.item() > 1.7 and x > 0 for s, x in zip(ratios, a, strict=True)])
    assert low * high > 0
    fractions = [got[f"clipped{side}_fraction"] for side in ("_low", "_high", "")]
    assert fractions == pytest.approx([low, high, low + high])


@pytest.mark.parametrize("objective", ["dapo", "dr_grpo"])
def test_dapo_and_dr_grpo_have_the_loss_gradient_and_clip_fractions_of_tokens(
    models: tuple[Path, Path], objective: str
) -> None:
    config = config_of(models, objective=objective, kl="none", problems_per_step=3, group_size=4)
    dapo = objective == "dapo"
    high = 0.28 if dapo else 0.2
    sampled, prompts = rollouts()
    plain, a = Plain(models, sampled, prompts), centred(sampled, std=dapo)
    ratios = [(new - old).exp() for new, old in zip(plain.logprob, plain.sampled, strict=True)]
    losses = torch.cat([clipped(r, x, 0.2, high) for r, x in zip(ratios, a, strict=True)])
    loss = losses.mean() if dapo else losses.sum() / (3 * 4 * LONGEST)
    got = take_step(config, models, sampled, prompts)
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert got["grad_norm"] == pytest.approx(plain.grad_norm(loss), rel=1e-5)
    below = np.concatenate([((r < 0.8) & (x < 0)).numpy() for r, x in zip(ratios, a, strict=True)]).mean()
    above = np.concatenate(
        [((r > 1 + high) & (x > 0)).numpy() for r, x in zip(ratios, a, strict=True)]
    ).mean()
    assert below * above > 0
    assert got["clipped_low_fraction"] == pytest.approx(below)
    assert got["clipped_high_fraction"] == pytest.approx(above)


def weights_by_hand(plain: Plain, kind: str, level: str, cap: float) -> tuple[list[Tensor], float]:
    """The weights of every sequence's tokens, and the share of tokens or sequences where they were cut."""
    found, cut = [], []
    for new, old in zip(plain.logprob, plain.sampled, strict=True):
        log = (new - old).detach()
        ratio = (log if level == "token" else log.sum().expand(len(log))).exp()
        over = ratio > cap
        found.append(torch.where(over, cap if kind == "tis" else 0.0, ratio))
        cut += over.tolist() if level == "token" else [bool(over[0])]
    return found, float(np.mean(cut))


@pytest.mark.parametrize("tokens", [8192, 16], ids=["whole", "cut into micro-batches"])
@pytest.mark.parametrize(("kind", "level"), list(itertools.product(("tis", "mis"), ("token", "sequence"))))
def test_importance_weights_are_cut_or_masked_by_token_or_sequence(
    models: tuple[Path, Path], kind: str, level: str, tokens: int
) -> None:
    how = {"mismatch": kind, "mismatch_level": level, "mismatch_cap": 1.5}
    config = config_of(
        models, objective="grpo", kl="none", aggregation="token", tokens_per_micro_batch=tokens, **how
    )
    sampled, prompts = rollouts()
    plain, a = Plain(models, sampled, prompts), centred(sampled, std=True)
    weights, cut = weights_by_hand(plain, kind, level, 1.5)
    terms = [-w * x * (p - p.detach()).exp() for w, x, p in zip(weights, a, plain.logprob, strict=True)]
    loss = torch.cat(terms).mean()
    got = take_step(config, models, sampled, prompts)
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert got["grad_norm"] == pytest.approx(plain.grad_norm(loss), rel=1e-5)
    assert 0 < got["mismatch_cut"] == pytest.approx(cut)
    assert got["mismatch_weight"] == pytest.approx(torch.cat(weights).mean().item(), rel=1e-5)
    d = torch.cat(plain.logprob).detach() - torch.cat(plain.sampled)
    assert got["mismatch_kl"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-5), (
        "as without weights"
    )
    assert got["ratio_mean"] == pytest.approx(d.exp().mean().item(), rel=1e-5)


def test_numbers_of_knobs_that_are_off_are_null(models: tuple[Path, Path]) -> None:
    sampled, prompts = rollouts()

    def numbers(objective: str) -> dict[str, Any]:
        return take_step(config_of(models, objective=objective), models, sampled, prompts)

    cispo, reinforce = numbers("cispo"), numbers("reinforce")
    assert cispo["clipped_low_fraction"] is None, "it has no lower bound"
    assert cispo["clipped_high_fraction"] is not None
    for name in ("clipped_fraction", "clipped_low_fraction", "clipped_high_fraction"):
        assert reinforce[name] is None
    assert {cispo["mismatch_weight"], cispo["mismatch_cut"]} == {None}


@pytest.mark.parametrize("objective", ["gspo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("mismatch", ["none", "tis"])
def test_the_loss_is_trls(models: tuple[Path, Path], objective: str, mismatch: str) -> None:
    """GRPOTrainer._compute_loss of the installed TRL, on the same sequences, padded."""
    trl = pytest.importorskip("trl")
    if not trl.__version__.startswith("1.16."):
        pytest.skip("written for TRL 1.16")
    config = config_of(
        models, objective=objective, clip_low=0.3, clip_high=0.5, kl_coef=0.1, mismatch=mismatch, problems_per_step=2, group_size=4
    )  # fmt: skip
    sampled, prompts = rollouts()
    plain = Plain(models, sampled, prompts)
    pad = torch.nn.utils.rnn.pad_sequence
    new, old = (pad(x, batch_first=True) for x in (plain.logprob, plain.sampled))
    mask = pad([torch.ones(len(x)) for x in plain.logprob], batch_first=True)
    reference = pad(Plain((models[1], models[1]), sampled, prompts).logprob, batch_first=True).detach()
    loss_type = "grpo" if objective == "gspo" else objective
    ours = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    same = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None), args=ours, beta=0.1,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, loss_type=loss_type,
        importance_sampling_level="sequence" if objective == "gspo" else "token", epsilon_low=0.3, epsilon_high=0.5,
        use_vllm=mismatch != "none", vllm_importance_sampling_correction=True, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST, _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": {name: [] for name in ("kl", "entropy", *(f"clip_ratio/{n}" for n in CLIPS))}},
    )  # fmt: skip
    empty = torch.zeros(len(new), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": mask.long(), "completion_mask": mask.long(),
        "advantages": torch.tensor(centred(sampled, std=objective != "dr_grpo")), "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(), "old_per_token_logps": old if mismatch == "none" else new.detach(),
        "importance_sampling_ratio": ((new.detach() - old) * mask).exp().clamp(max=2.0),
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(same, plain.model, inputs)
    got = take_step(config, models, sampled, prompts)
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert got["grad_norm"] == pytest.approx(plain.grad_norm(loss), rel=1e-5)
    [low], [high] = (same._metrics["train"][f"clip_ratio/{side}_mean"] for side in ("low", "high"))
    assert (low > 0) == (mismatch == "none")
    assert (got["clipped_low_fraction"], got["clipped_high_fraction"]) == pytest.approx((low, high))


CLIPS = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")


# ------------------------------------------------------------------------------------------------------------------- rewards


def scored(
    tokens: int, reward: float | None = 1.0, finish: Any = "stop", problem: str = "p"
) -> ScoredRollout:
    rollout = Rollout(
        problem, "c", 0, np.zeros(tokens, np.int64), np.zeros(tokens, np.float32), finish, 0, 1.0
    )
    return ScoredRollout(rollout, Verdict(reward), "")


PROBLEMS = [Problem("p", [{"role": "user", "content": "?"}], None)]


def rewards_of(members: Sequence[ScoredRollout], longest: int = 20, **slow: Any) -> list[float]:
    make = training_rewards(Config.model_validate({"slow": slow}).slow, longest, PROBLEMS)
    assert make is not None
    return make(members)


def test_the_overlong_penalty_is_trls() -> None:
    trl = pytest.importorskip("trl.rewards")
    lengths = list(range(21))
    expected = trl.get_soft_overlong_punishment(20, 6)([[0] * n for n in lengths])
    got = rewards_of([scored(n, 0.0) for n in lengths], overlong_buffer=6)
    assert got == pytest.approx(expected)
    assert got[20] == -1
    half = rewards_of([scored(n, 1.0) for n in lengths], overlong_buffer=6, overlong_penalty=0.5)
    assert half == pytest.approx([1 + 0.5 * x for x in expected])


def test_of_an_episode_the_longest_response_counts_for_the_penalty() -> None:
    turns = tuple(Turn(0, np.zeros(2, np.int64), n) for n in (9, 17, 4))
    episode = scored(30, 1.0)
    object.__setattr__(episode.rollout, "turns", turns)
    assert rewards_of([episode, scored(17)], overlong_buffer=6) == pytest.approx([0.5, 0.5])


def test_rewards_are_shaped_then_penalised_then_clipped(tmp_path: Path) -> None:
    (tmp_path / "shape.py").write_text(
        "def shape(problem, rollouts):\n"
        "    best = min(len(r.rollout.response_ids) for r in rollouts)\n"
        "    return [3 * r.verdict.reward - (len(r.rollout.response_ids) - best) / 10 for r in rollouts]\n"
    )
    members = [scored(10), scored(20, 0.0), scored(18, 0.5)]
    spec = f"{tmp_path}/shape.py:shape"
    shaped = rewards_of(members, reward_shaping=spec)
    assert shaped == pytest.approx([3, -1, 1.5 - 0.8])
    both = rewards_of(members, reward_shaping=spec, overlong_buffer=4, reward_clip=[-1.5, 2.5])
    assert both == pytest.approx([2.5, -1.5, 0.7 - 0.5])
    assert training_rewards(Config().slow, 20, PROBLEMS) is None
    [group] = make_groups(members, 0.0, rewards=lambda m: rewards_of(m, reward_shaping=spec))
    np.testing.assert_allclose(
        group.advantages, (np.array(shaped) - np.mean(shaped)) / np.std(shaped), rtol=1e-6
    )
    assert group.rewards == shaped
    assert [m.verdict.reward for m in group.members] == [1.0, 0.0, 0.5], "metrics keep the verdicts'"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("return [1.0]", "1 rewards for 2 rollouts; allowed: one for each"),
        ("return [1.0, float('nan')]", "the reward 'nan'; allowed: a finite number"),
        ("return [1.0, 'x']", "the reward 'x'; allowed: a finite number"),
        ("return 1.0", "the function failed: TypeError"),
        ("raise KeyError(problem.id)", "the function failed: KeyError: 'p' (shape.py:2)"),
    ],
)
def test_a_shaping_function_that_fails_is_one_sentence(body: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "shape.py").write_text(f"def shape(problem, rollouts):\n    {body}\n")
    with pytest.raises(UserError) as error:
        rewards_of([scored(3), scored(4)], reward_shaping=f"{tmp_path}/shape.py:shape")
    assert f"slow.reward_shaping={tmp_path}/shape.py:shape, problem p: " in str(error.value)
    assert sentence in str(error.value)


def test_a_shaping_function_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "shape.py").write_text("number = 3\n")
    for name, sentence in (("number", "is no function"), ("none", "has no 'none'")):
        with pytest.raises(UserError, match=sentence):
            load_shaping(f"{tmp_path}/shape.py:{name}")


def test_advantages_without_the_deviation_are_the_distance_from_the_mean() -> None:
    assert advantages([1.0, 0.0, 0.0, 0.0], 1e-6, "none") == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages([0.5, 0.5], 1e-6, "none") is None


def test_overlong_rollouts_count_for_the_mean_and_have_no_loss(models: tuple[Path, Path]) -> None:
    members = [scored(3, 1.0), scored(8, 0.0, "length"), scored(4, 0.5), scored(8, 0.0, "max_tokens")]
    [group] = make_groups(members, 0.0)
    kept = without_overlong(group)
    r = np.array([1, 0, 0.5, 0])
    assert [m.rollout.finish for m in kept.members] == ["stop", "stop"]
    np.testing.assert_allclose(kept.advantages, ((r - r.mean()) / r.std())[[0, 2]], rtol=1e-6)
    [all_cut] = make_groups([scored(8, x, "length") for x in (0.0, 1.0)], 0.0)
    assert without_overlong(all_cut).advantages is None, "the group is dropped"

    sampled, prompts = rollouts()
    long = [0, 5]
    for i in long:
        object.__setattr__(sampled[i].rollout, "finish", "length")
    config = config_of(models, objective="reinforce", kl="none", aggregation="token", mask_overlong=True)
    plain, a = Plain(models, sampled, prompts), centred(sampled, std=True)
    terms = [-x * p for i, (x, p) in enumerate(zip(a, plain.logprob, strict=True)) if i not in long]
    loss = torch.cat(terms).mean()
    got = take_step(config, models, sampled, prompts)
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert got["grad_norm"] == pytest.approx(plain.grad_norm(loss), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------- dynamic sampling


def refill(rounds: int, varied: set[str], claimable: Sequence[str] = ()) -> tuple[Any, list[str], ReusePool]:
    """Two problems a step out of ten; the groups of `varied` have variance. The step's groups, the problems in the order in which they were
    sampled, and what is left of the rollouts to reuse."""
    context = Context.of("c")
    problems = [Problem(f"p{i}", [], None) for i in range(10)]
    asked: list[str] = []

    def local(_: Any, requests: Sequence[Any], **how: Any) -> list[ScoredRollout]:
        asked.extend(dict.fromkeys(problem.id for _, problem, _ in requests))
        return [scored(2, float(k == 0 and p.id in varied), problem=p.id) for _, p, k in requests]

    pool = ReusePool([scored(2, 0.0, problem=p) for p in claimable])
    for s in pool.rollouts:
        object.__setattr__(s.rollout, "context_id", context.id)
    slow = {"problems_per_step": 2, "group_size": 4, "dynamic_sampling": rounds}
    config = Config.model_validate({"method": "rl", "slow": slow})
    batch = problems[:2]
    sampler = SimpleNamespace(
        local=local, lengths=ResponseLengths(), expected_tokens=lambda problems: [1] * len(problems)
    )
    found = sample_groups(
        batch, [context], config=config, step=5, policy_version=5, sampler=sampler, models=SimpleNamespace(trained=None),
        reusable=pool, spare=spare_problems(problems, 5, batch, 0),
    )  # type: ignore[arg-type] # fmt: skip
    return found, asked, pool


SPARES = [p.id for p in spare_problems([Problem(f"p{i}", [], None) for i in range(10)], 5, [Problem(f"p{i}", [], None) for i in range(2)], 0)]  # fmt: skip


def test_groups_without_variance_are_replaced_until_the_step_is_full() -> None:
    found, asked, _ = refill(5, {"p0", SPARES[2]})
    assert asked == ["p0", "p1", *SPARES[:3]], "one is missing, so each round takes one"
    assert [g.problem_id for g in found.groups if g.advantages is not None] == ["p0", SPARES[2]]
    assert (found.refill_rounds, found.refill_groups, len(found.groups)) == (3, 3, 5)
    assert len(found.rollouts) == 5 * 4
    found, asked, _ = refill(5, {SPARES[0], SPARES[1]})
    assert asked == ["p0", "p1", *SPARES[:2]], "two are missing: one round of two"
    assert found.refill_rounds == 1


def test_refilling_ends_at_its_bound_and_where_no_problem_is_left() -> None:
    found, asked, _ = refill(2, set())
    assert asked == ["p0", "p1", *SPARES[:4]]
    assert (found.refill_rounds, found.refill_groups) == (2, 4)
    found, asked, _ = refill(100, set())
    assert len(asked) == 10
    assert found.refill_rounds == 4
    found, asked, _ = refill(0, set())
    assert (asked, found.refill_rounds) == (["p0", "p1"], 0)


def test_refilled_groups_leave_the_rollouts_of_other_steps_to_them() -> None:
    found, _, pool = refill(1, set(), claimable=["p0", SPARES[0]])
    assert (found.reused, found.reused_tokens) == (1, 2)
    assert [s.rollout.problem_id for s in pool.rollouts] == [SPARES[0]]


def test_spare_problems_are_the_others_in_an_order_of_the_step() -> None:
    problems = [Problem(f"p{i}", [], None) for i in range(50)]
    orders = []
    for step in range(3):
        batch = minibatch(problems, step, 5, 1)
        spare = [p.id for p in spare_problems(problems, step, batch, 1)]
        assert sorted(spare) == sorted({p.id for p in problems} - {p.id for p in batch})
        assert spare == [p.id for p in spare_problems(problems, step, batch, 1)]
        orders.append(spare[:10])
    assert orders[0] != orders[1] != orders[2]


def test_the_budget_of_dynamic_sampling_is_stated() -> None:
    slow = {"problems_per_step": 2, "group_size": 4, "dynamic_sampling": 3, "steps": 10}
    numbers = derived(Config.model_validate({"slow": slow, "fast": {"anchor_size": 4}}))
    assert numbers["rollouts per step"] == 8
    assert numbers["rollouts per step, with dynamic sampling at most"] == 32
    assert numbers["slow rollouts, whole run, with dynamic sampling at most"] == 320


# ------------------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"slow": {"lr_min_ratio": 0.1}}, "slow.lr_min_ratio=0.1 has no effect with slow.lr_schedule=constant"),
        ({"slow": {"lr_schedule": "cosine", "steps": 5}}, "has no step to fall in: slow.warmup_steps=10 of slow.steps=5"),
        ({"slow": {"reference": {"every": 3}, "kl": "none"}}, "slow.reference.every=3 has no effect without a KL penalty"),
        ({"slow": {"reference": {"every": 3}, "kl_coef": 0.0}}, "slow.reference.every=3 has no effect without a KL penalty"),
        ({"slow": {"reference": "last"}}, 'slow.reference="last" is refused'),
        ({"slow": {"mask_overlong": True, "overlong_buffer": 4}}, "slow.mask_overlong=true leaves out the rollouts that"),
        ({"slow": {"reward_clip": [1.0, 0.0]}}, "slow.reward_clip=[1.0, 0.0]: the first must be below the second"),
        ({"slow": {"reward_clip": 1.0}}, "slow.reward_clip=1.0 is refused; allowed: a list of 2 numbers or null"),
        ({"slow": {"overlong_buffer": 65}}, "slow.overlong_buffer=65 is longer than a response, rollout.max_response_tokens=64"),
        ({"policy": {"offload_parameters": True, "zero_stage": 2}}, "policy.offload_parameters=true needs policy.zero_stage=3, which is 2"),
        ({"policy": {"optimizer": "cpu_adam"}}, "policy.optimizer=cpu_adam needs policy.offload_optimizer=true"),
        ({"policy": {"optimizer": "fused_adam", "zero_stage": 1, "offload_optimizer": True}}, "policy.optimizer=fused_adam does not go with"),
        ({"policy": {"deepspeed": {"zero_optimization": {"offload_param": {"pin_memory": True}}}}},
         "policy.deepspeed.zero_optimization.offload_param has no effect without policy.offload_parameters=true"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_together_are_one_sentence(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        check(tree)
    assert sentence in str(error.value)


def test_an_objective_sets_the_keys_of_its_paper_where_they_are_not_given() -> None:
    def slow(**given: Any) -> Any:
        return check({"slow": given}).slow

    dapo, dr_grpo, gspo = (slow(objective=name) for name in ("dapo", "dr_grpo", "gspo"))
    assert (dapo.clip_low, dapo.clip_high, dapo.aggregation, dapo.advantage_scale) == (
        0.2,
        0.28,
        "token",
        "std",
    )
    assert (dr_grpo.clip_high, dr_grpo.aggregation, dr_grpo.advantage_scale) == (0.2, "constant", "none")
    assert (gspo.clip_low, gspo.clip_high, gspo.aggregation) == (3e-4, 4e-4, "sequence")
    own = slow(objective="dapo", clip_high=0.2, aggregation="problem")
    assert (own.clip_high, own.aggregation) == (0.2, "problem")
    assert (slow().aggregation, slow(objective="grpo").clip_high) == ("problem", 0.2)
    assert slow(reference="base") == slow()
