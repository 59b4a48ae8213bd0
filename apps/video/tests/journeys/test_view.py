"""The browser page on a real server: its policy, its pictures, what it tells."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from apps.video.tests.sink_kit import CROSSED, HEIGHT, WIDTH, observed, ring, until
from PIL import Image

from torchship.errors import BadConfig
from torchship.serve import config as configs
from torchship.serve.host import Server
from torchship.serve.routes import Mounted, Service
from torchship_video.drawing import color_of
from torchship_video.messages import CameraStatus
from torchship_video.sinks import SinkConfig
from torchship_video.view import EvidenceCrop, IdentityCard, View

VIEWS: list[View] = []


class Book:
    """One identity with one cut-out."""

    def cards(self) -> list[IdentityCard]:
        """The card of it."""
        return [IdentityCard(identity=7, cameras=("door", "yard"), crops=(EvidenceCrop("door", 1.0, 0.9),))]

    def crop(self, identity: int, index: int) -> bytes | None:
        """The cut-out."""
        return b"\xff\xd8cut" if (identity, index) == (7, 0) else None


def mount(service: Service) -> Mounted:
    """A camera that shows something, and one that does not."""
    status = [CameraStatus("a/b <c>", "live", fps=25.0), CameraStatus("dead", "failed", words="no such file")]
    view = View(lambda: status, identities=Book(), sink=SinkConfig(kind="mjpeg", name="view", options={"width": WIDTH}))
    VIEWS.append(view)
    return Mounted(view.routes(), view.run)


@asynccontextmanager
async def served() -> Any:
    """A client of a server with the page, and the view behind it."""
    VIEWS.clear()
    server = await Server(configs.convert({"http": {"port": 0}, "mount": [{"run": f"{__name__}:mount"}]})).open()
    try:
        assert server.http is not None
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}", timeout=20) as client:
            yield client, VIEWS[0]
    finally:
        await server.close(patience=0.0)


def go(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def seen(sequence: int, at: Any, **more: Any) -> Any:
    """An observation on the camera whose name needs care."""
    found = observed(sequence, at=at, **more)
    values = {name: getattr(found.frame, name) for name in found.frame.__struct_fields__}
    return type(found)(type(found.frame)(**values | {"camera": "a/b <c>"}), found.tracks, found.events)


def test_the_page_asks_for_nothing_that_its_policy_forbids() -> None:
    async def work() -> None:
        async with served() as (client, _):
            page = await client.get("/watch")
            policy = page.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
            assert "//" not in page.text.replace("<!doctype html>", "")
            assert not re.search(r"<script>|<style|style=|\son\w+=", page.text)
            for address in re.findall(r'(?:href|src)="([^"]+)"', page.text):
                assert (await client.get(address)).status_code == 200
            script = (await client.get("/watch/page.js")).text
            assert "innerHTML" not in script
            assert "http" not in script

    go(work())


def test_the_state_tells_cameras_identities_events_and_counts() -> None:
    async def work() -> None:
        async with served() as (client, view):
            view.observe(observed(1, events=CROSSED))
            state = (await client.get("/watch/state")).json()
            assert [(found["camera"], found["state"]) for found in state["cameras"]] == [
                ("a/b <c>", "live"),
                ("dead", "failed"),
            ]
            assert state["identities"][0]["cameras"] == ["door", "yard"]
            (event,) = state["events"]
            assert (event["kind"], event["where"], event["identity"], event["camera"]) == ("in", "gate", 7, "door")
            assert state["counts"] == [{"camera": "door", "where": "gate", "inside": 0, "in": 1}]
            assert [sink["name"] for sink in state["sinks"]] == ["view"]

    go(work())


def pictures(data: bytes) -> list[Image.Image]:
    """The whole pictures of a stream."""
    found: list[Image.Image] = []
    for part in data.split(b"--torchship-frame\r\n")[1:]:
        head, _, body = part.partition(b"\r\n\r\n")
        length = int(head.rpartition(b"content-length: ")[2] or 0)
        if head.startswith(b"content-type: image/jpeg") and len(body) >= length:
            found.append(Image.open(io.BytesIO(body[:length])))
    return found


def test_a_stream_has_pictures_with_boxes_and_is_drawn_only_while_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchship_video.view._FEW", 0.3)

    async def work() -> None:
        with ring() as publish:
            async with served() as (client, view):
                await until(lambda: view.runner.status().state == "running")
                view.observe(seen(0, publish(0)))  # the first is always drawn
                await until(lambda: view.runner.status().written == 1)
                view.observe(seen(1, publish(1)))
                assert view.runner.status().queued == 0
                data = b""
                async with client.stream("GET", "/watch/cameras/a%2Fb%20%3Cc%3E/stream") as answer:
                    assert answer.headers["content-type"] == "multipart/x-mixed-replace; boundary=torchship-frame"
                    async for part in answer.aiter_bytes():
                        data += part
                        if len(pictures(data)) == 3:
                            break
                        await asyncio.sleep(0.1)
                        view.observe(seen(2, publish(2)))
                assert [picture.size for picture in pictures(data)] == [(WIDTH, HEIGHT)] * 3
                found, wanted = pictures(data)[0].getpixel((40, 130)), color_of(7)
                assert isinstance(found, tuple)
                assert all(abs(one - other) < 90 for one, other in zip(found, wanted, strict=True))  # JPEG blurs colour
                await until(lambda: not any(found.watchers for found in view._pictures.values()))

    go(work())


def test_a_page_that_is_closed_on_a_dead_camera_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchship_video.view._FEW", 0.1)

    async def work() -> None:
        async with served() as (client, view):
            data = b""
            async with client.stream("GET", "/watch/cameras/dead/stream") as answer:
                async for part in answer.aiter_bytes():
                    data += part
                    if pictures(data):
                        break
            assert pictures(data)[0].getextrema() == ((0, 0),) * 3  # black
            await until(lambda: not any(found.watchers for found in view._pictures.values()))

    go(work())


def test_the_next_picture_of_a_camera_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchship_video.view._FEW", 0.1)

    async def work() -> None:
        async with served() as (client, _):
            dead = await client.get("/watch/cameras/dead/picture")
            assert dead.status_code == 404
            assert "nothing yet" in dead.text
            none = await client.get("/watch/cameras/none/stream")
            assert none.status_code == 404
            assert "no camera 'none'" in none.text

    go(work())


def test_evidence_is_given_or_not_found() -> None:
    async def work() -> None:
        async with served() as (client, _):
            assert (await client.get("/watch/identities/7/0")).content == b"\xff\xd8cut"
            for path in ("7/1", "8/0", "x/0", "7/-1"):
                assert (await client.get(f"/watch/identities/{path}")).status_code in (400, 404)

    go(work())


def test_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchship_video.view._STREAMS", 1)

    async def work() -> None:
        async with served() as (client, view):
            task = asyncio.ensure_future(client.get("/watch/cameras/dead/stream"))
            await until(lambda: any(found.watchers for found in view._pictures.values()))
            assert (await client.get("/watch/cameras/dead/stream")).status_code in (429, 503)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    go(work())


def test_options_of_the_pictures_are_checked_at_once() -> None:
    with pytest.raises(BadConfig, match="width"):
        View(list, sink=SinkConfig(kind="mjpeg", options={"width": 1}))
