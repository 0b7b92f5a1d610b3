"""The trained policy in a DeepSpeed engine: one code path for ZeRO 0 to 3, CPU (gloo) and GPU (nccl), one process or many.

Deviations from the usual way to use DeepSpeed, and why:
- a step has as many micro-batches as its forest needs, so the accumulation boundary is set explicitly and
  `gradient_accumulation_steps` is 1;
- the loss has ONE global denominator (see slow/update.py). DeepSpeed averages gradients over processes, so the loss is
  first multiplied by their number;
- the learning rate is set at every step from the config (policy/optimiser.py), so it depends on the step number alone;
- gradients of several micro-batches are added up in float32 in bfloat16 models, too: by DeepSpeed under ZeRO, and here
  without it, where DeepSpeed cannot;
- checkpoints are in our own format (optimiser_state.py): safetensors that any layout can load;
- rollouts never run through a ZeRO-3 forward. After each step the trained weights are gathered in buckets into a plain
  replica, whose memory is freed for the step itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.policy import cpu_layers, head, liger, lora, optimiser, optimiser_state
from fst_fast.policy.attention import load_model
from fst_fast.run.faults import reach

GATHER_BUCKET = 64 * 2**20  # elements of partitioned weights gathered at a time
LARGEST_NORM = 1e17  # of one gradient tensor; the sum of squares over a model of them still fits into fp32


class NonFiniteError(RuntimeError):
    """A loss or gradient of a step is NaN or Inf; raised before the weights are updated. losses: of this process's
    micro-batches, as far as computed."""

    def __init__(self, text: str, losses: Sequence[float] = ()) -> None:
        super().__init__(text)
        self.losses = list(losses)


def dtype_of(config: Config) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.model.dtype]


def load(config: Config, path: str | Path | None = None) -> nn.Module:
    """Load a plain frozen module on this process's device, in evaluation mode, with a head that runs jobs. path: None for `model.path`."""
    model = _load(config, path)
    frozen: nn.Module = model.to(distributed.device()).eval().requires_grad_(False)
    return frozen


def _load(config: Config, path: str | Path | None = None) -> Any:
    if config.policy.liger:
        liger.check()
    model = load_model(
        config.model.path if path is None else path,
        dtype_of(config),
        attention=config.policy.attention,
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision if path is None else None,
    )
    head.install(model)
    if config.policy.liger:
        liger.install(model)
    cpu_layers.install(model)
    return model


def sampling_copy(config: Config, base: nn.Module) -> tuple[nn.Module, list[str]]:
    """A model for those who sample ahead of the training, and the names of its weights that training changes. base: the frozen model of `load`, over whose
    tensors adapters are put (policy.lora)."""
    if config.policy.lora is None:
        model = load(config)
        return model, [name for name, _ in model.named_parameters()]
    model = lora.with_adapters(base, config)
    head.install(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return model.eval().requires_grad_(False), names


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed settings derived from the config. Batch sizes are nominal, since we count micro-batches ourselves."""
    policy = config.policy
    zero: dict[str, Any] = {"stage": policy.zero_stage}
    if policy.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if policy.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    bf16 = config.model.dtype == "bfloat16"
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": optimiser.parameters(config)},
        "gradient_clipping": config.slow.max_grad_norm,
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if bf16 and policy.zero_stage:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(settings, policy.deepspeed)


def _merged(tree: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(tree[k], v) if isinstance(v, dict) and isinstance(tree.get(k), dict) else v
        for k, v in more.items()
    }
    return {**tree, **both}


class TrainedPolicy:
    """The trained model: forward and backward over micro-batches, the optimiser step, the sampling copy, checkpoints."""

    def __init__(self, config: Config, base: nn.Module | None = None):
        """base: the frozen model of `load` whose weights the LoRA model shares (policy.lora); None: load one for it."""
        import deepspeed  # late: slow to load, and it reads the environment that distributed.init() completes

        self._config = config
        self._zero3 = config.policy.zero_stage == 3
        settings = deepspeed_config(config)
        adapted = None
        if config.policy.lora is not None:
            adapted = lora.with_adapters(load(config) if base is None else base, config)
            head.install(adapted)
        # The replica is loaded before ZeRO-3 takes over from_pretrained: afterwards every model loaded would be partitioned.
        self._replica = None
        if self._zero3:
            self._replica = load(config) if adapted is None else adapted.requires_grad_(False)
            from transformers.integrations import HfDeepSpeedConfig

            self._zero3_loading = HfDeepSpeedConfig(settings)  # must stay alive while from_pretrained runs
        model: Any = adapted
        if adapted is None or self._zero3:
            model = _load(config)
            if config.policy.lora is not None:
                lora.inject(model, config)
        self._zero3_loading = None
        if config.policy.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.disable_input_require_grads()  # its hook serves the re-entrant kind alone, and forwards that sample refuse hooks
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], config=settings
        )
        distributed.set_collective_timeout(config.run.timeout_s)
        optimiser_state.reset(self.engine)
        self.module: nn.Module = self.engine.module
        self._grad_norms: list[Tensor] = []
        self._sums = settings["bf16"]["enabled"] and not config.policy.zero_stage
        for parameter in self.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._record_norm)

    def _record_norm(self, grad: Tensor) -> None:
        self._grad_norms.append(torch.linalg.vector_norm(grad, dtype=torch.float32))

    @property
    def rollout_model(self) -> nn.Module:
        """The plain model that samples: the trained one itself (ZeRO 0-2), or its gathered replica (ZeRO-3)."""
        return self._replica if self._replica is not None else self.module

    def lr(self, step: int) -> float:
        """The learning rate of optimiser step `step` (from 0)."""
        return optimiser.learning_rate(self._config.slow, step)

    def forward_backward(self, micro_batches: Sequence[tuple[dict[str, Any], head.LossJob]]) -> None:
        """Accumulate the gradients of all micro-batches; afterwards each job holds its statistics.

        Every process must pass the same number of micro-batches. Raises NonFiniteError on all processes if any process
        has a NaN or Inf in its loss or gradients."""
        self.engine.train()
        self._grad_norms.clear()
        computed: list[Tensor] = []  # read at the end: reading synchronises with the device
        sums: dict[nn.Parameter, Tensor] = {}
        for i, (inputs, job) in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            if self._sums and i:
                self._set_aside(sums, put_back=last)
            with head.running(self.module, job):
                loss = self.engine(**inputs).logits
            computed.append(loss.detach())
            self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
            reach("backward")
        self.engine.eval()
        losses = torch.stack(computed).tolist() if computed else []
        norms = torch.stack(self._grad_norms) if self._grad_norms else torch.zeros(1)
        bad_grads = int((~torch.isfinite(norms) | (norms > LARGEST_NORM)).sum())
        bad_loss = int(not all(map(math.isfinite, losses)))
        loss_bad, grads_bad = distributed.all_reduce_sum([bad_loss, bad_grads])
        if loss_bad or grads_bad:
            raise NonFiniteError(
                f"{int(loss_bad)} process(es) with a non-finite loss, {int(grads_bad)} non-finite gradients",
                losses,
            )

    def _set_aside(self, sums: dict[nn.Parameter, Tensor], *, put_back: bool) -> None:
        """Add the gradients of a micro-batch to float32 sums; put_back: the last micro-batch is next, whose gradients are added to the rounded sums."""
        for parameter in self.module.parameters():
            if parameter.grad is None:
                continue
            if parameter in sums:
                sums[parameter] += parameter.grad
            elif not put_back:
                sums[parameter] = parameter.grad.float()
            if put_back and parameter in sums:
                parameter.grad.copy_(sums.pop(parameter))
            elif not put_back:
                parameter.grad = None

    def step(self, lr: float) -> float:
        """Take one optimiser step at learning rate `lr`; returns the global gradient norm before clipping."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        plain = None
        if self._config.policy.zero_stage == 0 and self._config.model.dtype == "float32":
            # DeepSpeed keeps no norm on this path; the gradients are already averaged over the processes here.
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            plain = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads])))
        self.engine.step()
        reach("optimiser")
        norm = plain if plain is not None else float(self.engine.get_global_grad_norm())
        assert math.isfinite(norm), f"the gradient norm is {norm} though no gradient was"
        return norm

    def discard(self) -> None:
        """Drop the gradients of a `forward_backward` that raised, so that the next step starts clean."""
        optimizer, stage = self.engine.optimizer, self._config.policy.zero_stage
        self.engine.zero_grad()
        optimizer.zero_grad(set_to_none=True)
        if hasattr(optimizer, "clear_hp_grads"):
            optimizer.clear_hp_grads()
        if stage and self._config.policy.offload_optimizer:
            optimizer.reset_cpu_buffers()
        elif stage in (1, 2) and hasattr(optimizer, "all_grad_tensors"):
            for group in optimizer.averaged_gradients:
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        elif stage == 3:
            optimizer.averaged_gradients = {}

    def release(self) -> None:
        """Free the replica's trained weights. `hand_over` fills them again; nothing may sample until then."""
        if self._replica is not None:
            copies = dict(self._replica.named_parameters())
            for bucket in _buckets(self.module):
                for name, _ in bucket:
                    copies[name].data = copies[name].new_empty(0)

    def hand_over(self) -> None:
        """Update the sampling model to the current weights, and check that all processes sample from the same ones."""
        if self._replica is not None:
            copies = dict(self._replica.named_parameters())
            for bucket in _buckets(self.module):
                for name, parameter in bucket:
                    if not copies[name].numel():
                        shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
                        copies[name].data = copies[name].new_empty(shape)
                self._gather(bucket, copies)
        sums = distributed.all_gather(checksum(self.rollout_model))
        if len(set(sums)) > 1:
            raise RuntimeError(
                f"the processes hold different weights after the hand-over; checksums by rank: {sums}"
            )
        reach("hand_over")

    def _gather(self, bucket: list[tuple[str, nn.Parameter]], copies: dict[str, nn.Parameter]) -> None:
        import deepspeed

        with torch.no_grad(), deepspeed.zero.GatheredParameters([p for _, p in bucket]):
            for name, parameter in bucket:
                copies[name].copy_(parameter)
                if not torch.equal(copies[name], parameter):
                    raise RuntimeError(f"the rollouts' copy of {name} differs from the trained weight")

    def load_adapters(self, folder: Path) -> None:
        """Load the adapters that lora.save wrote, without optimiser state. All processes call it, then `hand_over`."""
        import deepspeed

        found = lora.read(folder)
        mine = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if set(found) != set(mine):
            raise UserError(f"{folder / lora.FOLDER} holds other adapters than policy.lora describes")
        parameters = list(mine.values())
        with (
            torch.no_grad(),
            deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self._zero3),
        ):
            for name, parameter in mine.items():
                parameter.copy_(found[name])

    def save(self, folder: Path) -> None:
        """Write fp32 weights and the optimiser's moments into the checkpoint `folder`. All processes call it."""
        optimiser_state.save(self.engine, folder / optimiser_state.FOLDER)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, with any number of processes under any ZeRO stage. All processes call it, then `hand_over`."""
        optimiser_state.load(self.engine, folder / optimiser_state.FOLDER)


def _buckets(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    bucket: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # unchanged by training
            continue
        bucket.append((name, parameter))
        size += int(getattr(parameter, "ds_numel", parameter.numel()))
        if size >= GATHER_BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@torch.no_grad()
def checksum(model: nn.Module) -> float:
    """Sum of all weights, each tensor weighted by its index, in fp64. Equal weights on the same kind of device give equal checksums."""
    parts = [p.sum(dtype=torch.float64) * (i + 1) for i, p in enumerate(model.parameters())]
    return float(torch.stack(parts).sum())
