"""A camera as the flow sees it: a source in a process of its own that is watched, and opened again when it is lost."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, TypeAlias

import msgspec

from torchship import process
from torchship_video import ring
from torchship_video.config import CameraConfig
from torchship_video.conversation import Conversation
from torchship_video.messages import Frame
from torchship_video.sources import is_live
from torchship_video.sources.decoding import SourceTask, SourceTold

_log = logging.getLogger("torchship.video")
CameraState: TypeAlias = Literal["opening", "live", "stalled", "reconnecting", "ended", "paused", "failed"]
OPENING, STALLED = 20.0, 10.0  # seconds without a frame after which a source is opened again
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
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
        self._talk: Conversation | None = None
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._rings, self._starts, self._ring = ring.new_name(), 0, ""  # their family, and the one of the last frame
        self._last, self._lost_before, self._at_end, self._fault = 0.0, 0, False, ""
        self._first = 0

    @property
    def pid(self) -> int | None:
        """The source's process, where one runs."""
        return self._talk.pid if self._talk is not None else None

    def pause(self) -> None:
        """Decode nothing until `resume`: a live source is let go, a file waits where it is."""
        self._resumed.clear()
        if self.state not in ("ended", "failed"):
            self.state, self.words = "paused", ""
        if self._live:
            if self._talk is not None:
                self._talk.ended.set()
        else:
            self._say(b"pause")

    def resume(self) -> None:
        """Go on."""
        if self.state == "paused":
            self.state = "opening" if self._live or self._talk is None else "live"
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
                talk = self._start()
                try:
                    await self._watch(talk)
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
            ring.discard_family(self._rings)

    def _start(self) -> Conversation:
        config, self._starts = self._config, self._starts + 1
        task = SourceTask(
            camera=config.name,
            source=config.source,
            wait=config.keeps == "wait",
            realtime=config.realtime,
            loop=config.loop,
            transport=config.transport,
            options=config.options,
            first=self._first,
            ring=f"{self._rings}.{self._starts}",
            slots=(config.queue if config.keeps == "oldest" else 1) + config.together + _SPARE,
        )
        self._talk = Conversation("torchship_video.sources.decoding:main", task, take=self._heard)
        self._at_end, self._fault, self._last, self._lost_before = False, "", time.monotonic(), self.lost
        if self.state != "reconnecting":
            self.state = "opening"
        return self._talk

    async def _watch(self, talk: Conversation) -> None:
        """Until the child is gone, or has sent nothing for too long."""
        while not talk.ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(talk.ended.wait(), 0.5)
            age = time.monotonic() - self._last
            if not self._live or not self._resumed.is_set():
                continue
            if self.state == "live" and age > STALLED / 4:
                self.state, self.words = "stalled", f"no frame for {age:.0f} s"
            if age > (STALLED if self.state in ("live", "stalled") else OPENING):
                self._fault = f"no frame for {age:.0f} s"
                return

    def _buried(self) -> None:
        talk, self._talk = self._talk, None
        if talk is not None and (code := talk.close()) and not self._at_end and not self._fault:
            self._fault = process.describe_exit(code)
        ring.discard_family(self._rings, spared=self._ring)

    def _heard(self, message: bytes) -> None:
        told = msgspec.msgpack.decode(message, type=SourceTold)
        self.lost = self._lost_before + told.lost
        if told.what == "failed":
            self._fault = told.words
        elif told.what == "broken":
            _log.warning("camera %s: %s", self._config.name, told.words)
        elif told.what == "end":
            self._at_end = not self._live
        elif told.frame is not None:
            self._last = time.monotonic()
            if self._resumed.is_set():
                self.state, self.words = "live", ""
            self.decoded += 1
            self._first = told.frame.sequence + 1
            self._ring = told.frame.ring
            self._on_frame(told.frame)
            self._say(b"taken")

    def _say(self, word: bytes) -> None:
        if self._talk is not None:
            with suppress(OSError):
                self._talk.send(word)
