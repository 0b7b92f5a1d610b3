"""SIGTERM, SIGINT and a file `stop` in the run folder stop a run in an orderly way: it finishes the step and saves. A second signal ends the
process at once.

The handler only sets a flag. The loop checks it between steps, collectively, because a signal does not reach all
processes at the same moment. After the first signal the default action is restored, so the second one also works inside a C library.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fst_fast import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_FILE = "stop"

_stop_requested = False


def stop_requested(run_dir: Path) -> bool:
    """Whether any process of the run has received a stop signal, or the run folder holds the stop file. All processes call it."""
    filed = distributed.rank() == 0 and (run_dir / STOP_FILE).is_file()
    return any(distributed.all_gather(_stop_requested or filed))


def remove_stop_file(run_dir: Path) -> bool:
    """Remove the stop file, so that a resumed run goes on; whether there was one. Every process may call it."""
    file = run_dir / STOP_FILE
    if distributed.rank() != 0 or not file.is_file():
        return False
    file.unlink(missing_ok=True)
    return True


def request_stop() -> None:
    """As if this process had received a stop signal: another one has."""
    global _stop_requested
    _stop_requested = True


@contextmanager
def stop_on_signals(*, announce: bool) -> Iterator[None]:
    """While open, a stop signal sets a flag instead of ending the process. Has no effect outside the main thread, where
    handlers cannot be set."""
    global _stop_requested
    _stop_requested = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _: FrameType | None) -> None:
        global _stop_requested
        _stop_requested = True
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if announce:  # unbuffered: Python's stream may be in use at this moment
            name = signal.Signals(number).name
            os.write(
                2,
                f"fst: {name}: finishing this step, then saving the run; send it again to stop now\n".encode(),
            )

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
