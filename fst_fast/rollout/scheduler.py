"""Assigns sequences to decode slots. Pure arithmetic, no torch.

Sequences are admitted in depth-first order of the prompt tree, so that concurrent sequences share as much as possible
and a node can be freed soon after its last sequence. A finished sequence leaves its slot idle. Slots are refilled in
bulk, because every change rebuilds the decode work list: once an eighth of the slots is idle, or, with an empty queue,
the batch is shrunk once a quarter is idle. At most that share of a step is wasted on idle slots.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Slots:
    """At most `slots` of the sequences in `order` at a time.

    sequence: [slots], the sequence in each slot; an idle slot keeps its last one, -1 before the first. live: [slots],
    whether the slot is being decoded. limit: how many there can be. regrow: what is dropped while
    others wait can be filled again later. width: up to how many slots are; after sequences were put back as many as
    are left, so that the next ones find room, and one more with every refill."""

    def __init__(self, order: Ints, slots: int, *, regrow: bool = False) -> None:
        self.order = order
        self.next = 0  # order[next:] is the queue; what is put back stands in `order` once more
        self.limit, self.regrow = min(slots, len(order)), regrow
        self.width = self.limit
        self.sequence = np.full(self.limit, -1, dtype=np.int64)
        self.live = np.zeros(self.limit, dtype=bool)

    def should_refill(self) -> bool:
        idle = len(self.live) - int(self.live.sum())
        share = 8 if self.next < len(self.order) else 4
        return idle > 0 and share * idle >= len(self.live)

    def put_back(self, slots: Ints) -> None:
        """The sequences of these slots wait again, before all others and in their order; the slots are idle."""
        again = self.sequence[slots]
        place = [int(np.flatnonzero(self.order == sequence)[0]) for sequence in again]
        self.order = np.insert(self.order, self.next, again[np.argsort(place)])
        self.live[slots] = False
        self.width = int(self.live.sum())

    def refill(self, ready: Callable[[int], bool | None]) -> tuple[Ints, Ints]:
        """Fill idle slots from the queue, and dropped ones up to the width, and drop the rest, so that every slot is live.

        ready(sequence) is called for the head of the queue. True: it takes a slot. False: it needs no decoding (it
        ended with its first token). None: there is no memory for it now, so it waits and the remaining idle slots are
        dropped. Returns (stay, fresh): the old indices of the remaining slots in their new order, and the new indices
        of the refilled ones."""
        dropped = max(self.width - len(self.live), 0)
        sequences = np.append(self.sequence, np.full(dropped, -1))
        live = np.append(self.live, np.zeros(dropped, dtype=bool))
        admitted: list[int] = []
        idle = np.flatnonzero(~live)
        while len(admitted) < len(idle) and self.next < len(self.order):
            sequence = int(self.order[self.next])
            goes_on = ready(sequence)
            if goes_on is None:
                break
            self.next += 1
            if goes_on:
                admitted.append(sequence)
        filled = idle[: len(admitted)]
        sequences[filled] = admitted
        live[filled] = True
        stay = np.flatnonzero(live)
        self.sequence, self.live = sequences[stay], live[stay]
        if not self.regrow or self.next == len(self.order):
            self.limit = len(stay)
        self.width = min(self.width + 1, self.limit)
        return stay, np.searchsorted(stay, filled)
