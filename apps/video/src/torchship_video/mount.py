"""The video application as a mount of the engine's server: the flow beside the models, and routes to its cameras.

The models that it asks are served by the same server: `detect`, `track` and, where identities are wanted, `appearance`.
`serving` makes the whole server's configuration out of a WatchConfig.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import signal
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from torchship import hardware
from torchship.errors import Denied, TorchshipError
from torchship.serve.routes import Exchange, Mounted, Route, Service
from torchship_video import config as configs
from torchship_video import ring
from torchship_video.camera_routes import camera_routes
from torchship_video.config import CameraConfig, WatchConfig
from torchship_video.flow import Feed, Flow, OnFrame
from torchship_video.messages import CameraStatus
from torchship_video.sinks.runner import SinkRunner
from torchship_video.supervisor import Camera

if TYPE_CHECKING:
    from torchship_video.view import IdentityBook

_log = logging.getLogger("torchship.video")
_LOOK = 1.0  # seconds between two looks at the file, and at whether all is over
ended: list[CameraStatus] = []
"""How the cameras were when the last flow of this process ended."""


def serving(config: WatchConfig, *, file: str = "", until_end: bool = False, terminal: bool = False) -> dict[str, Any]:
    """The server of a WatchConfig as plain data, as `torchship.serve` takes it.

    `file` is the cameras.toml to look at for changes. `until_end`: stop when all cameras are at their end. `terminal`:
    show how the cameras are doing.
    """
    detector, stages = config.detector, list(config.detector.stages)
    fit = {"side": detector.side, "planes": detector.planes, "unit": detector.unit}
    boxes = {"run": "torchship_video.stages:Boxes", "options": {"labels": detector.labels, "side": detector.side}}
    models: list[dict[str, Any]] = [
        {
            "name": "detect",
            "stages": [
                {"run": "torchship_video.stages:Squares", "options": fit, "copies": detector.copies},
                {
                    "artifact": detector.artifact,
                    "name": "detector",
                    "threads": detector.threads or max(1, hardware.cores() // 2),
                    "copies": detector.copies,
                    "device": detector.device,
                },
                *(stages or [boxes]),
            ],
            "outputs": ["boxes", "scores", "labels"],
        },
        {
            "name": "track",
            "run": "torchship_video.stages:Tracking",
            "options": msgspec.to_builtins(config.tracker),
            "sequence_idle": 3600.0,
        },
    ]
    if config.identity.on:
        from torchship_video.appearance import line

        models.append(line())
    options = {"config": msgspec.to_builtins(config), "file": file, "until_end": until_end, "terminal": terminal}
    return {
        "http": {"host": config.http_host, "port": config.http_port},
        "store": {"root": config.store},
        "token": list(config.token),
        "log": {"level": "warning" if terminal else "info"},
        "model": models,
        "mount": [{"run": "torchship_video.mount:mount", "options": options}],
    }


def mount(
    service: Service, *, config: dict[str, Any], file: str = "", until_end: bool = False, terminal: bool = False
) -> Mounted:
    """The flow, its sinks, the page and the routes of a WatchConfig as plain data. Raises BadConfig."""
    watch: WatchConfig = configs.convert(config)
    return _Application(service, watch, file=file, until_end=until_end, terminal=terminal).mounted()


class _Application:
    """All parts of one `torchship watch`, and the tasks that keep them going."""

    def __init__(self, service: Service, config: WatchConfig, *, file: str, until_end: bool, terminal: bool) -> None:
        self._config, self._file, self._until_end, self._terminal = config, file, until_end, terminal
        self.recognition: Any = None
        self.identities: Any = None
        given: dict[str, Any] = {}
        if config.identity.on:
            from torchship_video.appearance import HISTOGRAM, HISTOGRAM_RULE, HISTOGRAM_WIDTH
            from torchship_video.identity.identities import Identities
            from torchship_video.identity.recognition import Recognition

            self.identities = Identities(
                config.identity.folder or None, embedder=HISTOGRAM, width=HISTOGRAM_WIDTH, rule=HISTOGRAM_RULE
            )
            self.recognition = Recognition(service, self.identities)
            given = {"recognize": self.recognition.observe, "on_restarted": self.recognition.restarted}
        self.flow = Flow(
            service,
            open_feed,
            zones=config.zone,
            lines=config.line,
            score=config.detector.score,
            taken=self._taken,
            **given,
        )
        kept = [sink for sink in config.sink if sink.kind != "mjpeg"]
        drawn = [sink for sink in config.sink if sink.kind == "mjpeg"]  # their pictures are the page's
        self.sinks = [SinkRunner(sink, zones=config.zone, lines=config.line) for sink in kept]
        for sink in self.sinks:
            self.flow.subscribe(sink.offer)
        self.view: Any = None
        if config.view or drawn:
            from torchship_video.view import View

            self.view = View(
                self.flow.status,
                zones=config.zone,
                lines=config.line,
                sinks=self._sink_status,
                identities=self._book(),
                sink=drawn[0] if drawn else None,
            )
            self.flow.subscribe(self.view.observe)
        for camera in config.camera:
            self.flow.add(camera)

    def _book(self) -> IdentityBook | None:
        """The identities for the page, where there are any."""
        if self.identities is None:
            return None
        from torchship_video.identity.evidence import EvidenceBook

        return EvidenceBook(self.identities)

    def mounted(self) -> Mounted:
        """What the server is given."""
        routes = camera_routes(self.flow)
        if self.view is not None:
            routes += self.view.routes()
        if self.identities is not None:
            from torchship_video.identity.identity_routes import routes as identity_routes

            routes += identity_routes(self.identities)
        return Mounted([_of_own_pages(route) for route in routes], self.run, self.flow.metrics)

    async def _taken(self, camera: str) -> None:
        """Wait until the sinks need the pixels of a camera's observations so far no more."""
        await asyncio.gather(*(sink.taken(camera) for sink in self.sinks))

    def _sink_status(self) -> list[Any]:
        return [sink.status() for sink in self.sinks]

    async def run(self) -> None:
        """Keep everything going until cancelled; where it ends by itself, let the sinks finish and stop the server."""
        ring.sweep()
        beside = [sink.run() for sink in self.sinks]
        if self.view is not None:
            beside.append(self.view.run())
        if self.recognition is not None:
            beside.append(self.recognition.run())
        if self._terminal:
            from torchship_video.terminal import show

            note = f"page: http://{self._config.http_host}:{self._config.http_port}/watch" if self.view else ""
            beside.append(show(self.flow.status, sinks=self._sink_status, note=note))
        if self._file:
            beside.append(self._follow())
        tasks = [asyncio.ensure_future(_logged(work)) for work in beside]
        flow = asyncio.ensure_future(self.flow.run())
        try:
            if self._until_end:
                await self._end(flow)
                signal.raise_signal(signal.SIGTERM)  # the host stops in its usual way
            await flow
        finally:
            ended[:] = self.flow.status()
            flow.cancel()
            await asyncio.gather(flow, return_exceptions=True)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _end(self, flow: asyncio.Task[None]) -> None:
        """Wait until all cameras are at their end, and what they gave is with the sinks."""
        while not (self.flow.over or flow.done()):  # looked at ten times a second
            await asyncio.wait([flow], timeout=0.1)
        if self.recognition is not None:
            await self.recognition.settle()
        await asyncio.gather(*(sink.settled() for sink in self.sinks))

    async def _follow(self) -> None:
        """Apply what changes in cameras.toml; what the API has changed stays unless the file changes it too."""
        path, before = Path(self._file), self._config
        known = await asyncio.to_thread(_stamp, path)
        while True:
            await asyncio.sleep(_LOOK)
            stamp = await asyncio.to_thread(_stamp, path)
            if stamp == known:
                continue
            known = stamp
            try:
                config = await asyncio.to_thread(configs.read, path)
                await self.apply(before, config)
                before = config
            except TorchshipError as fault:
                _log.error("%s is not applied: %s", path, fault.line)

    async def apply(self, before: WatchConfig, config: WatchConfig) -> None:
        """Add, change and remove the cameras in which two readings of the file differ; the rest needs a new start."""
        old = {camera.name: camera for camera in before.camera}
        new = {camera.name: camera for camera in config.camera}
        for name in old.keys() - new.keys():
            with suppress(TorchshipError):  # the API was faster
                await self.flow.remove(name)
        for name, camera in new.items():
            if name not in self.flow.cameras:
                self.flow.add(camera)
            elif old.get(name) != camera:
                await self.flow.change(camera)
        if msgspec.structs.replace(before, camera=()) != msgspec.structs.replace(config, camera=()):
            _log.warning("%s: cameras are changed at once, everything else when it is started again", self._file)


def open_feed(config: CameraConfig, on_frame: OnFrame) -> Feed:
    """The camera's frames, decoded by a process of its own."""
    return Camera(config, on_frame=on_frame)


def _of_own_pages(route: Route) -> Route:
    """The same route; one that changes something refuses what a page of another origin makes a browser send.

    Such a page needs no token where the server asks for none, and a POST of plain text no leave of ours (Fetch
    standard, simple requests). Who is no browser sends no Origin.
    """
    if route.scope != "manage":
        return route
    inner = route.endpoint

    async def endpoint(exchange: Exchange) -> None:
        origin = exchange.head.headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != exchange.head.headers.get("host", "").lower():
            raise Denied("a page of another origin may not change this", hint="ask from this server's own address")
        answering = inner(exchange)
        if inspect.isawaitable(answering):
            await answering

    return route._replace(endpoint=endpoint)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        facts = os.stat(path)
    except OSError:
        return 0, 0
    return facts.st_mtime_ns, facts.st_size


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """A part beside the flow: what it raises ends that part alone."""
    try:
        await work
    except Exception:
        _log.exception("a part of the video application has failed; the rest runs on")
