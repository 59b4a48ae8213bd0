"""A camera as the flow sees it: a source in a process of its own that is watched, and opened again when it is lost."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import msgspec

from torchship import process
from torchship_video import ring
from torchship_video.config import CameraConfig
from torchship_video.messages import Frame
from torchship_video.sources.decoding import SourceTask, SourceTold, is_live

CameraState: TypeAlias = Literal["opening", "live", "stalled", "reconnecting", "ended", "paused", "failed"]
OPENING, STALLED = 20.0, 10.0  # seconds without a frame after which a source is opened again
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
_LARGEST = 1 << 16
_SPARE = 8  # slots of the ring beside those that the flow holds: for the embedder, for sinks, and to decode into


class Camera:
    """One camera. `on_frame` is called with every frame, which the decoder holds in the ring until it returns; it
    decodes into slots that nobody holds. All methods belong to the event loop's thread."""

    def __init__(self, config: CameraConfig, *, on_frame: Callable[[Frame], None]) -> None:
        self._config, self._on_frame = config, on_frame
        self.state: CameraState = "opening"
        self.words = ""
        self.decoded = self.lost = self.reconnects = 0
        self._live = is_live(config.source)
        self._child: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._ended, self._resumed = asyncio.Event(), asyncio.Event()
        self._resumed.set()
        self._rings: list[str] = []
        self._last, self._lost_before, self._at_end, self._fault = 0.0, 0, False, ""
        self._first = 0

    @property
    def pid(self) -> int | None:
        """The source's process, where one runs."""
        return self._child.pid if self._child is not None else None

    def pause(self) -> None:
        """Decode nothing until `resume`: a live source is let go, a file waits where it is."""
        self._resumed.clear()
        if self.state not in ("ended", "failed"):
            self.state, self.words = "paused", ""
        if self._live:
            self._ended.set()
        else:
            self._say(b"pause")

    def resume(self) -> None:
        """Go on."""
        if self.state == "paused":
            self.state = "opening" if self._live or self._child is None else "live"
            self._last = time.monotonic()
        self._resumed.set()
        self._say(b"resume")

    async def run(self) -> None:
        """Keep frames coming until cancelled; the ring is kept until then as well, since sinks may be late."""
        pause = FIRST_PAUSE
        try:
            while True:
                await self._resumed.wait()
                before = self.decoded
                self._start()
                try:
                    await self._watch()
                finally:
                    self._buried()
                if not self._live and (self._at_end or not self._fault.startswith(("killed", "exited"))):
                    self.state, self.words = ("ended", "") if self._at_end else ("failed", self._fault)
                    await asyncio.Event().wait()
                if not self._resumed.is_set():
                    continue
                pause = FIRST_PAUSE if self.decoded > before + 100 else min(pause * 2, LONGEST_PAUSE)
                wait = pause * random.uniform(0.5, 1.0)  # noqa: S311
                self.reconnects += 1
                self.state = "reconnecting"
                self.words = f"{self._fault or 'the connection was lost'}; again in {wait:.1f} s"
                await asyncio.sleep(wait)
        finally:
            for name in self._rings:
                ring.discard(name)

    def _start(self) -> None:
        config = self._config
        task = SourceTask(
            camera=config.name,
            source=config.source,
            wait=config.keeps == "wait",
            realtime=config.realtime,
            loop=config.loop,
            transport=config.transport,
            options=config.options,
            first=self._first,
            slots=(config.queue if config.keeps == "oldest" else 1) + config.together + _SPARE,
        )
        given: Any = msgspec.to_builtins(task)
        self._child, self._sock = process.converse("torchship_video.sources.decoding:main", argument=given, threads=1)
        self._sock.setblocking(False)
        self._ended.clear()
        self._at_end, self._fault, self._last, self._lost_before = False, "", time.monotonic(), self.lost
        if self.state != "reconnecting":
            self.state = "opening"
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._hear)

    async def _watch(self) -> None:
        """Until the child is gone, or has sent nothing for too long."""
        while not self._ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 0.5)
            age = time.monotonic() - self._last
            if not self._live or not self._resumed.is_set():
                continue
            if self.state == "live" and age > STALLED / 4:
                self.state, self.words = "stalled", f"no frame for {age:.0f} s"
            if age > (STALLED if self.state in ("live", "stalled") else OPENING):
                self._fault = f"no frame for {age:.0f} s"
                return

    def _buried(self) -> None:
        sock, self._sock = self._sock, None
        child, self._child = self._child, None
        if sock is not None:
            asyncio.get_running_loop().remove_reader(sock.fileno())
            sock.close()
        if child is not None:
            process.stop(child)
            code = child.wait()
            if not self._at_end and not self._fault and code:
                self._fault = process.describe_exit(code)
        while len(self._rings) > 1:
            ring.discard(self._rings.pop(0))

    def _hear(self) -> None:
        assert self._sock is not None  # noqa: S101
        try:
            while data := _received(self._sock):
                self._take(msgspec.msgpack.decode(data, type=SourceTold))
        except BlockingIOError:
            return
        except (OSError, msgspec.DecodeError):
            pass
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._ended.set()

    def _take(self, told: SourceTold) -> None:
        self.lost = self._lost_before + told.lost
        if told.what == "failed":
            self._fault = told.words
        elif told.what == "end":
            self._at_end = not self._live
        elif told.frame is not None:
            self._last = time.monotonic()
            if self._resumed.is_set():
                self.state, self.words = "live", ""
            self.decoded += 1
            self._first = told.frame.sequence + 1
            if told.frame.ring not in self._rings:
                self._rings.append(told.frame.ring)
            self._on_frame(told.frame)
            self._say(b"taken")

    def _say(self, word: bytes) -> None:
        if self._sock is not None:
            with suppress(OSError):
                self._sock.send(word)


def _received(sock: socket.socket) -> bytes:
    """The next message. A peer that ended with something unread is told once as a reset, before what it has sent."""
    try:
        return sock.recv(_LARGEST)
    except ConnectionResetError:
        return sock.recv(_LARGEST)
