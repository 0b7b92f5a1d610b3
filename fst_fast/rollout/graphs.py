"""A decode step as a CUDA graph: its kernels are launched by one call instead of one each from Python (rollout.cuda_graphs).

A graph repeats what it recorded on the very tensors that it recorded, so a step's inputs are copied into tensors that stay: token ids and positions here, lengths
and rows in the plan (cascade.py). Slots and work lists change when sequences come and go; a graph serves from then until the next change, and is recorded once the
new slots have made a few steps, which also compile and choose whatever is compiled and chosen at first use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fst_kernels.checks import look_at_values

EAGER_STEPS = 3  # after every change of slots, before recording: recording costs about one step

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Record what a function does: (repeat it, the tensor that it then writes its result to)."""


class CudaCapture:
    """Recordings that take turns in one pool of memory."""

    def __init__(self) -> None:
        self._memory: Any = None

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            out = run()
        return graph.replay, out


class StepGraph:
    """Runs decode steps, recorded where that is worth it. capture: makes a recording."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = CudaCapture() if capture is None else capture
        self._work: Any = None  # of the plan at hand
        self._steps = 0  # of it
        self._replay: Callable[[], None] | None = None
        self._ids = self._positions = self._logits = torch.empty(0)
        self.recorded = self.replayed = 0  # ever

    def run(self, forward: Any, ids: Tensor, positions: Tensor, plan: Any) -> Tensor:
        """Logits [S, V] of the step that plan.step has set; they hold until the next call. ids, positions [S]."""
        if plan.work is not self._work:
            self._work, self._steps, self._replay = plan.work, 0, None
        self._steps += 1
        if self._steps <= EAGER_STEPS or look_at_values(ids.device):  # looking waits for the device
            logits: Tensor = forward(ids, positions, plan, None)
            return logits
        if self._replay is None:
            self._ids, self._positions = ids.clone(), positions.clone()
            self._replay, self._logits = self._capture(
                lambda: forward(self._ids, self._positions, plan, None)
            )
            self.recorded += 1
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._replay()
        self.replayed += 1
        return self._logits

    def forget(self) -> None:
        """Give back the recording's memory."""
        self._work, self._replay, self._logits = None, None, torch.empty(0)
