"""The optimiser's state on disk, by parameter and place, so that any number of processes under any ZeRO stage can go on from it.

    optimiser/rank-00003-0000.safetensors      keys such as  exp_avg/4096/model.layers.0.mlp.up_proj.weight

Each process writes the fragments that it holds: fp32 weights and Adam's two moments as flat ranges of the flattened parameter, the key saying
kind, first element and name, the file's metadata the number of Adam steps. Loading is the other way round: a process reads, from whichever
files have them, the ranges that its own layout asks for. Nothing is gathered on saving, the bits are those that were there, and the files
are safetensors: nothing in them can run.

Why not DeepSpeed's own checkpoints. They are pickles, one a process, for one layout. Its universal checkpoint was tried first (0.19.8): from
ZeRO 0 there is nothing to convert, from ZeRO 1 and 2 the converter asks for metadata that only Megatron's client makes, what was converted from
ZeRO 3 loads into ZeRO 3 alone, and `safe_set_full_optimizer_state` runs out of a ZeRO-3 parameter that the processes do not divide evenly.

The places where DeepSpeed keeps the state are named in `fragments` and nowhere else.
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
FILE_BYTES = 2**31  # a process holds this much in CPU memory at one time, twice while it writes


@dataclass(frozen=True)
class Fragment:
    """The range of one flattened parameter whose optimiser state is on this process."""

    name: str
    start: int  # first element, in the flattened parameter
    numel: int
    owner: Tensor  # fp32, what AdamW updates: the weight itself, its fp32 copy, or a flat partition of many
    offset: int  # of the fragment in the flattened owner

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's elements in `tensor`, the owner or one of its moments: a view."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def fragments(engine: Any) -> list[Fragment]:
    """What this process holds, in the order of the model's parameters. engine: DeepSpeed's, with torch's AdamW inside."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if stage == 3:
        return [f for name, p in named if (f := _zero3_fragment(optimizer, name, p)).numel > 0]
    if stage:
        return [
            Fragment(name, at.lp_fragment_address.start, at.lp_fragment_address.numel,
                     optimizer.single_partition_of_fp32_groups[at.param_group_index], at.hp_fragment_address.start)
            for name, p in named
            if (at := p._hp_mapping) is not None
        ]  # fmt: skip
    copies = dict(_copies(optimizer)) if hasattr(optimizer, "fp32_groups") else {}
    return [Fragment(name, 0, p.numel(), copies.get(p, p), 0) for name, p in named]


def _zero3_fragment(optimizer: Any, name: str, parameter: Any) -> Fragment:
    """The partition of this process; the last ones of a parameter may be padded, or all padding."""
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = size * distributed.rank()
    numel = max(0, min(size, parameter.ds_numel - start))
    return Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def _copies(optimizer: Any) -> Iterator[tuple[Any, Tensor]]:
    """bf16 without ZeRO: (weight, its fp32 copy)."""
    for weights, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(weights, copies, strict=True)


def _adam(engine: Any) -> Any:
    """torch's AdamW, which DeepSpeed's optimisers hold inside."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def reset(engine: Any) -> None:
    """Undo the Adam step with zero gradients that DeepSpeed takes at the start of bf16 without ZeRO, and there alone: it decays the weights
    and counts, so that the first update would be 0.74 of what it is under the other stages."""
    if hasattr(engine.optimizer, "fp32_groups"):
        _adam(engine).state.clear()
        for weight, copy in _copies(engine.optimizer):
            copy.data.copy_(weight.data)


def save(engine: Any, folder: Path) -> None:
    """Write this process's files into `folder`, durable. All processes call it."""
    folder.mkdir(exist_ok=True)
    held = fragments(engine)
    if engine.zero_optimization_stage() == 0:  # every process holds everything: they take turns
        held = distributed.share(held)
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
            values = fragment.of(tensor).to("cpu", copy=True)
            batch[f"{kind}/{fragment.start}/{fragment.name}"] = values
        if sum(t.nbytes for t in batch.values()) >= FILE_BYTES:
            write()
    if batch:
        write()


def _steps(adam: Any, held: list[Fragment]) -> int:
    """Adam steps behind the moments, 0 before the first."""
    counts = {int(adam.state.get(fragment.owner, {}).get("step", 0)) for fragment in held}
    assert len(counts) == 1, f"parameters have made different numbers of steps: {sorted(counts)}"
    return counts.pop()


def load(engine: Any, folder: Path) -> None:
    """Read into this process what it holds, and the weights that follow from it. All processes call it, before the first step.

    Raises RuntimeError, naming the parameter, where the files do not have all of it."""
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
                adam.state[owner] = {"step": torch.tensor(float(steps)), **moments}
            targets = {WEIGHT: owner, **{kind: adam.state[owner][kind] for kind in MOMENTS if steps}}
            for kind, tensor in targets.items():
                read = _read(places[kind, fragment.name], fragment.start, fragment.of(tensor))
                if read != fragment.numel:
                    raise RuntimeError(
                        f"{folder} has {read} of the {fragment.numel} elements of {fragment.name} ({kind}) from {fragment.start} on"
                    )
    _weights_follow(engine)


def _read(places: list[tuple[int, str, Any]], start: int, into: Tensor) -> int:
    """Fill `into`, which begins at element `start` of its parameter, from the ranges that overlap it; how many elements were there."""
    read = 0
    for begin, key, file in places:
        values = file.get_slice(key)
        first, last = max(begin, start), min(begin + values.get_shape()[0], start + len(into))
        if first < last:
            into[first - start : last - start].copy_(values[first - begin : last - begin])
            read += last - first
    return read


@torch.no_grad()
def _weights_follow(engine: Any) -> None:
    """The weights that the model computes with become those that the optimiser holds, as after a step."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for parameter in (p for p in engine.module.parameters() if p.requires_grad):
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            parameter.ds_tensor.data.copy_(flat[offset : offset + size])
        kept = optimizer.persistent_parameters  # small ones, which every process has whole
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)
    elif stage:
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for weight, copy in _copies(optimizer):
            weight.data.copy_(copy)
