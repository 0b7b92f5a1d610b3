"""LoRA: the base's weights are shared, only adapters are trained, every path applies them, and exports are plain
models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")

from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.policy import lora, trained
from fst_fast.policy.attention import TreePlan
from fst_fast.policy.cpu_forward import CpuForward, unsupported_reason
from fst_fast.policy.scoring import Batching
from fst_fast.policy.trained import TrainedPolicy
from fst_fast.rollout.engine import Request, RolloutEngine
from fst_fast.slow.slow_phase import objective_of
from fst_fast.slow.update import Reference, micro_jobs
from tests.fst_fast import test_update
from tests.fst_fast.test_update import config_of, data, rollouts, take_step

models = test_update.models  # a fixture


def with_lora(config: Config, **how: Any) -> Config:
    tree = config.model_dump()
    tree["policy"]["lora"] = {"rank": 3, "alpha": 6, **how}
    return Config.model_validate(tree)


def spoil(model: torch.nn.Module) -> None:
    """Set adapters that change the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, layer in lora.layers(model):
            b = layer.lora_B[lora.NAME].weight
            b.copy_(0.3 * torch.randn(b.shape, generator=generator))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    plan = TreePlan(torch.full((len(ids),), len(ids), dtype=torch.int32))
    with torch.no_grad():
        out: torch.Tensor = model(
            input_ids=ids[None], position_ids=torch.arange(len(ids))[None], plan=plan, use_cache=False
        ).logits[0]
    return out


IDS = torch.arange(3, 20)


def test_the_weights_are_in_memory_once_and_the_base_computes_without_adapters(
    models: tuple[Path, Path],
) -> None:
    config = with_lora(config_of(models))
    base = trained.load(config)
    before = logits(base, IDS)
    policy = TrainedPolicy(config, base)
    assert torch.equal(logits(policy.module, IDS), before), "adapters begin as no change"
    spoil(policy.module)
    assert torch.equal(logits(base, IDS), before)
    assert (logits(policy.module, IDS) - before).abs().max() > 0.1
    shared = {p.data_ptr() for p in base.parameters()}
    own = [p for p in policy.module.parameters() if p.data_ptr() not in shared]
    assert shared < {p.data_ptr() for p in policy.module.parameters()}
    assert sum(p.numel() for p in own) == sum(
        p.numel() for p in policy.module.parameters() if p.requires_grad
    )
    assert all("lora_" in name for name, p in policy.module.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kl", ["k3", "reverse"])
def test_the_gradient_of_an_adapter_is_that_of_the_weight_it_adds_to(
    models: tuple[Path, Path], kl: str
) -> None:
    """dA = s B^T dW and dB = s dW A^T, dW of the plain model with the same weights."""
    plain_config = config_of(models, kl=kl, kl_coef=0.1)
    config = with_lora(plain_config)
    sampled, prompts = rollouts()
    policy = TrainedPolicy(config, trained.load(config))
    spoil(policy.module)
    reference = trained.load(config, models[1])

    def jobs(config: Config) -> Any:
        batch, batching = data(config, sampled, prompts), Batching.of(config, 0)
        return micro_jobs(batch, Reference(reference), objective_of(config.slow), batching)[1]

    policy.forward_backward(jobs(config))
    plain = TrainedPolicy(plain_config)
    plain.module.load_state_dict(lora.merged_state_dict(policy.module))
    plain.forward_backward(jobs(plain_config))
    weights = dict(plain.module.named_parameters())
    count = 0
    for name, layer in lora.layers(policy.module):
        a, b = layer.lora_A[lora.NAME].weight, layer.lora_B[lora.NAME].weight
        dw = weights[f"{name}.weight"].grad
        assert dw is not None
        assert dw.abs().max() > 1e-4
        torch.testing.assert_close(a.grad, 2.0 * b.T @ dw, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(b.grad, 2.0 * dw @ a.T, rtol=1e-4, atol=1e-6)
        count += 1
    assert count == 14


def test_cpu_and_transformers_forwards_apply_the_adapters(models: tuple[Path, Path], tmp_path: Path) -> None:
    config = with_lora(config_of(models))
    policy = TrainedPolicy(config, trained.load(config))
    model: Any = policy.module
    spoil(model)
    want = logits(model, IDS)
    assert unsupported_reason(model) is None
    plan = TreePlan(torch.full((len(IDS),), len(IDS), dtype=torch.int32))
    torch.testing.assert_close(
        CpuForward(model)(IDS, torch.arange(len(IDS)), plan), want, rtol=1e-4, atol=1e-4
    )
    lora.save(model, tmp_path)
    readable = {path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert len(readable) == 1, "all who may read the configuration may read the weights"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not lora.has_adapters(plain)
    torch.testing.assert_close(plain(IDS[None]).logits[0], want, rtol=1e-4, atol=1e-4)

    from peft import PeftModel

    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(models[0]), tmp_path / lora.FOLDER
    )
    torch.testing.assert_close(loaded(IDS[None]).logits[0], want, rtol=1e-4, atol=1e-4)
    again = TrainedPolicy(config, trained.load(config))
    again.load_adapters(tmp_path)
    assert torch.equal(logits(again.module, IDS), want)


def test_rollouts_sample_with_the_adapters_as_they_are_at_each_call(models: tuple[Path, Path]) -> None:
    from tests.fst_fast.test_rollout import assert_same, sample

    rng = np.random.default_rng(0)
    root = rng.integers(0, 50, 9)
    requests = [
        Request(str(i), "c", 0, np.concatenate([root, rng.integers(0, 50, 4)]), seed=i) for i in range(6)
    ]
    config = with_lora(config_of(models))
    policy = TrainedPolicy(config, trained.load(config))
    ours = RolloutEngine(policy.module, eos_ids=(), pad_id=0, max_batch=64, packing="forest", join_tokens=0)
    first = sample(ours, requests, 5)
    spoil(policy.module)
    merged: Any = trained.load(config)
    merged.load_state_dict(lora.merged_state_dict(policy.module))
    theirs = RolloutEngine(merged, eos_ids=(), pad_id=0, max_batch=64, packing="forest", join_tokens=0)
    second = sample(ours, requests, 5)
    assert_same(second, sample(theirs, requests, 5))
    assert any(a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(first, second, strict=True))


def test_a_step_moves_adapters_alone(models: tuple[Path, Path]) -> None:
    config = with_lora(config_of(models))
    sampled, prompts = rollouts()
    base = trained.load(config)
    kept = {name: p.clone() for name, p in base.named_parameters()}
    policy = TrainedPolicy(config, base)
    take_step(config, policy, base, data(config, sampled, prompts))
    assert all(torch.equal(p, kept[name]) for name, p in base.named_parameters())
    assert all(layer.lora_B[lora.NAME].weight.abs().max() > 0 for _, layer in lora.layers(policy.module))


def test_a_target_that_is_no_linear_layer_is_refused_with_those_there_are(models: tuple[Path, Path]) -> None:
    config = with_lora(config_of(models), targets=["q_proj", "wq"])
    with pytest.raises(UserError, match=r"no linear layers named wq; it has down_proj, gate_proj, .*q_proj"):
        TrainedPolicy(config, trained.load(config))


def test_without_peft_or_with_a_wrong_target_a_run_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fst_fast.cli import main

    words = ["train", "--run-dir", str(tmp_path / "run")]
    assert main([*words, "--policy.lora.targets=[wq]"]) == 2
    assert "no linear layers named wq" in capsys.readouterr().err
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda _: None)
    assert main([*words, "--policy.lora.rank=2"]) == 2
    assert "policy.lora needs the package peft" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
