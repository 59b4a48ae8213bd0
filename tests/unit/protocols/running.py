"""The real Service with six small models, in a loop of its own: what the protocols and blocking clients are tested on.

Its workers are started once for all tests of a process; each test file opens listeners of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from tests.serving import Background
from torchship.artifact import Store
from torchship.serve.api.front import Front
from torchship.serve.catalog import Catalog
from torchship.serve.config import ModelConfig
from torchship.serve.http.listen import Listener
from torchship.serve.http.pool import ReceiverPool
from torchship.serve.service import Answer, Service
from torchship.wire.messages import Request, Response

T = TypeVar("T")
MODELS = ("add_sub", "again", "echo", "half", "picture", "text")
STREAMS = "again"  # the one that answers several times


class WatchedService(Service):
    """The Service, which remembers its requests; a test may make it slow, or let every request fail."""

    def __init__(self) -> None:
        super().__init__(Catalog(store=Store()), control=True)
        self.seen: list[Request] = []
        self.fault: Exception | None = None
        self.delay = 0.0
        self.cancelled = 0

    async def open(self) -> WatchedService:
        """Start the workers."""
        run = "tests.unit.protocols.stages:"
        models = [ModelConfig(name=name, run=run + name, queue_rows=2**20) for name in MODELS]
        await asyncio.gather(*map(self.catalog.load, models))
        return self

    def start(self, request: Request, answer: Answer, whom: Any) -> Any:
        self.catalog.line(request.model, request.version)
        if not self.delay and self.fault is None:
            self.seen.append(request)
            return super().start(request, answer, whom)
        self.seen.append(request)
        return _Later(self, lambda: self._end(request, answer, whom))

    def _end(self, request: Request, answer: Answer, whom: Any) -> None:
        if self.fault is not None:
            answer(whom, request, self.fault)
        else:
            super().start(request, answer, whom)

    async def stream(self, request: Request) -> AsyncGenerator[Response, None]:
        async for response in super().stream(request):
            yield response
        if self.fault is not None:
            raise self.fault


class _Later:
    """A request that begins after a while, unless its caller leaves first."""

    gone: Any = None

    def __init__(self, service: WatchedService, begin: Callable[[], None]) -> None:
        self._service = service
        self._timer = asyncio.get_running_loop().call_later(service.delay, begin)

    def cancel(self) -> None:
        if self._timer.when() > asyncio.get_running_loop().time():
            self._service.cancelled += 1
        self._timer.cancel()


@lru_cache(maxsize=1)
def backend() -> tuple[Background, WatchedService]:
    """The loop and the service, started at the first call. tests/conftest.py closes them."""
    background = Background()

    async def opened() -> WatchedService:
        return await WatchedService().open()

    return background, background.run(opened())


_pools: list[ReceiverPool] = []
WAYS = ("here", "receivers")  # where a listener's connections are run


async def receivers(way: str) -> ReceiverPool | None:
    """Two receivers, started once for all tests; None where connections are run here."""
    if way == "receivers" and not _pools:
        _pools.append(await ReceiverPool(2).open())
    return _pools[0] if way == "receivers" else None


def close() -> None:
    """Stop the workers and the loop, if they were ever started."""
    if backend.cache_info().currsize:
        background, service = backend()

        async def closed() -> None:
            await service.catalog.close()
            for pool in _pools:
                await pool.close()
            await asyncio.get_running_loop().shutdown_default_executor()

        background.run(closed())
        background.close()


@dataclass
class Running:
    """A listener, its service, and the loop they live in."""

    service: WatchedService
    background: Background
    listener: Listener
    port: int

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the server's loop."""
        return self.background.run(work, timeout=20)


def run(work: Callable[[WatchedService], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in the loop of the service."""
    background, service = backend()
    return background.run(work(service))


@contextmanager
def running(listen: Callable[[Front], Coroutine[Any, Any, Listener]]) -> Iterator[Running]:
    """Listen until the block ends."""
    background, service = backend()
    listener = background.run(listen(Front(service)))
    try:
        yield Running(service, background, listener, listener.port)
    finally:
        service.fault, service.delay = None, 0.0
        background.run(listener.close(grace=1))
