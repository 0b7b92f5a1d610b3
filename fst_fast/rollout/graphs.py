"""Decode steps as CUDA graphs: one launch per step instead of one per kernel (rollout.cuda_graphs).

A graph replays the recorded kernels on the recorded tensors, so a step's inputs are copied into fixed buffers: token
ids and positions here, lengths and rows in the plan (cascade.py). Slots and work lists change when sequences start or
finish. A graph is valid until the next change, and is recorded after an eager step, which also makes the work list's
tables; with a number of slots that has not been met, after a few, which compile kernels and choose backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fst_kernels.checks import look_at_values

EAGER_STEPS = 3  # with a new number of slots, before recording, which costs about one step
EAGER_STEPS_AGAIN = 1  # after a change of slots to a number that has been recorded before

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Record a function; returns (replay, the tensor that a replay writes its result to)."""


class CudaCapture:
    """Recordings that share one memory pool, one at a time."""

    def __init__(self) -> None:
        self._memory: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            out = run()
        return graph.replay, out


class StepGraph:
    """Runs decode steps, from a recorded graph if possible. capture: makes a recording."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = CudaCapture() if capture is None else capture
        self._work: Any = None  # the work list that the recording is for
        self._steps = 0  # with this work list
        self._met: set[int] = set()  # numbers of slots that were recorded
        self._replay: Callable[[], None] | None = None
        self._ids = self._positions = self._logits = torch.empty(0)
        self.recorded = self.replayed = 0  # counts since creation

    def run(self, forward: Any, ids: Tensor, positions: Tensor, plan: Any) -> Tensor:
        """Logits [S, V] of the step that plan.step has prepared, valid until the next call. ids, positions [S]."""
        if plan.work is not self._work:
            self._work, self._steps, self._replay = plan.work, 0, None
        self._steps += 1
        # checking values synchronises with the device
        eager = EAGER_STEPS_AGAIN if len(ids) in self._met else EAGER_STEPS
        if (self._replay is None and self._steps <= eager) or look_at_values(ids.device):
            logits: Tensor = forward(ids, positions, plan, None)
            return logits
        if self._replay is None:
            self._ids, self._positions = ids.clone(), positions.clone()
            self._replay, self._logits = self._capture(
                lambda: forward(self._ids, self._positions, plan, None)
            )
            self.recorded += 1
            self._met.add(len(ids))
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._replay()
        self.replayed += 1
        return self._logits

    def forget(self) -> None:
        """Free the recording's memory."""
        self._work, self._replay, self._logits = None, None, torch.empty(0)
