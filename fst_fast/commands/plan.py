"""`fst plan`: what a slow step will take in memory and time, on which machine, and what to change. Everything printed is predicted."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from fst_fast.config import Config
from fst_fast.errors import UserError
from fst_fast.plan import advice, machines
from fst_fast.plan.advice import Change, Plan
from fst_fast.plan.shapes import Shape, local_folder, read_shape
from fst_fast.plan.workload import SPREAD, Assumed, longest
from fst_fast.run.cores import usable_cores

GB = machines.GB
SHOWN = 3  # changes
MOST_DEVICES = 4096


def with_shape(config: Config) -> tuple[Config, Shape]:
    """The configuration, its model pinned where that takes a look at it, and the shape of the model, from its config.json. Raises UserError."""
    folder = local_folder(config.model.path)
    if folder is None or config.model.dtype == "auto":
        from fst_fast.policy.base_model import model_folder, pin  # late: it loads torch

        config = pin(config, weights=False)
        folder = model_folder(config.model.path, config.model.revision, weights=False)
    return config, read_shape(folder, config.model.path)


def make_plan(
    config: Config, *, gpus: int, machine: str | None, memory: str | None, assumed: Assumed
) -> Plan:
    """Raises UserError for a machine that is not known, a size that is none, and lengths beyond the configuration's."""
    if gpus > MOST_DEVICES:
        raise UserError(f"--gpus {gpus}: at most {MOST_DEVICES:,} are predicted")
    size = None if memory is None else machines.parse_bytes(memory)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or "1")
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) else max(1, usable_cores() // processes)
    rollouts = config.slow.problems_per_step * config.slow.group_size
    if rollouts > advice.MOST_ROLLOUTS:
        raise UserError(
            f"slow.problems_per_step={config.slow.problems_per_step} x slow.group_size={config.slow.group_size} are {rollouts:,} rollouts; a plan "
            f"plays through at most {advice.MOST_ROLLOUTS:,}"
        )
    here = machines.machine(machine or machines.found_here(), size, threads=threads)
    rollout = config.rollout
    prompt = (assumed.context or 0) + (assumed.problem or 0)
    if prompt > rollout.max_prompt_tokens or (assumed.context or 0) >= rollout.max_prompt_tokens:
        raise UserError(
            f"contexts of {assumed.context} and problems of {assumed.problem} tokens are more than rollout.max_prompt_tokens={rollout.max_prompt_tokens}"
        )
    if (assumed.response or 0) > rollout.max_response_tokens:
        raise UserError(
            f"--response-tokens {assumed.response} is more than rollout.max_response_tokens={rollout.max_response_tokens}"
        )
    config, shape = with_shape(config)
    return advice.plan(config, shape, here, gpus, assumed)


def dry_run_lines(config: Config, processes: int) -> Iterator[str]:
    """The memory on this machine, where the model's config.json is here: a dry run loads nothing from elsewhere."""
    yield ""
    if local_folder(config.model.path) is None:
        yield f"memory is not predicted: there is no config.json in model.path={config.model.path!r}; `fst plan` looks further"
        return
    rollouts = config.slow.problems_per_step * config.slow.group_size
    if rollouts > advice.MOST_ROLLOUTS:
        yield f"memory is not predicted: a step has {rollouts:,} rollouts, more than {advice.MOST_ROLLOUTS:,}"
        return
    plan = make_plan(config, gpus=processes, machine=None, memory=None, assumed=Assumed())
    yield f"predicted, not measured, on {plan.machine.name}; `fst plan` says more"
    yield from memory_lines(plan, advise=False)


def run(config: Config, args: argparse.Namespace) -> Iterator[str]:
    """The command: its output, line by line. Raises UserError."""
    assumed = Assumed(
        args.context_tokens,
        args.problem_tokens,
        args.response_tokens,
        SPREAD if args.spread is None else args.spread,
        0.005 if args.verify_ms is None else args.verify_ms / 1e3,
    )
    gpus = args.gpus or int(os.environ.get("WORLD_SIZE", "1"))
    plan = make_plan(config, gpus=gpus, machine=args.machine, memory=args.memory, assumed=assumed)
    if args.json:
        yield json.dumps(as_json(plan), indent=1)
    else:
        yield from lines(plan, scale=args.scale)


def lines(plan: Plan, *, scale: bool = False) -> Iterator[str]:
    """What the command prints."""
    yield from _about(plan)
    yield ""
    yield from memory_lines(plan, advise=True)
    yield ""
    yield from _time_lines(plan)
    yield ""
    yield from _stage_lines(plan)
    if plan.fits:
        yield from _gains(plan)
    if scale:
        yield ""
        yield from _scale_lines(plan)


def _about(plan: Plan) -> Iterator[str]:
    config, m, work = plan.config, plan.machine, plan.shares[0]
    what = f"{plan.processes} x {m.name}" if m.gpu else f"{plan.processes} process(es) on this CPU"
    yield f"predicted, not measured: {what}, {m.memory / GB:.1f} GB each"
    lora = config.policy.lora
    trained = "all" if lora is None else f"LoRA of rank {lora.rank}"
    yield (
        f"model: {plan.shape.model_type}, {plan.shape.parameters / 1e6:,.1f}M parameters, {trained} trained, {config.model.dtype}, "
        f"ZeRO-{config.policy.zero_stage}"
    )
    if plan.shape.assumption:
        yield f"assumed: {plan.shape.assumption}"
    mean = sum(int(w.responses.sum()) for w in plan.shares) / max(plan.rollouts, 1)
    most = longest(config, plan.assumed)
    yield (
        f"assumed: contexts of {work.context} tokens, problems of {work.problem}, responses of {mean:.0f} on average (spread of the logarithm "
        f"{plan.assumed.spread:g}), a verdict in {plan.assumed.verify_s * 1e3:g} ms; memory for prompts of {config.rollout.max_prompt_tokens} "
        f"and responses of {most.response}"
    )


def memory_lines(plan: Plan, *, advise: bool) -> Iterator[str]:
    """The memory of one process by phase, whether it fits, and, if not, what to change."""
    phases = plan.memory
    unit, size = ("MB", 10**6) if max(p.total for p in phases) < GB else ("GB", GB)
    names = list(dict.fromkeys(name for phase in phases for name in phase.items))
    rows = [[f"memory of one process, {unit}", *(phase.name for phase in phases)]]
    rows += [[name, *(_amount(phase.items.get(name), size) for phase in phases)] for name in names]
    rows.append(["total", *(_amount(phase.total, size) for phase in phases)])
    yield from table(rows)
    for name, there in phases[-1].host.items():
        yield f"{name} in CPU memory: {there / GB:.1f} GB for each process"
    peak = max(phases, key=lambda phase: phase.total)
    reserve = f" ({plan.machine.memory / GB:.1f} less {plan.machine.reserve / GB:.1f} for context and fragmentation)" if plan.machine.reserve else ""  # fmt: skip
    yield (
        f"{'fits' if plan.fits else 'does not fit'}: at most {peak.total / GB:.2f} GB ({peak.name}) of {plan.limit / GB:.1f}{reserve}"
    )
    if plan.fits or not advise:
        return
    found = advice.remedies(plan)
    for change, other in found[:SHOWN]:
        yield f"  fits with {_keys(change)}: {max(p.total for p in other.memory) / GB:.1f} GB, a step of {_s(other.step.seconds)}"
    if not found:
        fewest = advice.smallest_number(plan)
        if fewest is None:
            yield f"  no change of one or two keys and no number of devices up to {advice.SCALES[-1]} makes it fit"
        else:
            yield f"  no change of one or two keys makes it fit; {fewest[0]} devices do, with policy.zero_stage={fewest[1]}"


def _time_lines(plan: Plan) -> Iterator[str]:
    step = plan.step
    rows = [["a slow step", "seconds", "bound by", "TFLOP", "GB moved", "launches", "GB sent"]]
    for p in step.phases:
        c = p.cost
        flop = c.products + c.attention + c.attention_backward
        moved = c.product_bytes + c.stream
        rows.append([p.name, f"{p.seconds:.3g}", p.bound, f"{flop / 1e12:.3g}", f"{moved / 1e9:.3g}", f"{c.launches:,.0f}", f"{c.sent / 1e9:.3g}"])  # fmt: skip
    rows.append(["total", f"{step.seconds:.3g}", "", "", "", "", ""])
    yield from table(rows)
    sampled = sum(p.seconds for p in step.phases if p.name == "decode") or 1.0
    yield (
        f"{plan.rollouts / step.seconds:,.3g} rollouts/s; {step.response_tokens / sampled:,.0f} sampled tokens/s while decoding; "
        f"{(step.trained_tokens + step.response_tokens) / step.seconds:,.0f} tokens/s over the step"
    )
    if plan.processes > 1:
        idle = sum(not w.sequences for w in plan.shares)
        yield f"the average process waits {step.idle:.0%} of the sampling for the slowest one" + (
            f"; {idle} of {plan.processes} have no problem (slow.problems_per_step={plan.config.slow.problems_per_step})" if idle else ""
        )  # fmt: skip
    if plan.fast_phase_s:
        yield f"the fast phase adds {_s(plan.fast_phase_s)} per step, reflections and evaluations not counted"


def _stage_lines(plan: Plan) -> Iterator[str]:
    if plan.processes == 1:
        return
    best = advice.recommended_stage(plan)
    each = ", ".join(
        f"ZeRO-{p.config.policy.zero_stage} {max(x.total for x in p.memory) / GB:.1f} GB"
        + (f" {_s(p.step.seconds)}" if p.fits else " does not fit")
        for p in advice.stages(plan)
    )
    chosen = (
        "none fits" if best is None else f"recommended: policy.zero_stage={best.config.policy.zero_stage}"
    )
    yield f"{chosen} ({each})"


def _gains(plan: Plan) -> Iterator[str]:
    found = advice.improvements(plan)[:SHOWN]
    yield "what gains most:" if found else "no single key makes the step faster by one per cent"
    for change, other in found:
        yield f"  {_keys(change)}: {_s(other.step.seconds)}, {plan.step.seconds / other.step.seconds:.2f}x"


def _scale_lines(plan: Plan) -> Iterator[str]:
    rows = [["devices", "ZeRO", "GB", "seconds", "rollouts/s", "waits for the slowest"]]
    for count, p in advice.scales(plan):
        if p is None:
            rows.append([f"{count:,}", "does not fit", "", "", "", ""])
        else:
            peak = max(x.total for x in p.memory) / GB
            rows.append([f"{count:,}", str(p.config.policy.zero_stage), f"{peak:.1f}", f"{p.step.seconds:.3g}", f"{p.rollouts / p.step.seconds:.3g}", f"{p.step.idle:.0%}"])  # fmt: skip
    yield from table(rows)


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as numbers: bytes, seconds."""
    return {
        "predicted": True,
        "machine": plan.machine.name,
        "processes": plan.processes,
        "fits": plan.fits,
        "memory_bytes": {phase.name: {**phase.items, "total": phase.total} for phase in plan.memory},
        "seconds": {phase.name: phase.seconds for phase in plan.step.phases},
        "bound_by": {phase.name: phase.bound for phase in plan.step.phases},
        "step_seconds": plan.step.seconds,
    }


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns, the first aligned left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        yield "  ".join([first, *rest]).rstrip()


def _keys(change: Change) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()
    )


def _amount(size: int | None, unit: int) -> str:
    return "" if size is None else f"{size / unit:.2f}" if unit == GB else f"{size / unit:.1f}"


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s"
