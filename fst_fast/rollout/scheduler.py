"""Which sequence is decoded in which slot: arithmetic on numbers, no torch.

Sequences are admitted in the depth-first order of the prompt tree, so those that run together share as much as they can and a node is
forgotten soon after its last sequence. A sequence that ends leaves its slot idle. Slots change hands in bulk, because each change rebuilds
the decode work list: once an eighth of them is idle they are refilled, and when nobody waits any more the batch is cut to the live ones
once a quarter is idle. The price: that share of a step is at most computed for nobody.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class Slots:
    """At most `slots` of the sequences in `order` at a time.

    who: [slots], the sequence in each slot; an idle slot keeps its last one, -1 before the first. live: [slots], is it being decoded?
    """

    def __init__(self, order: Ints, slots: int) -> None:
        self.order = order
        self.next = 0  # order[next:] wait
        self.sequence = np.full(min(slots, len(order)), -1, dtype=np.int64)
        self.live = np.zeros(len(self.sequence), dtype=bool)

    def should_refill(self) -> bool:
        idle = len(self.live) - int(self.live.sum())
        share = 8 if self.next < len(self.order) else 4
        return idle > 0 and share * idle >= len(self.live)

    def refill(self, ready: Callable[[int], bool | None]) -> tuple[Ints, Ints]:
        """Fill the idle slots from the queue and drop those for which nobody waits: afterwards every slot is live.

        ready(sequence): called for the first of the queue; True: it takes the slot, False: it needs no decoding (it ended with its first
        token), None: there is no room for it now; it waits and the slots that are still idle are dropped. Returns (stay, fresh): the old numbers of the remaining slots in their new order; the new numbers of the refilled ones.
        """
        admitted: list[int] = []
        idle = np.flatnonzero(~self.live)
        while len(admitted) < len(idle) and self.next < len(self.order):
            sequence = int(self.order[self.next])
            goes_on = ready(sequence)
            if goes_on is None:
                break
            self.next += 1
            if goes_on:
                admitted.append(sequence)
        filled = idle[: len(admitted)]
        self.sequence[filled] = admitted
        self.live[filled] = True
        stay = np.flatnonzero(self.live)
        self.sequence, self.live = self.sequence[stay], self.live[stay]
        return stay, np.searchsorted(stay, filled)
