"""The browser page of `torchship watch --view`: every camera live with boxes, identities with evidence, events, counts.

One page on the engine's port, with no resource from anywhere else and a policy that forbids any. Its pictures are made
by a process of their own (the sink `mjpeg`), and only as many as somebody looks at.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from typing import Any, Protocol

import msgspec
from PIL import Image

from torchship.errors import Busy, NotFound
from torchship.serve.routes import Exchange, Route
from torchship_video.drawing import jpeg
from torchship_video.messages import CameraStatus, Observation
from torchship_video.sinks import SinkConfig
from torchship_video.sinks.runner import SinkRunner, SinkStatus
from torchship_video.zones import LineConfig, ZoneConfig

_POLICY = (
    ("content-security-policy", "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; "
     "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-store"),
)  # fmt: skip
_BOUNDARY = "torchship-frame"
_EVENTS = 200  # that the page can show
_STREAMS = 64  # that are open at once
_SELDOM = 2.0  # seconds between two pictures of a camera that nobody looks at
_FEW = 5.0  # seconds that a picture is waited for


class EvidenceCrop(msgspec.Struct, frozen=True):
    """A cut-out by which an identity is known: where and when it was taken, and its similarity to the identity."""

    camera: str
    time: float
    score: float


class IdentityCard(msgspec.Struct, frozen=True, kw_only=True):
    """What the page shows of one identity; `first` and `last` are Unix seconds."""

    identity: int
    cameras: tuple[str, ...] = ()
    first: float = 0.0
    last: float = 0.0
    ambiguous: bool = False
    crops: tuple[EvidenceCrop, ...] = ()
    words: str = ""


class IdentityBook(Protocol):
    """Who knows the identities."""

    def cards(self) -> Sequence[IdentityCard]:
        """Those that were seen last, newest first."""

    def crop(self, identity: int, index: int) -> bytes | None:
        """A cut-out as JPEG, None when it is gone."""


class _Picture:
    """The latest picture of a camera, and who waits for the next."""

    def __init__(self) -> None:
        self.data, self.number, self.made = b"", 0, 0.0
        self.watchers = 0
        self._next = asyncio.Event()

    def put(self, data: bytes) -> None:
        self.data, self.number = data, self.number + 1
        self._next.set()
        self._next = asyncio.Event()

    async def after(self, number: int) -> None:
        """Wait until there is a picture with another number."""
        while self.number == number:
            await self._next.wait()


class View:
    """The page and what it needs. All methods belong to the event loop's thread."""

    def __init__(
        self,
        status: Callable[[], Sequence[CameraStatus]],
        *,
        zones: Collection[ZoneConfig] = (),
        lines: Collection[LineConfig] = (),
        identities: IdentityBook | None = None,
        sinks: Callable[[], Sequence[SinkStatus]] | None = None,
        sink: SinkConfig | None = None,
    ) -> None:
        """`sink` is of the kind `mjpeg`: how pictures are drawn, if not as usual. Raises BadConfig."""
        self._status, self._identities, self._sinks = status, identities, sinks
        self._pictures: dict[str, _Picture] = {}
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._counts: dict[tuple[str, str], dict[str, int]] = {}
        self._told = 0
        sink = sink or SinkConfig(kind="mjpeg", name="view")
        self.runner = SinkRunner(sink, zones=zones, lines=lines, on_output=self._made)

    async def run(self) -> None:
        """Draw pictures until cancelled."""
        await self.runner.run()

    def observe(self, observation: Observation) -> None:
        """Take one observation; never waits."""
        camera, now = observation.frame.camera, time.monotonic()
        picture = self._pictures.get(camera)
        if picture is None:
            picture = self._pictures[camera] = _Picture()
        if picture.watchers or now - picture.made > _SELDOM:
            picture.made = now
            self.runner.offer(observation)
        for event in observation.events:
            self._told += 1
            found = {name: getattr(event, name) for name in event.__struct_fields__}
            self._events.appendleft(found | {"id": self._told, "camera": camera, "time": observation.frame.taken})
            counts = self._counts.setdefault((camera, event.where), {})
            counts[event.kind] = counts.get(event.kind, 0) + 1

    def routes(self) -> list[Route]:
        """The page and all that it asks for, below /watch."""
        camera = "/watch/cameras/{camera:text}"
        return [
            Route("GET", "/watch", _page, "", "The page that shows all cameras."),
            Route("GET", "/watch/page.css", _style, "", "The page's style."),
            Route("GET", "/watch/page.js", _script, "", "The page's script."),
            Route("GET", "/watch/icon.svg", _icon, "", "The page's icon."),
            Route("GET", "/watch/state", self._state, "infer", "Cameras, identities, events and counts."),
            Route("GET", f"{camera}/stream", self._stream, "infer", "A camera as motion JPEG, with boxes."),
            Route("GET", f"{camera}/picture", self._one, "infer", "The next picture of a camera, with boxes."),
            Route("GET", "/watch/identities/{identity}/{crop}", self._crop, "infer", "A cut-out of an identity."),
        ]

    def _made(self, camera: str, data: bytes) -> None:
        self._pictures.setdefault(camera, _Picture()).put(data)

    def _state(self, exchange: Exchange) -> None:
        counts = [
            {"camera": camera, "where": where, "inside": found.get("enter", 0) - found.get("leave", 0)} | found
            for (camera, where), found in sorted(self._counts.items())
        ]
        cards = self._identities.cards() if self._identities is not None else ()
        told = {
            "time": time.time(),
            "cameras": self._status(),
            "identities": cards,
            "events": list(self._events),
            "counts": counts,
            "sinks": [*(self._sinks() if self._sinks is not None else ()), self.runner.status()],
        }
        exchange.answer(msgspec.json.encode(told), headers=_POLICY)

    async def _stream(self, exchange: Exchange) -> None:
        """Pictures as they come; one that the browser is too slow for is left out.

        Where none comes the last is sent again by and by: so a browser that is gone is noticed.
        """
        picture = self._picture(exchange)
        exchange.plain = True
        exchange.begin(content_type=f"multipart/x-mixed-replace; boundary={_BOUNDARY}", headers=_POLICY)
        picture.watchers += 1
        try:
            while not exchange.gone:
                number, data = picture.number, picture.data or _nothing()
                head = f"--{_BOUNDARY}\r\ncontent-type: image/jpeg\r\ncontent-length: {len(data)}\r\n\r\n"
                exchange.write(head.encode() + data + b"\r\n")
                await exchange.drained()
                with suppress(TimeoutError):
                    await asyncio.wait_for(picture.after(number), _FEW)
        finally:
            picture.watchers -= 1

    async def _one(self, exchange: Exchange) -> None:
        picture = self._picture(exchange)
        picture.watchers += 1
        try:
            await asyncio.wait_for(picture.after(picture.number), _FEW)
        except TimeoutError:
            if not picture.data:
                raise NotFound("the camera has shown nothing yet", hint="GET /watch/state says why") from None
        finally:
            picture.watchers -= 1
        exchange.plain = True
        exchange.answer(picture.data, content_type="image/jpeg", headers=_POLICY)

    def _picture(self, exchange: Exchange) -> _Picture:
        """The pictures of the camera that is asked for. Raises NotFound, Busy."""
        camera = exchange.head.places["camera"]
        if camera not in self._pictures and camera not in {found.camera for found in self._status()}:
            raise NotFound(f"no camera {camera!r}", hint="GET /watch/state lists them")
        if sum(picture.watchers for picture in self._pictures.values()) >= _STREAMS:
            raise Busy(f"{_STREAMS} pictures are being watched already", hint="close a page")
        return self._pictures.setdefault(camera, _Picture())

    def _crop(self, exchange: Exchange) -> None:
        identity, index = exchange.head.places["identity"], exchange.head.places["crop"]
        found = None
        if self._identities is not None and identity.isdecimal() and index.isdecimal():
            found = self._identities.crop(int(identity), int(index))
        if found is None:
            raise NotFound(f"identity {identity} has no cut-out {index}", hint="GET /watch/state lists them")
        exchange.plain = True
        exchange.answer(found, content_type="image/jpeg", headers=_POLICY)


def _page(exchange: Exchange) -> None:
    exchange.answer(_rendered(), content_type="text/html; charset=utf-8", headers=_POLICY)


def _style(exchange: Exchange) -> None:
    exchange.answer(_asset("page.css"), content_type="text/css; charset=utf-8", headers=_POLICY)


def _script(exchange: Exchange) -> None:
    exchange.answer(_asset("page.js"), content_type="text/javascript; charset=utf-8", headers=_POLICY)


def _icon(exchange: Exchange) -> None:
    exchange.answer(_asset("icon.svg"), content_type="image/svg+xml", headers=_POLICY)


@lru_cache(maxsize=1)
def _nothing() -> bytes:
    """What stands for the picture of a camera that has shown none."""
    return jpeg(Image.new("RGB", (320, 180)))


@lru_cache(maxsize=1)
def _rendered() -> bytes:
    import jinja2

    templates = jinja2.Environment(loader=jinja2.PackageLoader("torchship_video"), autoescape=True)
    return templates.get_template("page.html").render(title="torchship watch").encode()


@lru_cache(maxsize=3)
def _asset(name: str) -> bytes:
    return (files("torchship_video") / "templates" / name).read_bytes()
