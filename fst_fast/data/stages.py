"""Stages: the tasks of a run, one after the other. A run with one task has one stage.

A change of task changes the data stream and nothing else (arXiv 2605.12484, Algorithm 1): weights, optimiser and contexts go on. The step
number decides the stage, so nothing else has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fst_fast.config import Config, StageConfig
from fst_fast.contracts import Problem, Task
from fst_fast.data.stream import minibatch, spare_problems
from fst_fast.errors import UserError
from fst_fast.tasks.mixture import Mixture


@dataclass(frozen=True)
class Stage:
    """Steps `first` to `end` of the run are taken on this task; from `distils_from` on they are distillation."""

    number: int
    task: str
    first: int
    end: int
    distils_from: int
    train: Sequence[Problem]
    validation: list[Problem]

    def distils(self, step: int) -> bool:
        """Whether the step after `step` is one of distillation."""
        return step >= self.distils_from

    def local_step(self, step: int) -> int:
        """Steps done in this stage: the cursor in its data."""
        return step - self.first


def make_stages(config: Config, task: Task) -> list[Stage]:
    """The stages of a run whose task is `task`, as `task_spec` says."""
    stages: list[Stage] = []
    for i, stage in enumerate(config.stages or [StageConfig(task=config.task, steps=config.slow.steps)]):
        first = stages[-1].end if stages else 0
        end = first + stage.steps
        train, validation = (_split(config, task, i, name) for name in ("train", "validation"))
        distils_from = end - config.slow.distill_steps
        stages.append(Stage(i, stage.task, first, end, distils_from, train, list(validation)))
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage in which the step after `step` lies; after the last step the last one."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


def stage_problems(config: Config, task: Task, stage: Stage, split: str) -> list[Problem]:
    """The problems of a split of a stage's task. Raises UserError where it has none."""
    problems = list(_split(config, task, stage.number, split))
    if not problems:
        raise UserError(f"--split {split} of task {stage.task} has no problems")
    return problems


def _split(config: Config, task: Task, stage: int, split: str) -> Sequence[Problem]:
    if not config.stages:
        return task.problems(split)
    assert isinstance(task, Mixture)
    return task.part(stage, split)


def step_problems(config: Config, stage: Stage, step: int) -> tuple[list[Problem], Iterator[Problem]]:
    """The problems of a step, and those that dynamic sampling may add, in their order."""
    local = stage.local_step(step)
    problems = minibatch(stage.train, local, config.slow.problems_per_step, config.seed)
    return problems, spare_problems(stage.train, local, problems, config.seed)
