"""What tests of sinks need: frames in a ring, observations, receivers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from torchship_video.messages import Event, Frame, Observation, Track
from torchship_video.ring import RingWriter
from torchship_video.sinks.runner import SinkRunner

WIDTH, HEIGHT = 320, 240
CROSSED = (Event("in", "gate", 1, 7),)


def frame(sequence: int = 0, *, camera: str = "door", ring: str = "torchship-ring-none") -> Frame:
    """A handle of pixels that are nowhere."""
    return Frame(camera, ring, 0, 2, sequence, 1e9 + sequence / 10, sequence / 10, WIDTH, HEIGHT, "RGB")


def observed(sequence: int = 0, *, events: tuple[Event, ...] = (), at: Frame | None = None, **more: Any) -> Observation:
    """One confirmed track and one that is not."""
    tracks = (
        Track(1, (40.0, 60.0, 100.0, 200.0), 0.9, "person", True, identity=7),
        Track(2, (150.0, 60.0, 200.0, 200.0), 0.4, "person", False),
    )
    return Observation(at or frame(sequence, **more), tracks, events)


@contextmanager
def ring(*, slots: int = 4) -> Iterator[Callable[[int], Frame]]:
    """A ring, and what puts a frame of one brightness into it."""
    writer = RingWriter.make(size=WIDTH * HEIGHT * 3, slots=slots)

    def publish(sequence: int) -> Frame:
        slot = writer.claim()
        assert slot is not None
        slot.pixels(WIDTH, HEIGHT, "RGB")[:] = np.uint8(40)
        return slot.publish("door", sequence=sequence, position=sequence / 10)

    try:
        yield publish
    finally:
        writer.close()


@asynccontextmanager
async def running(runner: SinkRunner) -> AsyncIterator[SinkRunner]:
    """The sink while it runs; it is ended in the end as an application does it."""
    task = asyncio.ensure_future(runner.run())
    await asyncio.sleep(0)  # a task that never began has nothing to end
    try:
        yield runner
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def until(true: Callable[[], bool], *, seconds: float = 30.0) -> None:
    """Wait for something that comes soon."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.02)


class Receiver:
    """A server that takes POSTs: `answers` are the statuses to give, 200 when there are none left."""

    def __init__(self, port: int = 0) -> None:
        self.answers: list[int] = []
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.tries = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.tries += 1
                status = outer.answers.pop(0) if outer.answers else 200
                if status == 200:
                    outer.taken.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Be down."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
