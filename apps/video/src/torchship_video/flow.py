"""The flow: many cameras, each a source and a stream, joined at the engine's lines; any may come, change, go or die.

Batches across cameras form on the lines by themselves, since every stream asks on its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import msgspec

from torchship.errors import BadInput, NotFound
from torchship.serve.routes import Metric, Service
from torchship_video.config import CameraConfig
from torchship_video.messages import CameraStatus, Frame, Observation
from torchship_video.stream import CameraStream, nobody_waits
from torchship_video.zones import LineConfig, ZoneConfig, Zones

_log = logging.getLogger("torchship.video")
_MOST = 256  # cameras
State: TypeAlias = Literal["opening", "live", "stalled", "reconnecting", "ended", "paused", "failed"]
OnFrame: TypeAlias = Callable[[Frame], None]


class Feed(Protocol):
    """Where a camera's frames come from: `run` gives them to the callback that it was made with until cancelled; its
    state is told in words too. A frame is in its ring until the callback returns, and as long as it is held there."""

    state: State
    words: str

    async def run(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...


OpenFeed: TypeAlias = Callable[[CameraConfig, OnFrame], Feed]


@dataclass
class WatchedCamera:
    """A camera that is watched."""

    config: CameraConfig
    feed: Feed
    stream: CameraStream
    zones: Zones
    tasks: tuple[asyncio.Task[None], ...] = ()


class Flow:
    """All cameras. All methods belong to the event loop's thread."""

    def __init__(
        self,
        service: Service,
        open_feed: OpenFeed,
        *,
        zones: Sequence[ZoneConfig] = (),
        lines: Sequence[LineConfig] = (),
        score: float = 0.1,
        recognize: Callable[[Observation], Observation] = lambda observation: observation,
        on_restarted: Callable[[str], None] = lambda _: None,
        taken: Callable[[str], Awaitable[None]] = nobody_waits,
    ) -> None:
        """`recognize` gives tracks their identities; `on_restarted(camera)` is told when its tracks began anew. A
        camera with the policy `wait` awaits `taken(camera)` after each observation before it lets the frame go."""
        self._service, self._open_feed, self._score = service, open_feed, score
        self._zones, self._lines = tuple(zones), tuple(lines)
        self._recognize, self._on_restarted, self._taken = recognize, on_restarted, taken
        self._subscribers: list[Callable[[Observation], None]] = []
        self.cameras: dict[str, WatchedCamera] = {}
        self._running = False

    def subscribe(self, callback: Callable[[Observation], None]) -> None:
        """Call `callback` with every observation. It must not wait; a fault of it is logged."""
        self._subscribers.append(callback)

    def add(self, config: CameraConfig) -> None:
        """Watch one more camera. Raises BadInput where its name is taken, or there are too many."""
        if config.name in self.cameras:
            raise BadInput(f"camera {config.name!r} is there already", hint="change it, or take another name")
        if len(self.cameras) >= _MOST:
            raise BadInput(f"there are {_MOST} cameras already", hint="remove some")
        stream = CameraStream(
            config,
            self._service,
            on_observation=self._observed,
            on_restarted=self._restarted,
            taken=self._taken,
            score=self._score,
        )
        feed = self._open_feed(config, stream.offer)
        zones = Zones(self._zones, self._lines, camera=config.name)
        camera = WatchedCamera(config, feed, stream, zones)
        self.cameras[config.name] = camera
        if config.paused:
            camera.feed.pause()
        if self._running:
            self._start(camera)

    async def remove(self, name: str) -> None:
        """Watch a camera no more. Raises NotFound."""
        camera = self.camera(name)
        del self.cameras[name]
        await self._stop(camera)

    async def change(self, config: CameraConfig) -> None:
        """Watch a camera another way: its stream begins anew. Raises NotFound."""
        before = self.camera(config.name)
        if before.config == config:
            return
        if msgspec.structs.replace(before.config, paused=config.paused) == config:
            self.pause(config.name, paused=config.paused)
            return
        await self.remove(config.name)
        self.add(config)

    def pause(self, name: str, *, paused: bool) -> None:
        """Stop or go on decoding a camera. Raises NotFound."""
        camera = self.camera(name)
        camera.config = msgspec.structs.replace(camera.config, paused=paused)
        if paused:
            camera.feed.pause()
        else:
            camera.feed.resume()

    def camera(self, name: str) -> WatchedCamera:
        """The camera of that name. Raises NotFound."""
        if name not in self.cameras:
            raise NotFound(f"no camera {name[:80]!r}", hint=f"there is {', '.join(self.cameras) or 'none'}")
        return self.cameras[name]

    async def run(self) -> None:
        """Watch all cameras until cancelled."""
        self._running = True
        try:
            for camera in self.cameras.values():
                self._start(camera)
            await asyncio.Event().wait()
        finally:
            self._running = False
            await asyncio.gather(*(self._stop(camera) for camera in self.cameras.values()))

    @property
    def over(self) -> bool:
        """Whether every camera is at its end and all that it gave is analysed."""
        return all(one.feed.state in ("ended", "failed") and one.stream.idle for one in self.cameras.values())

    def status(self) -> list[CameraStatus]:
        """How each camera is doing."""
        return [self._status(camera) for camera in self.cameras.values()]

    def metrics(self) -> list[Metric]:
        """The same for Prometheus."""
        found = []
        for name, camera in self.cameras.items():
            meter, labels = camera.stream.meter, (("camera", name),)
            counted = (
                ("torchship_video_frames_total", "Frames analysed", meter.frames),
                ("torchship_video_detected_total", "Frames that the detector looked at", meter.looked),
                ("torchship_video_tracker_restarts_total", "Times that tracks began anew", meter.restarts),
            )
            found += [Metric(key, about, value, labels, "counter") for key, about, value in counted]
            for reason in ("full", "stale", "failed", "removed"):
                drops = (*labels, ("reason", reason))
                words = "Frames decoded and not analysed"
                found.append(Metric("torchship_video_dropped_total", words, meter.drops[reason], drops, "counter"))
            for share in (0.5, 0.99):
                ages = (*labels, ("quantile", f"{share:g}"))
                words = "From the decoded frame to its observation"
                found.append(Metric("torchship_video_frame_age_seconds", words, meter.age(share), ages))
            found.append(Metric("torchship_video_tracks", "Confirmed tracks now", meter.tracks, labels))
            live = float(camera.feed.state == "live")
            found.append(Metric("torchship_video_camera_live", "Whether frames come", live, labels))
        return found

    def _status(self, camera: WatchedCamera) -> CameraStatus:
        meter = camera.stream.meter
        return CameraStatus(
            camera=camera.config.name,
            state=camera.feed.state,
            words=camera.feed.words or camera.stream.fault,
            fps=meter.fps,
            age_p50_ms=1e3 * meter.age(0.5),
            age_p99_ms=1e3 * meter.age(0.99),
            frames=meter.frames,
            drops=sum(meter.drops.values()),
            tracks=meter.tracks,
        )

    def _start(self, camera: WatchedCamera) -> None:
        work = (camera.feed.run(), camera.stream.run())
        camera.tasks = tuple(asyncio.ensure_future(_guarded(camera, one)) for one in work)

    async def _stop(self, camera: WatchedCamera) -> None:
        for task in camera.tasks:
            task.cancel()
        await asyncio.gather(*camera.tasks, return_exceptions=True)

    def _restarted(self, camera: str) -> None:
        self.camera(camera).zones.close()
        self._on_restarted(camera)

    def _observed(self, observation: Observation) -> None:
        frame = observation.frame
        observation = self._recognize(observation)
        camera = self.cameras.get(frame.camera)
        if camera is not None:
            size = (frame.width, frame.height)
            events = camera.zones.update(observation.tracks, time=frame.position, size=size)
            observation = msgspec.structs.replace(observation, events=events)
        for callback in self._subscribers:
            try:
                callback(observation)
            except Exception:
                _log.exception("an observation of %s was not taken", frame.camera)


async def _guarded(camera: WatchedCamera, work: object) -> None:
    """A camera's work: what it raises is that camera's end and nobody else's."""
    try:
        await work  # type: ignore[misc]
    except Exception as fault:
        camera.feed.state, camera.feed.words = "failed", f"{type(fault).__name__}: {fault}"
        _log.exception("camera %s has failed", camera.config.name)
