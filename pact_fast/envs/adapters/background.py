"""Coroutines of foreign code, run from the threads of the agent loop on one event loop of the process."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """A loop that runs in a daemon thread until the process ends: clients and sessions belong to the loop they began on."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="environments", daemon=True).start()
    return loop


def run(coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """The result of a coroutine. TimeoutError after `timeout` seconds; the coroutine is cancelled then."""

    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, timeout)

    return asyncio.run_coroutine_threadsafe(bounded(), event_loop()).result()
