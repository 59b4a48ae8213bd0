"""What the tests of cameras share: a flow that only looks at frames, and waiting for what comes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from torchship_video import pixels, ring
from torchship_video.messages import Frame


class Taken:
    """What a flow does: hold each frame, look at it, let it go a little later."""

    def __init__(self, *, seconds: float = 0.002) -> None:
        self.frames: list[Frame] = []
        self.means: list[float] = []
        self._seconds = seconds

    def __call__(self, frame: Frame) -> None:
        ring.hold(frame)
        self.frames.append(frame)
        asyncio.get_running_loop().call_later(self._seconds, self._look, frame)

    def _look(self, frame: Frame) -> None:
        with ring.read(frame) as data:
            self.means.append(float(pixels.to_rgb(data, frame).mean()))
        ring.release(frame)

    @property
    def numbers(self) -> list[int]:
        return [frame.sequence for frame in self.frames]


def go(work: Coroutine[Any, Any, None]) -> None:
    before = rings()
    asyncio.run(asyncio.wait_for(work, 120))
    left, end = rings() - before, time.monotonic() + 60
    while left & rings() and time.monotonic() < end:  # those of tests beside this one go with them
        time.sleep(0.05)
    assert not left & rings()  # the memory is back


def rings() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("torchship-ring-")}


async def until(true: Callable[[], bool], *, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.01)


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
