"""Callbacks: a user's code that watches a run. `fst_fast.train(..., callbacks=[MyCallback()])`.

Every process of a run calls every callback with the same events, in the order in which things happen; `event.is_main` is true on one of
them. A callback sees, it does not steer: events are read-only and what a method returns is ignored. A callback that raises ends the run
with an error that names it; the last checkpoint stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fst_fast.contracts import Context
from fst_fast.errors import UserError


@dataclass(frozen=True)
class Event:
    """run_dir: folder of the run. step: optimiser steps done (method=gepa: position in the data). is_main: whether this is rank 0."""

    run_dir: Path
    step: int
    is_main: bool


@dataclass(frozen=True)
class RunStart(Event):
    """config: the resolved configuration as a plain tree. resumed: whether the run continues from a checkpoint."""

    config: Mapping[str, Any]
    resumed: bool


@dataclass(frozen=True)
class RunEnd(Event):
    """summary: what summary.json holds; None where a signal stopped the run before its last step."""

    summary: Mapping[str, Any] | None


@dataclass(frozen=True)
class CycleStart(Event):
    """A fast phase begins. population: the contexts that it starts from."""

    cycle: int
    population: Sequence[Context]


@dataclass(frozen=True)
class CycleEnd(Event):
    """A fast phase has ended. record: its line of metrics.jsonl."""

    cycle: int
    population: Sequence[Context]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Proposal(Event):
    """The reflector has answered. context: the proposed child, None where the reply was refused; refused: the reason, "" if it was not."""

    cycle: int
    parent: Context
    context: Context | None
    refused: str


@dataclass(frozen=True)
class Admission(Event):
    """A child has been compared with the context that it comes from, of those that may be kept, or was left unfinished: then with its parent. mean,
    parent_mean: over the judged rollouts of this phase, None where there is none."""

    cycle: int
    context: Context
    parent: Context
    admitted: bool
    mean: float | None
    parent_mean: float | None


@dataclass(frozen=True)
class Step(Event):
    """An optimiser step has been taken, or left out. record, timing: its lines of metrics.jsonl and timing.jsonl."""

    record: Mapping[str, Any]
    timing: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation(Event):
    """The cells have been measured. record: the line of metrics.jsonl."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint is on the disk, whole. path: its folder."""

    path: Path


class Callback:
    """Override the methods of the events that you want to see."""

    def on_run_start(self, event: RunStart) -> None: ...
    def on_run_end(self, event: RunEnd) -> None: ...
    def on_cycle_start(self, event: CycleStart) -> None: ...
    def on_cycle_end(self, event: CycleEnd) -> None: ...
    def on_proposal(self, event: Proposal) -> None: ...
    def on_admission(self, event: Admission) -> None: ...
    def on_step(self, event: Step) -> None: ...
    def on_evaluation(self, event: Evaluation) -> None: ...
    def on_checkpoint(self, event: CheckpointWritten) -> None: ...


METHODS: dict[type[Event], str] = {
    RunStart: "on_run_start",
    RunEnd: "on_run_end",
    CycleStart: "on_cycle_start",
    CycleEnd: "on_cycle_end",
    Proposal: "on_proposal",
    Admission: "on_admission",
    Step: "on_step",
    Evaluation: "on_evaluation",
    CheckpointWritten: "on_checkpoint",
}


class Callbacks:
    """Sends events to callbacks, in the order in which these were given. Raises UserError at once for an object that is no Callback."""

    def __init__(self, callbacks: Sequence[Callback], run_dir: Path, *, is_main: bool) -> None:
        for callback in callbacks:
            if not isinstance(callback, Callback):
                raise UserError(
                    f"callbacks: {callback!r} is a {type(callback).__name__}; it must be an object of a subclass of fst_fast.Callback"
                )
        self._callbacks, self._run_dir, self._is_main = list(callbacks), run_dir, is_main

    def send(self, kind: type[Event], *, step: int, **fields: Any) -> None:
        """Make the event and pass it to every callback. Raises UserError, naming the callback, where one raises."""
        if not self._callbacks:
            return
        event = kind(run_dir=self._run_dir, step=step, is_main=self._is_main, **fields)
        for callback in self._callbacks:
            try:
                getattr(callback, METHODS[kind])(event)
            except Exception as error:
                name = f"{type(callback).__name__}.{METHODS[kind]}"
                raise UserError(
                    f"the callback {name} raised {type(error).__name__}: {error} (step {step}); the run stops, its last checkpoint stays"
                ) from error
