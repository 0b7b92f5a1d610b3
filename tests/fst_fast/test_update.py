"""One optimiser step against a plain computation of the same loss on whole logits, and what must not move the weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Rollout, ScoredRollout, Verdict
from fst_fast.policy import trained
from fst_fast.policy.scoring import Batching
from fst_fast.policy.trained import NonFiniteError, TrainedPolicy
from fst_fast.slow.groups import make_groups
from fst_fast.slow.slow_phase import objective_of
from fst_fast.slow.update import MEANS, Reference, Sequences, micro_jobs, optimise, sequences

VOCABULARY = 50


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two small models of one shape: the policy and its reference."""
    distributed.init()
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        shape = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
        config = Qwen3Config(vocab_size=VOCABULARY, intermediate_size=48, tie_word_embeddings=True, **shape)
        model = Qwen3ForCausalLM(config)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() > 1 else 1)  # far from uniform, so that every term of the loss matters
        folders.append(tmp_path_factory.mktemp(f"model{seed}"))
        model.save_pretrained(folders[-1])
    return folders[0], folders[1]


def rollouts(seed: int = 0) -> tuple[list[ScoredRollout], dict[str, np.ndarray[Any, Any]]]:
    """Two problems with four rollouts each, off policy, and the problems' prompts."""
    rng = np.random.default_rng(seed)
    prompts = {p: rng.integers(0, VOCABULARY, 7) for p in ("p", "q")}
    out = []
    for problem in prompts:
        for j, reward in enumerate([1.0, 0.0, 0.5, 0.0]):
            n = int(rng.integers(2, 6))
            behaviour = (-np.log(VOCABULARY) + rng.normal(size=n)).astype(np.float32)
            rollout = Rollout(problem, "c", j, rng.integers(0, VOCABULARY, n), behaviour, "stop", 0, 1.0)
            out.append(ScoredRollout(rollout, Verdict(reward), ""))
    return out, prompts


def data(config: Config, sampled: list[ScoredRollout], prompts: dict[str, np.ndarray[Any, Any]]) -> Sequences:
    groups = [g for g in make_groups(sampled, config.slow.advantage_eps) if g.advantages is not None]
    per_group = [[prompts[m.rollout.problem_id] for m in g.members] for g in groups]
    return sequences(groups, per_group, config.slow.aggregation)


def take_step(
    config: Config, policy: TrainedPolicy, reference: nn.Module, batch: Sequences
) -> dict[str, Any]:
    return optimise(
        policy, Reference(reference), batch, objective_of(config.slow), Batching.of(config, 0), step=0
    )


def config_of(models: tuple[Path, Path], **slow: Any) -> Config:
    settings = {"lr": 1e-2, "warmup_steps": 0, "max_grad_norm": 0.0, "kl_coef": 0.3, **slow}
    lengths = {"max_prompt_tokens": 8, "max_response_tokens": 8}
    return Config.model_validate({"model": {"path": str(models[0])}, "rollout": lengths, "slow": settings})


def plain_loss(
    config: Config, policy: nn.Module, reference: nn.Module, sampled: list[ScoredRollout], prompts: Any
) -> Tensor:
    """The loss of FST.md with whole logits, one sequence at a time, and autograd."""
    slow = config.slow
    per_problem: dict[str, list[Tensor]] = {}
    by_problem: dict[str, list[ScoredRollout]] = {}
    for s in sampled:
        by_problem.setdefault(s.rollout.problem_id, []).append(s)
    for problem, members in by_problem.items():
        r = np.array([m.verdict.reward for m in members])
        for m, a in zip(members, (r - r.mean()) / (r.std() + slow.advantage_eps), strict=True):
            ids = torch.tensor(np.concatenate([prompts[problem], m.rollout.response_ids]))[None]
            t = len(m.rollout.response_ids)
            logp = policy(input_ids=ids).logits[0, -t - 1 : -1].log_softmax(-1)
            with torch.no_grad():
                ref = reference(input_ids=ids).logits[0, -t - 1 : -1].log_softmax(-1)
            at = torch.tensor(m.rollout.response_ids)[:, None]
            label, ref_label = logp.gather(1, at)[:, 0], ref.gather(1, at)[:, 0]
            rho = (label - torch.tensor(m.rollout.logprobs)).exp()
            match slow.objective:
                case "cispo":
                    pg = -rho.clamp(max=slow.ratio_cap).detach() * a * label
                case "reinforce":
                    pg = -a * label
                case _:
                    pg = -torch.minimum(rho * a, rho.clamp(1 - slow.clip_low, 1 + slow.clip_high) * a)
            d = ref_label - label
            kl = {
                "none": torch.zeros(t),
                "k3": d.exp() - d - 1,
                "reverse": (logp.exp() * (logp - ref)).sum(-1),
                "forward": (ref.exp() * (ref - logp)).sum(-1),
            }[slow.kl]
            entropy = -(logp.exp() * logp).sum(-1)
            per_problem.setdefault(problem, []).append(pg + slow.kl_coef * kl - slow.entropy_coef * entropy)
    if slow.aggregation == "token":
        return torch.cat([x for xs in per_problem.values() for x in xs]).mean()
    if slow.aggregation == "sequence":
        return torch.stack([x.mean() for xs in per_problem.values() for x in xs]).mean()
    return torch.stack([torch.cat(xs).mean() for xs in per_problem.values()]).mean()


@pytest.mark.parametrize(
    ("objective", "kl", "aggregation"),
    [
        ("cispo", "k3", "problem"),
        ("ppo", "reverse", "token"),
        ("grpo", "none", "sequence"),
        ("reinforce", "forward", "problem"),
    ],
)
def test_a_step_has_the_loss_and_gradient_of_the_plain_formula(
    models: tuple[Path, Path], objective: str, kl: str, aggregation: str
) -> None:
    config = config_of(
        models, objective=objective, kl=kl, aggregation=aggregation, entropy_coef=0.05, ratio_cap=1.5
    )
    sampled, prompts = rollouts()
    plain = Qwen3ForCausalLM.from_pretrained(models[0])
    expected = plain_loss(config, plain, Qwen3ForCausalLM.from_pretrained(models[1]), sampled, prompts)
    expected.backward()
    norm = float(torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm())
    got = take_step(
        config, TrainedPolicy(config), trained.load(config, models[1]), data(config, sampled, prompts)
    )
    assert norm > 0.1
    assert got["loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert got["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_cutting_a_step_into_micro_batches_changes_nothing(models: tuple[Path, Path]) -> None:
    sampled, prompts = rollouts()
    weights = []
    for budget in (8192, 16):
        config = config_of(models, tokens_per_micro_batch=budget)
        policy = TrainedPolicy(config)
        got = take_step(config, policy, trained.load(config, models[1]), data(config, sampled, prompts))
        weights.append((torch.cat([p.detach().flatten() for p in policy.module.parameters()]), got["loss"]))
    assert weights[0][1] == pytest.approx(weights[1][1], rel=1e-6)
    torch.testing.assert_close(
        weights[0][0], weights[1][0], rtol=0, atol=1e-4
    )  # Adam's first step has size lr = 1e-2


READS = (
    "tolist",
    "item",
    "cpu",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
)  # for which the host waits on a GPU


def waits_of_a_step(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, budget: int, read: Any = None
) -> list[tuple[str, str]]:
    """Where the trainer's own code reads tensors in a step, but for numbers that `_means` has brought to the host. read: of each micro-batch's loss."""
    found: list[tuple[str, str]] = []

    def noting(name: str) -> Any:
        method = getattr(Tensor, name)

        def noted(self: Tensor, *given: Any) -> Any:
            code = sys._getframe(1).f_code
            if "fst_fast/policy" in code.co_filename or "fst_fast/slow" in code.co_filename:
                found.append((code.co_name, name))
            return method(self, *given)

        return noted

    config = config_of(models, tokens_per_micro_batch=budget)
    policy, reference = TrainedPolicy(config), trained.load(config, models[1])
    batch = data(config, *rollouts())
    if read is not None:
        backward = policy.engine.backward
        policy.engine.backward = lambda loss, **how: (read(loss), backward(loss, **how))
    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(Tensor, name, noting(name))
        take_step(config, policy, reference, batch)
    return [(where, how) for where, how in found if where != "_means" or how == "cpu"]


def test_a_step_waits_four_times_however_many_micro_batches_it_has(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the losses, the gradients that are not finite, the norm, and the statistics. What DeepSpeed does inside `step` is not counted."""
    once = [
        ("forward_backward", "tolist"),
        ("forward_backward", "__int__"),
        ("step", "__float__"),
        ("_means", "cpu"),
    ]
    assert waits_of_a_step(models, monkeypatch, 8192) == once
    assert waits_of_a_step(models, monkeypatch, 16) == once
    asks: dict[str, Any] = {}
    exec(compile("def asks(loss): return float(loss.detach())", "fst_fast/policy/planted.py", "exec"), asks)
    assert waits_of_a_step(models, monkeypatch, 16, asks["asks"]) == [("asks", "__float__")] * 5 + once


def gradient(
    config: Config, sampled: list[ScoredRollout], prompts: dict[str, np.ndarray[Any, Any]], reference: Path
) -> tuple[int, dict[str, Tensor]]:
    """How many micro-batches a step took, and the gradient of every parameter."""
    policy = TrainedPolicy(config)
    micros, jobs = micro_jobs(
        data(config, sampled, prompts),
        Reference(trained.load(config, reference)),
        objective_of(config.slow),
        Batching.of(config, 0),
    )
    policy.forward_backward(jobs)
    grads = {name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None}
    assert grads.keys() == dict(policy.module.named_parameters()).keys()
    return len(micros), grads


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept activations", "recomputed activations"])
@pytest.mark.parametrize("kl", ["k3", "reverse"])
def test_the_gradient_of_a_forest_cut_into_micro_batches_is_that_of_the_whole(
    models: tuple[Path, Path], checkpointing: bool, kl: str
) -> None:
    sampled, prompts = rollouts()
    whole, expected = gradient(config_of(models, kl=kl), sampled, prompts, models[1])
    config = config_of(models, kl=kl, tokens_per_micro_batch=16)
    settings = config.policy.model_copy(update={"activation_checkpointing": checkpointing})
    config = config.model_copy(update={"policy": settings})
    parts, grads = gradient(config, sampled, prompts, models[1])
    assert (whole, parts) == (1, 5)
    for name, grad in grads.items():
        assert grad.abs().max() > 1e-3, name
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_process_with_fewer_micro_batches_than_another_runs_fillers_that_weigh_nothing(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(models)
    sampled, prompts = rollouts()

    def run(most: int) -> tuple[int, Tensor, list[float]]:
        """With another process that has `most` micro-batches: how many this one runs, its weights and numbers afterwards."""
        monkeypatch.setattr(distributed, "all_reduce_max", lambda own: max(own, most))
        policy, count = TrainedPolicy(config), []
        forward_backward = policy.forward_backward
        monkeypatch.setattr(
            policy, "forward_backward", lambda jobs: count.append(len(jobs)) or forward_backward(jobs)
        )
        got = take_step(config, policy, trained.load(config, models[1]), data(config, sampled, prompts))
        weights = torch.cat([p.detach().flatten() for p in policy.module.parameters()])
        return count[0], weights, [got["loss"], got["grad_norm"], got["tokens"]]

    (alone, weights, numbers), (beside, same_weights, same_numbers) = run(1), run(3)
    assert (alone, beside) == (1, 3)
    assert torch.equal(weights, same_weights)
    assert numbers == pytest.approx(same_numbers, rel=1e-6)


def test_a_step_without_reward_variance_leaves_the_weights(models: tuple[Path, Path]) -> None:
    config = config_of(models)
    policy = TrainedPolicy(config)
    before = trained.checksum(policy.module)
    sampled, prompts = rollouts()
    same = [ScoredRollout(s.rollout, Verdict(1.0), "") for s in sampled]
    got = take_step(config, policy, trained.load(config, models[1]), data(config, same, prompts))
    assert got["tokens"] == 0
    assert {name: got[name] for name in (*MEANS, "grad_norm")} == dict.fromkeys((*MEANS, "grad_norm")), (
        "nothing was measured"
    )
    assert trained.checksum(policy.module) == before


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "huge"])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    models: tuple[Path, Path], factor: float
) -> None:
    config = config_of(models)
    policy = TrainedPolicy(config)
    reference = trained.load(config, models[1])
    sampled, prompts = rollouts()
    parameter = next(policy.module.parameters())
    parameter.register_hook(lambda grad: grad * factor)
    before = trained.checksum(policy.module)
    parameter.register_hook(policy._record_norm)  # hooks run in order: this one sees what the optimiser would
    with pytest.raises(NonFiniteError, match="non-finite gradients"):
        take_step(config, policy, reference, data(config, sampled, prompts))
    assert trained.checksum(policy.module) == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("reward", r"0 non-finite log-probs of sampled tokens, [1-9]\d* tokens with a non-finite advantage"),
        ("logprob", "1 non-finite log-probs of sampled tokens, 0 tokens"),
        ("weight", r"1 process\(es\) with a non-finite loss"),
    ],
)
def test_a_reward_log_prob_or_loss_that_is_not_finite_never_reaches_the_weights(
    models: tuple[Path, Path], spoil: str, message: str
) -> None:
    config = config_of(models)
    policy = TrainedPolicy(config)
    reference = trained.load(config, models[1])
    sampled, prompts = rollouts()
    if spoil == "reward":
        sampled[0] = ScoredRollout(sampled[0].rollout, Verdict(float("nan")), "")
    batch = data(config, sampled, prompts)
    if spoil == "logprob":
        batch.behaviour[0] = np.inf
    if spoil == "weight":
        batch.weights[:] = 3e38
    before = trained.checksum(policy.module)
    with pytest.raises(NonFiniteError, match=message):
        take_step(config, policy, reference, batch)
    assert trained.checksum(policy.module) == before


def test_the_learning_rate_warms_up_and_stays(models: tuple[Path, Path]) -> None:
    policy = TrainedPolicy(config_of(models, lr=1.0, warmup_steps=4))
    assert [policy.lr(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
