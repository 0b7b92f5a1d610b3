"""The optimiser's state on disk, by parameter and range, so that any number of processes under any ZeRO stage can resume from it.

    optimiser/rank-00003-0000.safetensors      keys such as  exp_avg/4096/model.layers.0.mlp.up_proj.weight

Each process writes the fragments that it holds: fp32 weights and Adam's two moments as contiguous ranges of the
flattened parameter. A key gives kind, first element and parameter name; the file's metadata gives the number of Adam
steps. On loading, a process reads the ranges that its own layout needs from whichever files hold them. Saving gathers
nothing and is bit-exact, and safetensors files cannot execute code.

Why not DeepSpeed's own checkpoints: they are pickles, one per process, for one layout. Its universal checkpoint was
tried first (0.19.8). ZeRO 0 has nothing to convert; for ZeRO 1 and 2 the converter needs metadata that only Megatron's
client writes; what is converted from ZeRO 3 loads only into ZeRO 3; and `safe_set_full_optimizer_state` reads past the
end of a ZeRO-3 parameter that the processes do not divide evenly.

`fragments` is the only place that names where DeepSpeed keeps the state.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fst_fast import distributed

FOLDER = "optimiser"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
FILE_BYTES = 2**31  # per file; a process holds this much in CPU memory, and twice as much while it writes


@dataclass(frozen=True)
class Fragment:
    """The range of one flattened parameter whose optimiser state this process holds."""

    name: str
    start: int  # first element, in the flattened parameter
    numel: int
    owner: Tensor  # fp32, the tensor AdamW updates: the weight, its fp32 copy, or a flat partition of several
    offset: int  # of the fragment in the flattened owner

    def view(self, tensor: Tensor) -> Tensor:
        """The fragment's elements in `tensor` (the owner or one of its moments), as a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def fragments(engine: Any) -> list[Fragment]:
    """The fragments of this process, in the order of the model's parameters. engine: DeepSpeed's, with an AdamW inside."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 3:
        return [f for name, p in named if (f := _zero3_fragment(optimizer, name, p)).numel > 0]
    if stage:
        # The second is BF16_Optimizer's name, which DeepSpeed takes for stage 1 with float32 gradients of bfloat16 weights.
        flat = (
            getattr(optimizer, "single_partition_of_fp32_groups", None)
            or optimizer.fp32_groups_flat_partition
        )
        return [
            Fragment(name, at.lp_fragment_address.start, at.lp_fragment_address.numel,
                     flat[at.param_group_index], at.hp_fragment_address.start)
            for name, p in named
            if (at := p._hp_mapping) is not None
        ]  # fmt: skip
    copies = dict(_copies(optimizer)) if hasattr(optimizer, "fp32_groups") else {}
    return [Fragment(name, 0, p.numel(), copies.get(p, p), 0) for name, p in named]


def _zero3_fragment(optimizer: Any, name: str, parameter: Any) -> Fragment:
    """This process's partition of a parameter; the last partitions may be partly or entirely padding."""
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * distributed.rank()
    numel = max(0, min(size, parameter.ds_numel - start))
    return Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def _copies(optimizer: Any) -> Iterator[tuple[Any, Tensor]]:
    """bf16 without ZeRO: (weight, its fp32 copy)."""
    for weights, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(weights, copies, strict=True)


def _adam(engine: Any) -> Any:
    """The AdamW inside DeepSpeed's optimiser: torch's, FusedAdam or DeepSpeedCPUAdam. All keep exp_avg and exp_avg_sq per tensor."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def reset(engine: Any) -> None:
    """Undo the Adam step with zero gradients that DeepSpeed takes at the start in bf16 without ZeRO (only there). It
    applies weight decay and counts as a step, so the first update would be 0.74 times that of the other stages."""
    if hasattr(engine.optimizer, "fp32_groups"):
        _adam(engine).state.clear()
        for weight, copy in _copies(engine.optimizer):
            copy.data.copy_(weight.data)


def save(engine: Any, folder: Path) -> None:
    """Write this process's files into `folder` and fsync them. All processes call it."""
    folder.mkdir(exist_ok=True)
    held = fragments(engine)
    if engine.zero_optimization_stage() == 0:  # every process holds everything: each writes a shard
        held = distributed.local_shard(held)
    adam = _adam(engine)
    batch: dict[str, Tensor] = {}
    number = 0

    def write() -> None:
        nonlocal number
        path = folder / f"rank-{distributed.rank():05d}-{number:04d}.safetensors"
        save_file(batch, path, metadata={"steps": str(_steps(adam, held))})
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        batch.clear()
        number += 1

    for fragment in held:
        state = adam.state.get(fragment.owner, {})
        kinds = {WEIGHT: fragment.owner, **{kind: state[kind] for kind in MOMENTS if kind in state}}
        for kind, tensor in kinds.items():
            values = fragment.view(tensor).to("cpu", copy=True)
            batch[f"{kind}/{fragment.start}/{fragment.name}"] = values
        if sum(t.nbytes for t in batch.values()) >= FILE_BYTES:
            write()
    if batch:
        write()


def _steps(adam: Any, held: list[Fragment]) -> int:
    """The number of Adam steps in the moments; 0 before the first. FusedAdam counts on the last tensor of those that it steps together."""
    counts = {int(adam.state.get(fragment.owner, {}).get("step", 0)) for fragment in held}
    assert len(counts) == 1 or type(adam).__name__ == "FusedAdam", (
        f"different numbers of steps: {sorted(counts)}"
    )
    return max(counts)


def load(engine: Any, folder: Path) -> None:
    """Restore this process's fragments and the model weights derived from them. All processes call it, before the first step.

    Raises RuntimeError, naming the parameter, if the files do not cover it."""
    adam, held = _adam(engine), fragments(engine)
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
        counts = {int(file.metadata()["steps"]) for file in files}
        if len(counts) != 1:
            raise RuntimeError(f"{folder} holds the states of different steps: {sorted(counts)}")
        [steps] = counts
        places: dict[tuple[str, str], list[tuple[int, str, Any]]] = defaultdict(list)
        for file in files:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                kind, start, name = key.split("/", 2)
                places[kind, name].append((int(start), key, file))
        adam.state.clear()
        for fragment in held:
            owner = fragment.owner
            if steps and owner not in adam.state:
                moments = {kind: torch.zeros_like(owner, requires_grad=False) for kind in MOMENTS}
                count: Any = steps
                if isinstance(adam, torch.optim.AdamW):  # the fused one counts on the device
                    where = owner.device if adam.defaults["fused"] else None
                    count = torch.tensor(float(steps), device=where)
                adam.state[owner] = {"step": count, **moments}
            targets = {WEIGHT: owner, **{kind: adam.state[owner][kind] for kind in MOMENTS if steps}}
            for kind, tensor in targets.items():
                read = _read_range(places[kind, fragment.name], fragment.start, fragment.view(tensor))
                if read != fragment.numel:
                    raise RuntimeError(
                        f"{folder} has {read} of the {fragment.numel} elements of {fragment.name} ({kind}) from {fragment.start} on"
                    )
    _update_model_weights(engine)


def _read_range(places: list[tuple[int, str, Any]], start: int, into: Tensor) -> int:
    """Fill `into`, which starts at element `start` of its parameter, from the overlapping ranges; returns the number of elements read."""
    read = 0
    for begin, key, file in places:
        values = file.get_slice(key)
        first, last = max(begin, start), min(begin + values.get_shape()[0], start + len(into))
        if first < last:
            into[first - start : last - start].copy_(values[first - begin : last - begin])
            read += last - first
    return read


@torch.no_grad()
def _update_model_weights(engine: Any) -> None:
    """Copy the optimiser's fp32 weights into the weights that the model computes with, as after a step."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for parameter in (p for p in engine.module.parameters() if p.requires_grad):
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            parameter.ds_tensor.data.copy_(flat[offset : offset + size])
        kept = optimizer.persistent_parameters  # small parameters, which every process holds whole
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)
    elif stage:
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for weight, copy in _copies(optimizer):
            weight.data.copy_(copy)
