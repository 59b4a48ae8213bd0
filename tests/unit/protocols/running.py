"""A server with the fake service in a thread of its own, so that blocking clients can be tested against it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.unit.protocols.fake import FakeService

T = TypeVar("T")


@dataclass
class Running:
    """A listener, its service, and the loop they live in."""

    service: FakeService
    loop: asyncio.AbstractEventLoop
    listener: Any
    port: int

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the server's loop."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(20)


@contextmanager
def running(listen: Callable[[FakeService], Coroutine[Any, Any, Any]]) -> Iterator[Running]:
    """Listen in a thread until the block ends."""
    service = FakeService()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        listener = asyncio.run_coroutine_threadsafe(listen(service), loop).result(20)
        yield Running(service, loop, listener, listener.port)
        asyncio.run_coroutine_threadsafe(listener.close(grace=1), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
