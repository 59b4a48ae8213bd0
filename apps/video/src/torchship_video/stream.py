"""One camera's way through the flow: which frames are looked at, several at a time, and their tracks in order.

offer -> waiting (by policy) -> detect, `in_flight` at once -> track, one after the other -> observation
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import msgspec
import numpy as np

from torchship.errors import BadInput, Busy, StageFailed, TorchshipError, Unavailable
from torchship.serve.routes import Service
from torchship.stage import Value
from torchship.tensors import Tensors
from torchship_video import ring
from torchship_video.config import CameraConfig
from torchship_video.messages import Frame, Observation, Track, encode
from torchship_video.motion import MotionGate, Region

_log = logging.getLogger("torchship.video")
_AGES = 1024  # frames that p50 and p99 are of
_RECENT = 64  # frames that the rate is of
_TRIES, _PATIENCE = 3, 60.0  # of a frame that must not be lost: faults of a stage, and seconds without a worker
_T = TypeVar("_T")
_NOTHING: Tensors = {
    "boxes": np.empty((0, 4), np.float32),
    "scores": np.empty(0, np.float32),
    "labels": np.empty(0, np.object_),
}
_tracks = msgspec.msgpack.Decoder(list[Track])
_Pending: TypeAlias = tuple[Frame, asyncio.Task[Tensors] | None]


async def nobody_waits(camera: str) -> None:
    """What a camera awaits whose observations go to nobody who might be slow."""


class StreamMeter:
    """What is counted of one camera. Drops by reason: full (of the policy), stale, failed, removed."""

    def __init__(self) -> None:
        self.offered = self.frames = self.looked = self.restarts = self.tracks = 0
        self.drops: Counter[str] = Counter()
        self._ages: deque[float] = deque(maxlen=_AGES)
        self._done: deque[float] = deque(maxlen=_RECENT)

    def done(self, frame: Frame) -> None:
        """An observation is there."""
        self.frames += 1
        self._ages.append(time.time() - frame.taken)
        self._done.append(time.monotonic())

    @property
    def fps(self) -> float:
        """Observations a second of late."""
        if len(self._done) < 2:
            return 0.0
        return (len(self._done) - 1) / max(1e-6, max(time.monotonic(), self._done[-1]) - self._done[0])

    def age(self, share: float) -> float:
        """Seconds from a frame to its observation: the quantile."""
        return float(np.quantile(self._ages, share)) if self._ages else 0.0


class CameraStream:
    """The frames of one camera. All methods belong to the event loop's thread."""

    def __init__(
        self,
        config: CameraConfig,
        service: Service,
        *,
        on_observation: Callable[[Observation], None],
        on_restarted: Callable[[str], None] = lambda _: None,
        taken: Callable[[str], Awaitable[None]] = nobody_waits,
        score: float = 0.1,
        lines: tuple[str, str] = ("detect", "track"),
    ) -> None:
        """`lines` are the names of the models that detect and track; `score` is the least that a box must have. Where
        the policy is `wait`, `taken(camera)` is awaited after each observation, and the frame is held until then."""
        self.config, self.meter, self.fault = config, StreamMeter(), ""
        self._service, self._score, (self._detect, self._track) = service, score, lines
        self._on_observation, self._on_restarted, self._taken = on_observation, on_restarted, taken
        self._region = Region(config.region)
        self._gate = MotionGate(config.motion, hold=config.motion_hold, region=self._region) if config.motion else None
        self._waiting: deque[Frame] = deque()
        self._pending: deque[_Pending] = deque()
        self._leaving: set[asyncio.Task[None]] = set()  # their observations are there, and not yet taken
        self._news = asyncio.Event()
        self._room = asyncio.Semaphore(config.together)
        self._counted = 0
        self._sequence, self._first, self._next, self._started = 0, 1, 1, False
        self._still, self._before = 0.0, 0.0  # seconds without motion, which the tracker is not told of
        self._closed = False

    def offer(self, frame: Frame) -> None:
        """Take the next frame; it is held in its ring until its observation is there, or dropped by the policy."""
        self.meter.offered += 1
        if self._closed:
            return
        try:
            ring.hold(frame)
        except TorchshipError:
            self.meter.drops["stale"] += 1
            return
        keep = {"oldest": self.config.queue, "latest": 1}.get(self.config.keeps, 0)
        while keep and len(self._waiting) >= keep:
            ring.release(self._waiting.popleft())
            self.meter.drops["full"] += 1
        self._waiting.append(frame)
        self._news.set()

    @property
    def idle(self) -> bool:
        """Whether every frame that was offered has its observation, and nobody needs one any more."""
        return not (self._waiting or self._pending or self._leaving)

    async def run(self) -> None:
        """Analyse frames until cancelled; then let all of them go."""
        finishing = asyncio.ensure_future(self._finish())
        try:
            while True:
                await self._room.acquire()
                while not self._waiting:
                    self._news.clear()
                    await self._news.wait()
                frame = self._waiting.popleft()
                looked = self._wanted(frame)
                found = asyncio.ensure_future(self._look(frame)) if looked else None
                self._pending.append((frame, found))
                self._news.set()
                if finishing.done():
                    finishing.result()
        finally:
            self._closed = True
            finishing.cancel()
            await asyncio.gather(finishing, return_exceptions=True)
            await self._leave()

    def _wanted(self, frame: Frame) -> bool:
        """Whether the detector is to look at a frame."""
        self._counted += 1
        seconds, self._before = frame.position - self._before, frame.position
        if (self._counted - 1) % self.config.every:
            return False
        if self._gate is None:
            return True
        try:
            with ring.read(frame) as pixels:
                if self._gate.moves(pixels, frame, frame.position):
                    return True
        except TorchshipError:
            return True  # its line says what is wrong
        self._still += max(0.0, seconds)
        return False

    async def _look(self, frame: Frame) -> Tensors:
        handle = np.array([[encode(frame)]], np.object_)
        values: dict[str, Value] = {"score_threshold": self._score}
        return await self._kept(lambda: self._service.infer(self._detect, {"frame": handle}, parameters=values))

    async def _kept(self, ask: Callable[[], Awaitable[_T]]) -> _T:
        """What a line answers. Where the policy is `wait` it is asked again when its worker is lost or not there."""
        end, failed = time.monotonic() + _PATIENCE, 0
        while True:
            try:
                return await ask()
            except (StageFailed, Unavailable, Busy) as fault:
                failed += isinstance(fault, StageFailed)
                if self.config.keeps != "wait" or failed >= _TRIES or time.monotonic() > end or _is_stale(fault):
                    raise
                await asyncio.sleep(max(0.1, getattr(fault, "retry_after", 0.0)))

    async def _finish(self) -> None:
        """The tracks of the frames in their order."""
        while True:
            while not self._pending:
                self._news.clear()
                await self._news.wait()
            frame, task = self._pending[0]
            try:
                await self._finish_one(frame, task)
            except TorchshipError as fault:
                self._failed(fault)
            finally:
                self._pending.popleft()
                leaving = asyncio.ensure_future(self._let_go(frame))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)

    async def _let_go(self, frame: Frame) -> None:
        """Release a frame, and make room for the next: where the policy is to wait, when it is taken."""
        try:
            if self.config.keeps == "wait":
                await self._taken(self.config.name)
        finally:
            ring.release(frame)
            self._room.release()

    async def _finish_one(self, frame: Frame, task: asyncio.Task[Tensors] | None) -> None:
        found = _NOTHING
        if task is not None:
            self.meter.looked += 1
            found = await task
            if not self._region.all:
                inside = self._region.stands(found["boxes"], frame)
                found = {name: found[name][inside] for name in ("boxes", "scores", "labels")}
        tracks = await self._kept(lambda: self._tracked(frame, found, looked=task is not None))
        self.fault = ""
        self.meter.tracks = sum(track.confirmed for track in tracks)
        self.meter.done(frame)
        self._on_observation(Observation(frame, tuple(tracks)))

    async def _tracked(self, frame: Frame, found: Tensors, *, looked: bool) -> list[Track]:
        """The tracks on a frame. Where the tracker was lost, a new one goes on with numbers that were not used."""
        seconds = frame.position - self._still
        state = np.array([msgspec.msgpack.encode((seconds, looked))], np.object_)
        inputs = {name: found[name] for name in ("boxes", "scores", "labels")} | {"state": state}
        start = not self._started
        if start:
            self._sequence, self._first = self._sequence + 1, self._next
        values: dict[str, Value] = {"sequence_id": self._id, "sequence_start": start, "first": self._first}
        try:
            answer = await self._service.infer(self._track, inputs, parameters=values)
        except TorchshipError as fault:
            if self._started:
                self._started = False
                self.meter.restarts += 1
                self._on_restarted(self.config.name)
                if isinstance(fault, BadInput):  # a worker that died between two frames took the sequence with it
                    raise Unavailable(f"the tracker was lost: {fault}") from fault
            raise
        self._started = True
        tracks = _tracks.decode(answer["tracks"][0])
        self._next = max(self._next, *(track.number + 1 for track in tracks), 0)
        return tracks

    @property
    def _id(self) -> str:
        return f"{self.config.name}/{self._sequence}"

    def _failed(self, fault: TorchshipError) -> None:
        self.meter.drops["stale" if _is_stale(fault) else "failed"] += 1
        if fault.line != self.fault:
            self.fault = fault.line
            _log.warning("camera %s: %s", self.config.name, fault.line)

    async def _leave(self) -> None:
        """Let all frames go, and tell the tracker that the camera is gone."""
        tasks: list[asyncio.Task[Any]] = [task for _, task in self._pending if task is not None]
        tasks += self._leaving
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for frame in (*self._waiting, *(frame for frame, _ in self._pending)):
            ring.release(frame)
            self.meter.drops["removed"] += 1
        self._waiting.clear()
        self._pending.clear()


def _is_stale(fault: TorchshipError) -> bool:
    """Whether the frame is gone, told by whatever process noticed."""
    return "StaleFrame" in str(fault) or "was overwritten" in str(fault)
