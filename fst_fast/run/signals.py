"""SIGTERM and SIGINT end a run in order: the step is finished, the run saved. A second one ends the process at once.

The handler only notes the signal; the loop asks between steps, and all processes together, since a signal does not reach them at the same
moment. From the first signal on the system's own action is back in place: the second works inside a C library too.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fst_fast import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_asked = False


def stop_requested() -> bool:
    """Whether a signal has told any process of the run to stop. All processes call it."""
    return any(distributed.all_gather(_asked))


@contextmanager
def stop_on_signals(*, speak: bool) -> Iterator[None]:
    """While open, a signal is noted instead of ending the process. Only the main thread can listen; elsewhere nothing changes."""
    global _asked
    _asked = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _: FrameType | None) -> None:
        global _asked
        _asked = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if speak:  # past Python's buffers, which may be in use at this moment
            name = signal.Signals(number).name
            os.write(
                2, f"fst: {name}: this step is finished, then the run saved; once more ends it now\n".encode()
            )

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
