"""A sink as the flow sees it: a bounded queue in front of a process that may be slow, hang or die without any harm."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Literal, TypeAlias

import msgspec

from torchship import process
from torchship_video.conversation import Conversation
from torchship_video.messages import LARGEST, Observation
from torchship_video.sinks import QUEUE, QUEUE_OF_PIXELS, Opening, SinkConfig, kind_of
from torchship_video.sinks.child import Done, SinkTask
from torchship_video.zones import LineConfig, ZoneConfig

_log = logging.getLogger("torchship.video")
IN_FLIGHT = 4  # observations that the child holds at once
PATIENCE = 30.0  # seconds that one observation may take before the child is taken for hung
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two starts
GRACE = 5.0  # seconds that a sink has to finish when the application ends
OnOutput: TypeAlias = Callable[[str, bytes], None]
State: TypeAlias = Literal["starting", "running", "restarting", "ended"]


class SinkStatus(msgspec.Struct, frozen=True):
    """How a sink is doing.

    `written` counts the observations that it took, `dropped` those that its queue had no room for, `stale` those whose
    pixels were gone, `lost` those that it held when it died. `facts` are counts of its own. `words` say what was wrong.
    """

    name: str
    kind: str
    state: State
    words: str = ""
    written: int = 0
    dropped: int = 0
    stale: int = 0
    lost: int = 0
    restarts: int = 0
    queued: int = 0
    facts: dict[str, int] = {}


class SinkRunner:
    """One sink, its queue and its process. All methods belong to the event loop's thread."""

    def __init__(
        self,
        config: SinkConfig,
        *,
        zones: Collection[ZoneConfig] = (),
        lines: Collection[LineConfig] = (),
        on_output: OnOutput | None = None,
    ) -> None:
        """`on_output(camera, bytes)` takes what the sink gives back. Raises BadConfig for options that do not fit."""
        module, _ = kind_of(config)
        self.config, self.pixels = config, bool(module.PIXELS)
        self._again, self._on_output = bool(module.AGAIN), on_output
        self._zones, self._lines = tuple(zones), tuple(lines)
        self._room = config.queue or (QUEUE_OF_PIXELS if self.pixels else QUEUE)
        self._queue: deque[tuple[Observation, int]] = deque()
        self._flying: deque[tuple[Observation, int]] = deque()
        self._offered = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()  # each until so many are done with
        self._talk: Conversation | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._state: State = "starting"
        self._words, self._facts = "", dict[str, int]()
        self._counts = dict.fromkeys(("written", "dropped", "stale", "lost", "restarts"), 0)
        self._heard = 0.0

    @property
    def pid(self) -> int | None:
        """The sink's process, where one runs."""
        return self._talk.pid if self._talk is not None else None

    def offer(self, observation: Observation) -> None:
        """Queue one observation; never waits, never raises. A full queue drops its oldest and counts it."""
        if self._state == "ended" or self.config.camera not in ("", observation.frame.camera):
            return
        if len(self._queue) >= self._room:
            self._queue.popleft()
            self._counts["dropped"] += 1
        self._queue.append((observation, 0))
        self._offered += 1
        self._idle.clear()
        self._pump()

    async def taken(self, camera: str, seconds: float = PATIENCE) -> None:
        """Wait until it has taken what was offered so far, for so long at most; where it needs no pixels, only until
        half of its queue is free.

        A file that need not hurry waits so for its films. A sink that is dead is not waited for.
        """
        wanted = self._offered - (0 if self.pixels else self._room // 2)
        if self.config.camera not in ("", camera) or self._done >= wanted or not self._alive:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append((wanted, waiter))
        with suppress(TimeoutError):
            await asyncio.wait_for(waiter, seconds)

    @property
    def _alive(self) -> bool:
        return self._state in ("starting", "running")

    @property
    def _done(self) -> int:
        """How many observations of those that were offered are done with, in whatever way; they are in order."""
        return self._offered - len(self._queue) - len(self._flying)

    async def settled(self, seconds: float = GRACE) -> bool:
        """Wait until all that was offered is written, for so long at most; whether it is."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()

    def status(self) -> SinkStatus:
        """How it is doing now."""
        name = self.config.name or self.config.kind
        queued = len(self._queue) + len(self._flying)
        return SinkStatus(
            name, self.config.kind, self._state, self._words, queued=queued, facts=self._facts, **self._counts
        )

    async def run(self) -> None:
        """Keep the sink's process going until cancelled; then let it write what waits, for a few seconds, and close."""
        pause = FIRST_PAUSE
        try:
            while True:
                began = time.monotonic()
                try:
                    await self._live(self._start())
                finally:
                    self._buried()
                pause = FIRST_PAUSE if time.monotonic() - began > LONGEST_PAUSE else min(pause * 2, LONGEST_PAUSE)
                self._state = "restarting"
                self._rest()
                self._counts["restarts"] += 1
                _log.warning("sink %s %s; it starts again in about %.1f s", self.status().name, self._words, pause / 2)
                await asyncio.sleep(pause * random.uniform(0.25, 0.75))  # noqa: S311
        finally:
            self._state = "ended"
            self._rest()

    def _start(self) -> Conversation:
        opening = Opening(restarts=self._counts["restarts"], zones=self._zones, lines=self._lines)
        task = SinkTask(self.config, opening)
        self._heard = time.monotonic()
        self._talk = Conversation("torchship_video.sinks.child:main", task, take=self._take, quiet=self._pump)
        return self._talk

    async def _live(self, talk: Conversation) -> None:
        """Until the child is gone or hung; when cancelled, until it has finished or its grace is over."""
        try:
            while not talk.ended.is_set():
                with suppress(TimeoutError):
                    await asyncio.wait_for(talk.ended.wait(), 1.0)
                if self._flying and time.monotonic() - self._heard > PATIENCE:
                    self._words = f"did not answer for {PATIENCE:.0f} s"
                    return
        except asyncio.CancelledError:
            await self._either(self._idle, talk.ended)
            if not talk.ended.is_set():
                talk.finish()
                await self._either(talk.ended)
            raise

    @staticmethod
    async def _either(*events: asyncio.Event) -> None:
        """Wait until one of the events is set, for the grace at most."""
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, timeout=GRACE, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _buried(self) -> None:
        """The child is gone, or is to go: take back what it held."""
        talk, self._talk = self._talk, None
        if talk is not None:
            code = talk.close()
            self._words = self._words or process.describe_exit(code)
        for observation, deaths in reversed(self._flying):
            if self._again and deaths == 0 and len(self._queue) < self._room:
                self._queue.appendleft((observation, 1))
            else:
                self._counts["lost"] += 1
        self._flying.clear()
        self._rest()

    def _pump(self) -> None:
        """Send what waits, as far as the child may hold it."""
        while self._talk is not None and self._queue and len(self._flying) < IN_FLIGHT:
            data = msgspec.msgpack.encode(self._queue[0][0])
            try:
                if len(data) > LARGEST:
                    raise OSError("larger than any message")
                self._talk.send(data)
            except BlockingIOError:
                break  # its answers make room
            except ConnectionError:
                break  # its end is heard soon
            except OSError:  # too large for the socket
                self._queue.popleft()
                self._counts["dropped"] += 1
                continue
            if not self._flying:
                self._heard = time.monotonic()
            self._flying.append(self._queue.popleft())
        self._rest()

    def _rest(self) -> None:
        """Tell those who wait what is done with."""
        for wanted, waiter in tuple(self._waiters):
            if waiter.done() or self._done >= wanted or not self._alive:
                self._waiters.remove((wanted, waiter))
                if not waiter.done():
                    waiter.set_result(None)
        if not self._queue and not self._flying:
            self._idle.set()

    def _take(self, message: bytes) -> None:
        done = msgspec.msgpack.decode(message, type=Done)
        self._heard = time.monotonic()
        if done.what == "failed":
            self._words = done.words
            return
        if done.what == "opened":
            self._state, self._words = "running", ""
            return
        self._facts = done.facts
        if done.what == "facts":
            return
        if self._flying:
            self._flying.popleft()
        self._counts[done.what] += 1
        if done.output and self._on_output is not None:
            self._on_output(done.camera, done.output)
