"""examples/trl_grpo.py gives the losses, gradients and runs of TRL's own GRPOTrainer, which is the oracle here."""

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

import fst_fast.mini
from fst_fast.mini.tokenizer import vocabulary
from fst_kernels import PolicyObjective

# TRL 1.16 sets a training argument under the name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_grpo.py"
STEPS, STEPS_PER_GENERATION = 3, 6  # micro-batches of one optimiser step and of one generation
VOCABULARY = len(vocabulary())  # of the mini base, which is the reference policy
CAP, CLIP = 1.3, {"epsilon": 0.2, "epsilon_high": 0.28}

Make = Callable[..., GRPOTrainer]


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trl_grpo", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trl_grpo"] = module
    spec.loader.exec_module(module)
    return module


example = load_example()


def length_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [len(ids) / 10 + (ids[0] % 3) for ids in completion_ids]


@pytest.fixture(autouse=True)
def leave_no_traces() -> Iterator[None]:
    """A trainer writes into the environment and into accelerate's shared state. One thread: the tensors are tiny."""
    before, threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Trainers on one random small model; the reference policy is the mini base, which has the same vocabulary."""

    def make(kind: type[GRPOTrainer], model: PreTrainedModel | None = None, **config: Any) -> GRPOTrainer:
        torch.manual_seed(1)
        model = model or Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, initializer_range=0.2, name_or_path=str(fst_fast.mini.path()),
            )
        ).train()  # fmt: skip
        settings = {
            "per_device_train_batch_size": 6,
            "gradient_accumulation_steps": STEPS,
            "steps_per_generation": STEPS_PER_GENERATION,
            "num_generations": 3,
            "max_completion_length": 8,
            "temperature": 0.7,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        trainer = kind(
            model,
            length_reward,
            GRPOConfig(str(tmp_path), **settings | config),
            Dataset.from_list([{"prompt": f"edges : {i} , 7 9 , {i} . path"} for i in range(12)]),
            processing_class=AutoTokenizer.from_pretrained(fst_fast.mini.path()),
        )
        trainer.current_gradient_accumulation_steps = STEPS  # what train() sets
        return trainer

    return make


def micro_batch(trainer: GRPOTrainer, *, moved: bool, tools: bool = False) -> dict[str, Tensor]:
    """Six completions of 8, 1, 5, 0, 3 and 7 tokens behind prompts of 2 to 5; moved: the policy is no longer the one that sampled them."""
    g = torch.Generator().manual_seed(2)
    lengths, prompts = torch.tensor([8, 1, 5, 0, 3, 7]), torch.tensor([5, 2, 3, 4, 5, 2])
    batch = {
        "prompt_ids": torch.randint(6, VOCABULARY, (6, 5), generator=g),
        "prompt_mask": (torch.arange(5) >= 5 - prompts[:, None]).long(),
        "completion_ids": torch.randint(6, VOCABULARY, (6, 8), generator=g),
        "completion_mask": (torch.arange(8) < lengths[:, None]).long(),
        "advantages": torch.tensor([1.2, -0.7, -1.1, 0.9, 0.0, 1.0]),
        "num_items_in_batch": torch.tensor(131),
    }
    if tools:
        batch["tool_mask"] = (torch.arange(8) % 4 != 1).long().expand(6, 8)
    logprob = policy_logprob(trainer, batch)
    batch["ref_per_token_logps"] = logprob + 0.4 * torch.randn(6, 8, generator=g)
    if moved:
        batch["old_per_token_logps"] = logprob + 0.4 * torch.randn(6, 8, generator=g)
    return batch


@torch.no_grad()
def policy_logprob(trainer: GRPOTrainer, batch: dict[str, Tensor]) -> Tensor:
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    attention = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, attention, 8, compute_entropy=True)[
        0
    ]


def loss_and_gradients(trainer: GRPOTrainer, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def metric(trainer: GRPOTrainer, name: str) -> float:
    return trainer._metrics["train" if trainer.model.training else "eval"][name][-1]


def difference(a: GRPOTrainer, b: GRPOTrainer, batch: dict[str, Tensor]) -> float:
    """Of loss and of every parameter's gradient, relative to b's: the largest."""
    (loss_a, grads_a), (loss_b, grads_b) = (loss_and_gradients(trainer, batch) for trainer in (a, b))
    errors = [float((loss_a - loss_b).abs() / loss_b.abs())]
    for name, expected in grads_b.items():
        assert expected.norm() > 0, name
        errors.append(float((grads_a[name] - expected).norm() / expected.norm()))
    return max(errors)


KL = {
    "no KL": {"beta": 0.0},
    "k3": {"beta": 0.1, "use_bias_correction_kl": False},
    "k3 times ratio": {"beta": 0.1, "use_bias_correction_kl": True},
}


def loss_config(loss_type: str) -> dict[str, Any]:
    return {"loss_type": loss_type, **({"epsilon_high": CAP} if loss_type == "cispo" else CLIP)}


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("loss_type", ["cispo", "grpo", "dapo", "dr_grpo", "bnpo"])
def test_loss_and_gradients_are_trls(make: Make, loss_type: str, kl: str) -> None:
    config = loss_config(loss_type) | KL[kl]
    trl, fused = make(GRPOTrainer, **config), make(example.FusedGRPOTrainer, **config)
    clipped = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean"
    for moved in (False, True):
        batch = micro_batch(trl, moved=moved, tools=moved)
        assert difference(fused, trl, batch) < 1e-5
        assert (0 < metric(trl, clipped) < 1) == moved
        assert metric(fused, clipped) == pytest.approx(metric(trl, clipped))
        if loss_type != "cispo":
            for side in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
                assert metric(fused, side) == pytest.approx(metric(trl, side))
        if loss_type != "grpo":
            assert metric(fused, "entropy") == pytest.approx(metric(trl, "entropy"), rel=1e-5)
            if kl != "no KL":
                assert metric(fused, "kl") == pytest.approx(metric(trl, "kl"), rel=1e-4)


SEQUENCE = {"importance_sampling_level": "sequence"}
COMPOSED = {
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 2.0},
    "luspo": {"loss_type": "luspo", **CLIP},
    "luspo of sequences": {"loss_type": "luspo", **SEQUENCE, **CLIP},
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 0.5, "vespo_lambda_pos": 0.4, "vespo_k_neg": 0.7, "vespo_lambda_neg": 0.3},
    **{f"{kind} clipped on two sides": {"loss_type": kind, "delta": 1.5, **CLIP} for kind in ("grpo", "bnpo", "dr_grpo", "dapo")},
    **{f"{kind} of sequences": {"loss_type": kind, **SEQUENCE, **CLIP} for kind in ("grpo", "dapo", "sapo")},
    "cispo of sequences": {"loss_type": "cispo", "epsilon_high": 1.02, **SEQUENCE},
    "cispo capped below one": {"loss_type": "cispo", "epsilon_high": 0.4},
    "cispo with TRL's default cap": {"loss_type": "cispo"},
}  # fmt: skip


@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("name", COMPOSED)
def test_every_loss_type_is_trls(make: Make, name: str, kl: str) -> None:
    config = COMPOSED[name] | KL[kl]
    trl, fused = make(GRPOTrainer, **config), make(example.FusedGRPOTrainer, **config)
    for moved in (False, True):
        assert difference(fused, trl, micro_batch(trl, moved=moved, tools=moved)) < 1e-5
    capped = name.startswith("cispo capped") or name.endswith("default cap")
    assert_metrics_are_trls(fused, trl, all_of_them=not capped)


OPTIONS = {
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy penalty": {"entropy_coef": -0.1},
    "the most uncertain tokens": {"top_entropy_quantile": 0.4},
    "the most uncertain tokens, entropy bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.3},
    "off-policy sequences left out": {"off_policy_mask_threshold": 0.05},
    "everything": {
        "top_entropy_quantile": 0.6,
        "entropy_coef": 0.2,
        "off_policy_mask_threshold": 0.05,
        **KL["k3"],
    },
    "lm_head in float32": {"cast_lm_head_to_fp32": True},
}


@pytest.mark.parametrize("loss_type", ["cispo", "grpo", "dapo", "dr_grpo", "bnpo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_trls(make: Make, name: str, loss_type: str) -> None:
    config = loss_config(loss_type) | OPTIONS[name]
    trl, fused = make(GRPOTrainer, **config), make(example.FusedGRPOTrainer, **config)
    batch = micro_batch(trl, moved=True, tools=True)
    batch["old_per_token_logps"][2] += 1  # of negative advantage and far from the policy: off-policy
    assert difference(fused, trl, batch) < 1e-5
    assert_metrics_are_trls(
        fused, trl, all_of_them=name != "lm_head in float32" or loss_type not in example.FUSED
    )
    if name != "lm_head in float32":
        plain = make(GRPOTrainer, **loss_config(loss_type))
        assert abs(loss_and_gradients(plain, batch)[0] - loss_and_gradients(trl, batch)[0]) > 1e-4


def assert_metrics_are_trls(fused: GRPOTrainer, trl: GRPOTrainer, *, all_of_them: bool) -> None:
    ours, theirs = fused._metrics["train"], trl._metrics["train"]
    assert set(ours) == set(theirs) or (not all_of_them and set(ours) <= set(theirs))
    for name in ours:
        if all_of_them or name.split("/")[0] in ("cispo_clip_ratio", "clip_ratio"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6, nan_ok=True), name


def test_adaptive_entropy_takes_the_steps_that_trls_takes(make: Make) -> None:
    """The coefficient grows at the end of a step of low entropy and is applied in the next."""
    config = loss_config("dapo") | {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 50.0}
    trl, fused = make(GRPOTrainer, **config), make(example.FusedGRPOTrainer, **config)
    batch, losses = micro_batch(trl, moved=True), []
    for step in range(3):
        assert difference(fused, trl, batch) < 1e-5
        assert fused.entropy_coef == trl.entropy_coef == pytest.approx(0.105 + 0.005 * step)
        losses.append(loss_and_gradients(trl, batch)[0])
        loss_and_gradients(fused, batch)
        trl.entropy_coef = fused.entropy_coef = 0.1 + 0.005 * (step + 1)
    assert losses[0] != losses[1]


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "name_or_path": str(fst_fast.mini.path()),
}  # fmt: skip
CHANGED_LOGITS = {
    "scaled by logit_scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "divided by logits_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.4)),
    "soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=3.0)),
    "scaled and soft-capped": lambda: CappedCohere(CohereConfig(**SMALL, logit_scale=0.5, final_logit_softcapping=2.0)),
}  # fmt: skip


class CappedCohere(CohereForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = 2.0 * torch.tanh(out.logits / 2.0)
        return out


@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
@pytest.mark.parametrize("name", CHANGED_LOGITS)
def test_what_a_model_does_to_its_logits_is_done_to_ours(make: Make, name: str, loss_type: str) -> None:
    torch.manual_seed(3)
    model = CHANGED_LOGITS[name]().train()
    config = loss_config(loss_type)
    trl, fused = (
        make(kind, model=copy.deepcopy(model), **config) for kind in (GRPOTrainer, example.FusedGRPOTrainer)
    )
    batch = micro_batch(trl, moved=True)
    assert difference(fused, trl, batch) < 1e-5
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), 1)
    attention = torch.cat((batch["prompt_mask"], batch["completion_mask"]), 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -9:-1] / fused.temperature
    want = logits.log_softmax(-1).gather(2, batch["completion_ids"][..., None]).squeeze(2)
    mask = batch["completion_mask"].bool()
    torch.testing.assert_close(policy_logprob(fused, batch)[mask], want[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "sapo"])
def test_the_routers_loss_of_a_mixture_of_experts_is_trls(make: Make, loss_type: str) -> None:
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "router_aux_loss_coef": 0.5,
    }
    torch.manual_seed(4)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **experts)).train()
    trl, fused = (
        make(kind, model=copy.deepcopy(model), **loss_config(loss_type)) for kind in (GRPOTrainer, example.FusedGRPOTrainer)
    )  # fmt: skip
    batch = micro_batch(trl, moved=True)
    assert difference(fused, trl, batch) < 1e-5
    assert metric(fused, "aux_loss") == pytest.approx(metric(trl, "aux_loss"), rel=1e-5)
    assert metric(trl, "aux_loss") > 1


@pytest.mark.parametrize("shape", [(6, 1), (6, 8)])
def test_the_correction_for_vllms_rounding_is_trls(make: Make, shape: tuple[int, int]) -> None:
    config = loss_config("cispo") | KL["k3"]
    trl, fused = make(GRPOTrainer, **config), make(example.FusedGRPOTrainer, **config)
    trl.use_vllm = fused.use_vllm = True
    batch = micro_batch(trl, moved=True)
    plain, _ = loss_and_gradients(fused, batch | {"importance_sampling_ratio": torch.ones(shape)})
    batch["importance_sampling_ratio"] = torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2
    assert difference(fused, trl, batch) < 1e-5
    assert abs(loss_and_gradients(fused, batch)[0] - plain) > 0.01 * abs(plain)


@pytest.mark.parametrize("loss_type", ["cispo", "grpo", "dr_grpo"])
def test_evaluation_knows_no_accumulation(make: Make, loss_type: str) -> None:
    trl, fused = (make(kind, **loss_config(loss_type)) for kind in (GRPOTrainer, example.FusedGRPOTrainer))
    batch = micro_batch(trl, moved=True)
    trained = loss_and_gradients(fused, batch)[0]
    for trainer in (trl, fused):
        trainer.model.eval()
    assert difference(fused, trl, batch) < 1e-5
    assert abs(loss_and_gradients(fused, batch)[0] / trained - 1) > 0.4


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_the_number_of_processes_counts_as_in_trl(
    make: Make, loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trl, fused = (make(kind, **loss_config(loss_type)) for kind in (GRPOTrainer, example.FusedGRPOTrainer))
    batch = micro_batch(trl, moved=True)
    alone = loss_and_gradients(fused, batch)[0]
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 3))
    assert difference(fused, trl, batch) < 1e-5
    factor = loss_and_gradients(fused, batch)[0] / alone
    assert factor == pytest.approx(3 if loss_type == "dapo" else 1, rel=1e-5)


def test_advantages_per_token_and_a_batch_without_live_tokens(make: Make) -> None:
    trl, fused = (make(kind, **loss_config("dapo")) for kind in (GRPOTrainer, example.FusedGRPOTrainer))
    batch = micro_batch(trl, moved=True)
    batch["advantages"] = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
    assert difference(fused, trl, batch) < 1e-5
    batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
    loss, gradients = loss_and_gradients(fused, batch)
    assert loss == 0
    assert all(not g.any() for g in gradients.values())


def test_scores_are_trls_and_give_a_ratio_of_exactly_one_in_the_training_pass(make: Make) -> None:
    trl, fused = (make(kind, **loss_config("dapo")) for kind in (GRPOTrainer, example.FusedGRPOTrainer))
    batch = micro_batch(trl, moved=False)
    mask = batch["completion_mask"].bool()
    assert not policy_logprob(fused, batch)[~mask].any()
    torch.testing.assert_close(policy_logprob(fused, batch), policy_logprob(trl, batch), rtol=1e-5, atol=1e-5)
    on_policy, expected = loss_and_gradients(fused, batch)
    loss, gradients = loss_and_gradients(fused, batch | {"old_per_token_logps": policy_logprob(fused, batch)})
    assert torch.equal(loss, on_policy)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_bf16_autocast_rounds_the_operands_and_not_the_statistics(make: Make) -> None:
    """TRL's own pass rounds the logits on the CPU, so the reference is an fp64 head on the same hidden states."""
    fused = make(example.FusedGRPOTrainer, bf16=True, **loss_config("dapo"))
    batch = micro_batch(fused, moved=False)
    mask, hidden = batch["completion_mask"].bool(), []
    norm = fused.accelerator.unwrap_model(fused.model).base_model.norm
    hook = norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    logprob = policy_logprob(fused, batch)[mask]
    hook.remove()
    weight = fused.accelerator.unwrap_model(fused.model).lm_head.weight
    operands = (x.detach().bfloat16().double() for x in (hidden[0][:, -9:-1][mask], weight))
    logits = torch.matmul(next(operands), next(operands).T) / fused.temperature
    expected = logits.log_softmax(-1).gather(1, batch["completion_ids"][mask][:, None]).squeeze(1)
    torch.testing.assert_close(logprob.double(), expected, rtol=0, atol=1e-5)


class WrongCap(example.FusedGRPOTrainer):
    def objective(self) -> PolicyObjective:
        return PolicyObjective("cispo", ratio_cap=1 + self.epsilon_high)


class WrongNormaliser(example.FusedGRPOTrainer):
    def token_weight(self, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        return mask / (self.current_gradient_accumulation_steps * mask.sum())


@pytest.mark.parametrize("wrong", [WrongCap, WrongNormaliser])
def test_the_comparison_sees_another_cap_and_another_normaliser(make: Make, wrong: type[GRPOTrainer]) -> None:
    trl, other = make(GRPOTrainer, **loss_config("cispo")), make(wrong, **loss_config("cispo"))
    assert difference(other, trl, micro_batch(trl, moved=True)) > 0.01


@pytest.mark.parametrize(("loss_type", "kl"), [("cispo", "no KL"), ("dapo", "k3 times ratio")])
def test_a_whole_run_is_trls(make: Make, loss_type: str, kl: str) -> None:
    """Generation, two iterations over each batch, accumulation, optimiser: the same steps."""
    config = (
        loss_config(loss_type)
        | KL[kl]
        | {"num_iterations": 2, "max_steps": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    )
    histories = []
    for kind in (GRPOTrainer, example.FusedGRPOTrainer):
        trainer = make(kind, **config)
        trainer.train()
        histories.append([log for log in trainer.state.log_history if "loss" in log])
    assert len(histories[0]) == 4
    for expected, log in zip(*histories, strict=True):
        for name in ("loss", "grad_norm", "entropy", *(["kl"] if kl != "no KL" else [])):
            assert log[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
        assert log.get("reward") == expected.get("reward")
    assert histories[0][0]["loss"] != histories[0][1]["loss"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel=True; allowed: False"),
        ({"loss_type": "cispo", "epsilon_high": 0.0}, "ratio_cap=0.0; allowed: > 0"),
        ({"loss_type": "grpo", "epsilon": 1.0}, "clip_low=1.0"),
    ],
)
def test_what_is_not_reproduced_is_refused_by_name(make: Make, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(example.FusedGRPOTrainer, **config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"logit_scale": 0.0}, r"model.config.logit_scale scales the logits by 0.0; allowed: a number > 0"),
        ({"logits_scaling": -8.0}, r"model.config.logits_scaling scales the logits by -0.125; allowed"),
        (
            {"lm_head_multiplier": "inv_sqrt_d_model"},
            "model.config.lm_head_multiplier scales the logits by 'inv_sqrt_d_model'",
        ),
    ],
)
def test_a_model_whose_logits_have_no_positive_scale_is_refused(
    make: Make, config: dict[str, Any], message: str
) -> None:
    trl = make(GRPOTrainer)
    trl.model.config.update(config)
    with pytest.raises(ValueError, match=message):
        example.FusedGRPOTrainer(
            trl.model, length_reward, trl.args, trl.train_dataset, processing_class=trl.processing_class
        )


def test_the_example_runs_and_prints_loss_and_reward() -> None:
    command = [sys.executable, EXAMPLE, "--steps", "2", "--beta", "0.01", "--completions", "16"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("LOCAL_RANK", None)  # left by a test that trained in this process
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(lines) == 2
    assert all(name in lines[0] for name in ("loss", "reward", "kl"))
