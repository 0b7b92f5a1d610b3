"""The learning rate of a step, the implementations of AdamW, and what is passed on to DeepSpeed (docs/recipes.md)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.config.checks import DEEPSPEED_KEYS
from fst_fast.config.load import check
from fst_fast.errors import UserError
from fst_fast.policy import optimiser, trained
from fst_fast.policy.scoring import Batching
from fst_fast.policy.trained import TrainedPolicy
from fst_fast.slow.slow_phase import objective_of
from fst_fast.slow.update import Reference, micro_jobs
from tests.fst_fast import test_update
from tests.fst_fast.test_update import config_of, rollouts

models = test_update.models  # a fixture


# ------------------------------------------------------------------------------------------------------------------- learning rate


def rates(**slow: Any) -> list[float]:
    config = Config.model_validate({"slow": {"lr": 1.0, "steps": 12, "warmup_steps": 0, **slow}})
    return [optimiser.learning_rate(config.slow, step) for step in range(config.slow.steps)]


@pytest.mark.parametrize("ratio", [0.0, 0.1])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_are_those_of_transformers(schedule: str, ratio: float) -> None:
    import transformers

    parameter = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.AdamW([parameter], lr=1.0)
    if schedule == "cosine":
        theirs: Any = transformers.get_cosine_with_min_lr_schedule_with_warmup(adam, 0, 12, min_lr_rate=ratio)
    else:
        theirs = transformers.get_linear_schedule_with_warmup(adam, 0, 12)
    expected = []
    for _ in range(12):
        [lr] = theirs.get_last_lr()
        expected.append(lr if schedule == "cosine" else ratio + (1 - ratio) * lr)
        adam.step()
        theirs.step()
    assert rates(lr_schedule=schedule, lr_min_ratio=ratio) == pytest.approx(expected)


def test_the_warm_up_comes_first_and_the_rest_falls_from_the_top() -> None:
    found = rates(lr_schedule="linear", warmup_steps=4, lr_min_ratio=0.5)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, *(1 - k / 16 for k in range(8))])
    found = rates(lr_schedule="cosine", warmup_steps=2)
    assert found[:3] == pytest.approx([0.5, 1, 1])
    assert found[7] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, *[1.0] * 9]


# ------------------------------------------------------------------------------------------------------------------- DeepSpeed


class _Op:
    """DeepSpeed's two compiled optimisers in torch: the arithmetic of its C++, without a compiler."""

    def create_adam(self, *_: Any) -> None: ...

    def destroy_adam(self, *_: Any) -> None: ...

    def adam_update(
        self, _: int, step: int, lr: float, b1: float, b2: float, eps: float, decay: float, __: bool, p: Tensor, g: Tensor, m: Tensor,
        v: Tensor,
    ) -> None:  # fmt: skip
        assert type(step) is int
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        p.mul_(1 - lr * decay)
        p.addcdiv_(m, (v / (1 - b2**step)).sqrt_().add_(eps), value=-lr / (1 - b1**step))

    def multi_tensor_adam(
        self, _: int, __: Any, lists: Any, lr: float, b1: float, b2: float, eps: float, step: int, ___: int, ____: int, decay: float
    ) -> None:  # fmt: skip
        for g, p, m, v in zip(*lists, strict=True):
            self.adam_update(0, step, lr, b1, b2, eps, decay, True, p, g, m, v)


def with_policy(config: Config, **policy: Any) -> Config:
    return Config.model_validate({**config.model_dump(), "policy": policy})


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ({"optimizer": "auto", "zero_stage": 2, "offload_optimizer": True}, "DeepSpeedCPUAdam"),
        ({"optimizer": "auto", "zero_stage": 1}, "AdamW"),
        pytest.param({"optimizer": "fused_adam"}, "FusedAdam", marks=pytest.mark.chaos),
        pytest.param({"optimizer": "fused_adam", "zero_stage": 1}, "FusedAdam", marks=pytest.mark.chaos),
        pytest.param({"optimizer": "fused_adam", "zero_stage": 3}, "FusedAdam", marks=pytest.mark.chaos),
        pytest.param(
            {"optimizer": "cpu_adam", "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True},
            "DeepSpeedCPUAdam", marks=pytest.mark.chaos,
        ),
    ],
)  # fmt: skip
def test_every_optimiser_takes_torchs_steps_and_is_continued_from_a_checkpoint(
    models: tuple[Path, Path],
    policy: dict[str, Any],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from deepspeed.ops import op_builder

    for builder in ("CPUAdamBuilder", "FusedAdamBuilder"):
        monkeypatch.setattr(getattr(op_builder, builder), "load", lambda *_, **__: _Op())
    config, reference = config_of(models, weight_decay=0.1), trained.load(config_of(models), models[1])
    sampled, prompts = rollouts()

    def steps(made: TrainedPolicy, count: int) -> None:
        data = test_update.data(config, sampled, prompts)
        for _ in range(count):
            test_update.take_step(config, made, reference, data)
            made.hand_over()

    def weights(made: TrainedPolicy) -> Tensor:
        return torch.cat([p.detach().flatten() for p in made.rollout_model.parameters()])

    plain = TrainedPolicy(config)
    steps(plain, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = with_policy(config, **policy)
    settings = trained.deepspeed_config(chosen)
    optimiser.check(chosen, settings)
    plainly = trained.deepspeed_config
    monkeypatch.setattr(trained, "deepspeed_config", lambda c: settings if c is chosen else plainly(c))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = TrainedPolicy(chosen)
    steps(one, 1)
    (tmp_path / "saved").mkdir()
    one.save(tmp_path / "saved")
    steps(one, 1)
    assert type(one.engine.basic_optimizer).__name__ == name
    assert name != "AdamW" or one.engine.basic_optimizer.defaults["fused"]
    torch.testing.assert_close(weights(one), weights(plain), rtol=0, atol=2e-6)
    again = TrainedPolicy(chosen)
    again.load(tmp_path / "saved")
    again.hand_over()
    steps(again, 1)
    assert torch.equal(weights(again), weights(one))
    torchs = TrainedPolicy(config)
    torchs.load(tmp_path / "saved")  # the same format
    steps(torchs, 1)
    torch.testing.assert_close(weights(torchs), weights(plain), rtol=0, atol=2e-6)


def test_an_optimiser_that_the_machine_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config.model_validate({"policy": {"optimizer": "fused_adam"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"policy.optimizer=fused_adam needs a GPU, and this process has none"
    ):
        optimiser.check(config, {})
    from deepspeed.ops import op_builder

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(op_builder.CPUAdamBuilder, "load", fails)
    config = Config.model_validate(
        {"policy": {"optimizer": "cpu_adam", "zero_stage": 1, "offload_optimizer": True}}
    )
    with pytest.raises(
        UserError, match=r"DeepSpeed cannot build cpu_adam: no compiler here; policy.optimizer=torch"
    ):
        optimiser.check(config, {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    tree = {"policy": {"optimizer": "fused_adam"}, "model": {"dtype": "bfloat16"}}
    with pytest.raises(UserError, match=r"fused_adam with weights in bfloat16 needs policy.zero_stage >= 1"):
        optimiser.check(Config.model_validate(tree), {})


def test_a_gpu_steps_with_one_kernel_and_a_cpu_with_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = Config.model_validate({"policy": {"zero_stage": 1, "offload_optimizer": True}})
    for on_gpu, names in ((False, ["torch_adamw"] * 2), (True, ["torch_fused", "cpu_adam"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=on_gpu: there)
        assert [optimiser.choice(config) for config in (Config(), offloaded)] == names


# ------------------------------------------------------------------------------------------------------------------- micro-batches


@pytest.mark.parametrize("stage", range(4))
def test_small_gradients_of_many_micro_batches_are_not_lost_in_bfloat16(
    models: tuple[Path, Path], stage: int
) -> None:
    """32 micro-batches of 1/512 of a gradient behind a whole one: in bfloat16 each of them is less than half of the last digit."""
    config = Config.model_validate(
        {**config_of(models).model_dump(), "model": {"path": str(models[0]), "dtype": "bfloat16"}}
    )
    sampled, prompts = rollouts()
    reference = Reference(trained.load(config, models[1]))
    data = test_update.data(config, sampled, prompts)

    def norm(scales: list[float], **policy: Any) -> float:
        made = TrainedPolicy(with_policy(config, zero_stage=stage, **policy))
        _, [(inputs, job)] = micro_jobs(data, reference, objective_of(config.slow), Batching.of(config, 0))
        made.forward_backward(
            [(inputs, lambda *given, scale=scale: job(*given) * scale) for scale in scales]  # type: ignore[misc]
        )
        return made.step(0.0)

    whole, small = norm([1.0]), [1.0, *[1 / 512] * 32]
    assert norm(small) / whole == pytest.approx(1 + 32 / 512, rel=2e-3)
    if stage:
        lost = norm(small, deepspeed={"data_types": {"grad_accum_dtype": "bf16"}})
        assert lost / whole < 1.03, "what is measured is the accumulation"


def test_further_keys_reach_deepspeed_beside_ours(models: tuple[Path, Path]) -> None:
    more = {
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 1000},
        "dump_state": False,
    }
    config = with_policy(config_of(models), zero_stage=2, deepspeed=more)
    settings = trained.deepspeed_config(config)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000}
    assert settings["gradient_clipping"] == 0
    distributed.init()
    optimiser.check(config, settings)
    assert TrainedPolicy(config).engine.optimizer.reduce_bucket_size == 1000


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"reduce_bucket_size": 3}, "policy.deepspeed.reduce_bucket_size is no key that DeepSpeed reads"),
        ({"zero_optimization": {"bucket": 3}}, "DeepSpeed refuses it: .*bucket"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "DeepSpeed refuses it: .*reduce_bucket_size"),
    ],
)
def test_keys_that_deepspeed_does_not_know_are_refused(given: dict[str, Any], sentence: str) -> None:
    distributed.init()
    config = Config.model_validate({"policy": {"deepspeed": given}})
    with pytest.raises(UserError, match=sentence):
        optimiser.check(config, trained.deepspeed_config(config))


@pytest.mark.parametrize("path", DEEPSPEED_KEYS)
def test_keys_of_deepspeed_that_other_keys_set_are_refused_by_name(path: str) -> None:
    tree: Any = 1
    for part in reversed(path.split(".")):
        tree = {part: tree}
    policy = {"deepspeed": tree, "zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    with pytest.raises(UserError, match=rf"policy.deepspeed.{path} is set by "):
        check({"policy": policy})
