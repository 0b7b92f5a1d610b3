"""What passes between those who sample ahead and those who train (rollout.ahead): batches one way, weights the other, each in order, neither waiting for the other.

    RankLink      samplers are processes of their own: through the host's memory and gloo
    ThreadLink    servers sample, and a thread of rank 0 asks them (rollout.backend=vllm): through queues

The first trainer (rank 0) speaks for the trainers. After each step it sends the weights with the number of steps done and whether the samplers pause: then
all processes meet, for an evaluation, a checkpoint, a fast phase or the end.
"""

from __future__ import annotations

import contextlib
import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fst_fast import distributed
from fst_fast.distributed import Split, as_bytes, as_tensor
from fst_fast.policy.trained import GATHER_BUCKET, checksum


class Order(NamedTuple):
    """What comes with weights. step: optimiser steps behind them."""

    step: int
    pause: bool


class Link(Protocol):
    """names: of the weights that training changes. copy: the samplers' model, on processes that have one."""

    names: Sequence[str]
    copy: nn.Module | None
    samples: bool
    """Whether this process samples and does not train."""

    def put(self, message: Any) -> None:
        """[first sampler] Send a batch, or the error that ended the sampling."""

    def take(self) -> Any:
        """[rank 0] The next message of the samplers."""

    def send(self, model: nn.Module, order: Order) -> None:
        """[rank 0] Send the weights as they are now."""

    def receive(self) -> Order:
        """[samplers] Wait for the next weights and load them into `copy`."""

    def sampling(self, sample: Callable[[], Any]) -> contextlib.AbstractContextManager[None]:
        """[trainers] While open, `sample` goes on where no process of its own does it."""


def pack(model: nn.Module, names: Sequence[str], device: torch.device | None = None) -> list[Tensor]:
    """Copies of the named weights, joined to buckets of one dtype each. device: where to; None: where they are."""
    return [
        torch.cat([weight.detach().reshape(-1) for weight in bucket]).to(device or bucket[0].device)
        for bucket in _buckets(model, names)
    ]


@torch.no_grad()
def unpack(buckets: Sequence[Tensor], model: nn.Module, names: Sequence[str]) -> None:
    """Copy what `pack` made of another model into the named weights of this one."""
    for packed, bucket in zip(buckets, _buckets(model, names), strict=True):
        for weight, values in zip(bucket, torch.split(packed, [w.numel() for w in bucket]), strict=True):
            weight.copy_(values.view_as(weight))


def _buckets(model: nn.Module, names: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    weights = dict(model.named_parameters())
    bucket: list[nn.Parameter] = []
    for name in names:
        weight = weights[name]
        full = sum(w.numel() for w in bucket) + weight.numel() > GATHER_BUCKET
        if bucket and (full or weight.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


class RankLink:
    """See `Link`. Sends return at once: what is under way is kept until it has arrived. At most rollout.ahead versions are."""

    def __init__(self, split: Split, names: Sequence[str], copy: nn.Module | None) -> None:
        self.names, self.copy, self.samples = names, copy, split.samples
        self._group = split.link
        self._under_way: list[tuple[Any, Tensor]] = []

    def put(self, message: Any) -> None:
        if self._group.rank() == 1:
            data = as_tensor(pickle.dumps(message))
            for tensor in (torch.tensor([len(data)]), data):
                self._keep(self._group.send([tensor], 0, 0), tensor)
            if isinstance(message, Exception):  # this process ends: not before it has arrived
                with contextlib.suppress(RuntimeError):
                    for work, _ in self._under_way:
                        work.wait()

    def take(self) -> Any:
        size = torch.zeros(1, dtype=torch.int64)
        self._group.recv([size], 1, 0).wait()
        data = torch.empty(int(size), dtype=torch.uint8)
        self._group.recv([data], 1, 0).wait()
        return pickle.loads(as_bytes(data))

    def send(self, model: nn.Module, order: Order) -> None:
        if self._group is None:
            return
        said = torch.tensor([order.step, order.pause, checksum(model)], dtype=torch.float64)
        for tensor in (said, *pack(model, self.names, torch.device("cpu"))):
            self._keep(self._group.broadcast(tensor, 0), tensor)

    def receive(self) -> Order:
        assert self.copy is not None
        said = self._received(torch.zeros(3, dtype=torch.float64)).tolist()
        unpack(
            [
                self._received(torch.empty(sum(w.numel() for w in bucket), dtype=bucket[0].dtype))
                for bucket in _buckets(self.copy, self.names)
            ],
            self.copy,
            self.names,
        )
        if (own := checksum(self.copy)) != said[2]:
            raise RuntimeError(
                f"the sampler holds other weights than the trainer sent; checksums: {own}, {said[2]}"
            )
        return Order(int(said[0]), bool(said[1]))

    def _received(self, tensor: Tensor) -> Tensor:
        self._group.broadcast(tensor, 0).wait()
        return tensor

    def _keep(self, work: Any, tensor: Tensor) -> None:
        self._under_way = [pair for pair in self._under_way if not pair[0].is_completed()] + [(work, tensor)]

    @contextmanager
    def sampling(self, sample: Callable[[], Any]) -> Iterator[None]:
        yield


class _Closed(Exception):
    """The trainer has ended first."""


class ThreadLink:
    """See `Link`. A version that the thread has not taken yet is held as a copy on the trainer's device."""

    def __init__(self, names: Sequence[str], copy: nn.Module | None) -> None:
        self.names, self.copy, self.samples = names, copy, False
        self._batches: queue.Queue[Any] = queue.Queue()
        self._weights: queue.Queue[tuple[Order, list[Tensor]] | None] = queue.Queue()

    def put(self, message: Any) -> None:
        self._batches.put(message)

    def take(self) -> Any:
        return self._batches.get()

    def send(self, model: nn.Module, order: Order) -> None:
        if self.copy is not None:
            self._weights.put((order, pack(model, self.names)))

    def receive(self) -> Order:
        assert self.copy is not None
        if (sent := self._weights.get()) is None:
            raise _Closed
        unpack(sent[1], self.copy, self.names)
        return sent[0]

    @contextmanager
    def sampling(self, sample: Callable[[], Any]) -> Iterator[None]:
        if self.copy is None:
            yield
            return

        def run() -> None:
            try:
                with distributed.alone():
                    sample()
            except _Closed:
                pass
            except BaseException as error:  # noqa: BLE001  # the trainer raises it
                self.put(error)

        thread = threading.Thread(target=run, name="samples ahead", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._weights.put(None)
            raise
        thread.join()
