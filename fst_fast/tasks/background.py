"""An event loop in a thread of its own, for what has to answer while its environment waits for the policy: connections, servers, programs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="environment", daemon=True).start()
    return loop


async def in_background(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that runs in the background loop, which is started at the first call."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, _loop()))
