"""LoRA (arXiv 2106.09685): the weights are frozen and low-rank adapters on the linear layers are trained (policy.lora). Uses peft.

The frozen model that the run holds anyway (reference of the KL, base model of the evaluations) is the base of the
trained one: `with_adapters` builds a second module tree over the same tensors and adds adapters to it, so the weights
are in memory once. What a run exports (checkpoints' `model/`, `fst export`) is a plain model with the adapters merged;
the adapters alone are written next to it in peft's format.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.policy import head

NAME = "default"
FOLDER = "adapter"


def with_adapters(base: nn.Module, config: Config) -> nn.Module:
    """A model over the tensors of `base`, with adapters. base: frozen; it does not change and computes without adapters."""
    shared: dict[int, Any] = {id(x): x for x in [*base.parameters(), *base.buffers()]}
    model = copy.deepcopy(base, shared)
    head.uninstall(model)
    inject(model, config)
    return model


def check(model: nn.Module, config: Config) -> None:
    """Raise UserError if policy.lora is not possible: peft is missing, or a target names no linear layer of the model."""
    wanted = config.policy.lora
    if wanted is None:
        return
    if importlib.util.find_spec("peft") is None:
        raise UserError("policy.lora needs the package peft: pip install 'fst-fast[lora]'")
    linear = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    } - {"lm_head"}
    unknown = sorted(set(wanted.targets) - linear)
    if unknown:
        raise UserError(
            f"policy.lora.targets={list(wanted.targets)}: the model has no linear layers named {', '.join(unknown)}; it has {', '.join(sorted(linear))}"
        )


def inject(model: nn.Module, config: Config) -> None:
    """Add adapters to a model and freeze everything else. The initial adapters change nothing and depend only on the
    seed. Raises UserError like `check`."""
    check(model, config)
    from peft import LoraConfig, inject_adapter_in_model

    wanted = config.policy.lora
    assert wanted is not None
    how = LoraConfig(
        r=wanted.rank, lora_alpha=wanted.alpha, target_modules=list(wanted.targets), lora_dropout=0.0
    )
    inject_adapter_in_model(how, model, adapter_name=NAME)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for _, layer in layers(model):  # peft's initialisation, from a seeded generator
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            a.copy_((2 * torch.rand(a.shape, generator=generator) - 1) / math.sqrt(a.shape[1]))
            b.zero_()


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every linear layer that has an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module


def has_adapters(model: nn.Module) -> bool:
    return next(layers(model), None) is not None


@torch.no_grad()
def merged_weight(module: Any) -> Tensor:
    """The effective weight of a linear layer, adapter included: W + (alpha / rank) B A."""
    if not hasattr(module, "lora_A"):
        weight: Tensor = module.weight
        return weight
    whole: Tensor = module.base_layer.weight + module.get_delta_weight(NAME)
    return whole


def bias_of(module: Any) -> Tensor | None:
    bias: Tensor | None = getattr(module, "base_layer", module).bias
    return bias


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model that computes the same function: adapters merged."""
    found: dict[str, Tensor] = {}
    adapters = dict(layers(model))
    for key, value in model.state_dict().items():
        owner, base, rest = key.partition(".base_layer.")
        if base:
            found[f"{owner}.{rest}"] = merged_weight(adapters[owner]) if rest == "weight" else value
        elif ".lora_A." not in key and ".lora_B." not in key:
            found[key] = value
    return found


def save(model: nn.Module, folder: Path) -> None:
    """Write the merged model to `folder`/model and its adapters, if any, to `folder`/adapter in peft's format."""
    adapters = has_adapters(model)
    state = merged_state_dict(model) if adapters else None
    model.save_pretrained(folder / "model", state_dict=state)  # type: ignore[operator]
    if adapters:
        save_adapters(model, folder / FOLDER)
    for file in folder.rglob("*.safetensors"):  # which safetensors writes for its owner alone
        shutil.copymode(folder / "model/config.json", file)


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write the adapters alone to `folder`, in peft's format."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    configs: Any = model.peft_config
    configs[NAME].save_pretrained(folder)
    state = get_peft_model_state_dict(model, adapter_name=NAME)
    named = {f"base_model.model.{key}": value.contiguous().cpu() for key, value in state.items()}
    save_file(named, folder / "adapter_model.safetensors")


def read(folder: Path) -> dict[str, Tensor]:
    """The adapters of `folder`/adapter, keyed by their parameter names in the model."""
    found = load_file(folder / FOLDER / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").replace(".weight", f".{NAME}.weight"): value
        for key, value in found.items()
    }
