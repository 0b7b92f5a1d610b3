"""Whether a configuration fits a machine and how long its step takes; what to change so that it fits, and what gains most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from fst_fast.config import Config
from fst_fast.config.derived import phases_once
from fst_fast.plan.machines import Machine
from fst_fast.plan.memory import Phase, Setting, memory
from fst_fast.plan.shapes import Shape
from fst_fast.plan.times import StepTime, step_time, verifiers
from fst_fast.plan.workload import Assumed, Work, longest, works

Change = Mapping[str, Any]  # dotted key -> value
# of the free memory that the rollout engine takes for keys and values
DEVICE_FRACTION, HOST_FRACTION = 0.9, 0.5
MOST_ROLLOUTS = 200_000
LIGER_TYPES = ("llama", "qwen2", "qwen3")
SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Plan:
    """What is predicted of one configuration on `processes` devices of one machine. room: bytes for keys and values."""

    config: Config
    shape: Shape
    machine: Machine
    processes: int
    assumed: Assumed
    shares: list[Work]
    memory: list[Phase]
    room: int

    @cached_property
    def step(self) -> StepTime:
        return step_time(
            self.setting, self.shares, self.machine, room=self.room, verify_s=self.assumed.verify_s
        )

    @property
    def setting(self) -> Setting:
        return Setting(self.shape, self.config, self.processes, self.machine.gpu)

    @property
    def limit(self) -> int:
        """Bytes that a process may use."""
        return self.machine.memory - self.machine.reserve

    @property
    def fits(self) -> bool:
        return all(phase.total <= self.limit for phase in self.memory)

    @property
    def rollouts(self) -> int:
        return sum(work.sequences for work in self.shares)

    @property
    def fast_phase_s(self) -> float:
        """Sampling and verdicts of a fast phase, per slow step: as many rollouts as the budget allows, each as dear as one of a slow step."""
        fast, steps = self.config.fast, max(self.config.slow.steps, 1)
        if self.config.method == "rl" or fast.evolver == "e_spl" or not self.rollouts:
            return 0.0
        phases = 1 / fast.cycle_steps if fast.phases == "alternate" else phases_once(self.config) / steps
        sampled = sum(p.seconds for p in self.step.phases if p.name in ("prefill", "decode", "verify"))
        return sampled * fast.rollout_budget / self.rollouts * phases

    def changed(self, change: Change, processes: int | None = None) -> Plan | None:
        """The plan with other keys; None where the configuration does not allow them."""
        try:
            config = with_keys(self.config, change)
        except ValidationError:
            return None
        return plan(config, self.shape, self.machine, processes or self.processes, self.assumed)


def plan(config: Config, shape: Shape, machine: Machine, processes: int, assumed: Assumed) -> Plan:
    """Predict memory and time of a slow step."""
    setting = Setting(shape, config, processes, machine.gpu)
    shares = works(config, assumed, processes)
    largest = max(works(config, longest(config, assumed), processes), key=lambda work: work.problems)
    phases = memory(setting, largest)
    wanted = phases[0].items.get("keys and values", 0)
    free = machine.memory - machine.reserve - (phases[0].total - wanted)
    room = int(max(free, 0) * (DEVICE_FRACTION if machine.gpu else HOST_FRACTION))
    if config.rollout.kv_memory_bytes is not None:
        room = config.rollout.kv_memory_bytes
    one = setting.element * shape.kv_elements() * (largest.prompt + largest.longest)
    if wanted:
        phases[0].items["keys and values"] = min(wanted, max(room, one))
    return Plan(config, shape, machine, processes, assumed, shares, phases, room)


def with_keys(config: Config, change: Change) -> Config:
    """The configuration with these dotted keys; pydantic's ValidationError where it is impossible."""
    tree = config.model_dump(exclude_unset=True)
    for key, value in change.items():
        section, _, name = key.partition(".")
        tree[section] = {**tree.get(section, {}), name: value}
    return Config.model_validate(tree)


def stages(here: Plan) -> list[Plan]:
    """The same run under every ZeRO stage that it may have."""
    found = (here.changed({"policy.zero_stage": stage}) for stage in range(4))
    return [p for p in found if p is not None]


def recommended_stage(here: Plan) -> Plan | None:
    """The smallest of the stages that fit and take at most 1 % more time than the fastest; None where none fits."""
    fitting = [p for p in stages(here) if p.fits]
    fastest = min((p.step.seconds for p in fitting), default=0.0)
    return next((p for p in fitting if p.step.seconds <= 1.01 * fastest), None)


def remedies(here: Plan) -> list[tuple[Change, Plan]]:
    """Changes that make a plan fit, those first that cost the least time; each alone, and pairs only where no single one is enough."""
    single = list(_savings(here))
    for changes in (
        single,
        [{**a, **b} for i, a in enumerate(single) for b in single[i + 1 :] if not {*a} & {*b}],
    ):
        tried = [(change, here.changed(change)) for change in changes]
        fitting = [(change, p) for change, p in tried if p is not None and p.fits]
        if fitting:
            return sorted(fitting, key=lambda pair: pair[1].step.seconds)
    return []


def _savings(here: Plan) -> Iterator[Change]:
    config = here.config
    sequence = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    for stage in range(config.policy.zero_stage + 1, 4):
        if here.processes > 1:
            yield {"policy.zero_stage": stage}
    if not config.policy.activation_checkpointing:
        yield {"policy.activation_checkpointing": True}
    tokens = config.slow.tokens_per_micro_batch // 2
    while tokens >= sequence:
        yield {"slow.tokens_per_micro_batch": tokens}
        tokens //= 2
    if config.model.dtype == "float32" and here.machine.gpu:
        yield {"model.dtype": "bfloat16"}
    if config.slow.head_chunk_rows > 256:
        yield {"slow.head_chunk_rows": 256}
    if not config.policy.offload_optimizer:
        yield {"policy.zero_stage": max(config.policy.zero_stage, 1), "policy.offload_optimizer": True}
    if config.policy.lora is None:
        yield {"policy.lora": {}}


def smallest_number(here: Plan) -> tuple[int, int] | None:
    """(processes, ZeRO stage): the fewest processes on which the run fits under any stage."""
    for processes in SCALES:
        for stage in range(4):
            p = here.changed({"policy.zero_stage": stage}, processes)
            if p is not None and p.fits:
                return processes, stage
    return None


def improvements(here: Plan) -> list[tuple[Change, Plan]]:
    """Changes that fit and shorten a step, the largest gain first. None changes what is computed beyond rounding."""
    tried = ((change, here.changed(change)) for change in _tunings(here))
    faster = [
        (change, p)
        for change, p in tried
        if p is not None and p.fits and p.step.seconds < 0.99 * here.step.seconds
    ]
    best: dict[str, tuple[Change, Plan]] = {}  # of each key the best value
    for change, p in sorted(faster, key=lambda pair: pair[1].step.seconds):
        best.setdefault(next(iter(change)), (change, p))
    return list(best.values())


def _tunings(here: Plan) -> Iterator[Change]:
    config, gpu = here.config, here.machine.gpu
    if here.processes > 1:
        for stage in range(4):
            if stage != config.policy.zero_stage and (stage or not config.policy.offload_optimizer):
                yield {"policy.zero_stage": stage}
    if gpu and not here.setting.graphs:
        yield {"rollout.cuda_graphs": True}
    if gpu and not config.policy.liger and here.shape.model_type in LIGER_TYPES:
        yield {"policy.liger": True}
    if gpu and config.model.dtype == "float32":
        yield {"model.dtype": "bfloat16"}
    if config.policy.activation_checkpointing:
        yield {"policy.activation_checkpointing": False}
    if config.policy.offload_optimizer:
        yield {"policy.offload_optimizer": False}
    for times in (2, 4, 8):
        yield {"slow.tokens_per_micro_batch": times * config.slow.tokens_per_micro_batch}
        if config.rollout.max_batch < max(w.sequences for w in here.shares):
            yield {"rollout.max_batch": times * config.rollout.max_batch}
        yield {"verify.workers": times * verifiers(here.setting)}


def scales(here: Plan) -> list[tuple[int, Plan | None]]:
    """For every number of devices the plan with the recommended ZeRO stage; None where no stage fits."""
    out = []
    for processes in SCALES:
        p = here.changed({}, processes)
        out.append((processes, recommended_stage(p) if p else None))
    return out
