"""Journey: cameras watched by a real server; they come, change and go, and processes are killed under them."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import uvloop
from apps.video.tests import video_kit
from PIL import Image

from torchship.errors import BadConfig, StageFailed
from torchship.serve import config as server_configs
from torchship.serve.host import Server
from torchship_video import mount
from torchship_video.flow import Flow
from torchship_video.messages import Observation


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in the event loop that servers have."""

    @functools.wraps(test)
    def run(*given: Any, **named: Any) -> None:
        uvloop.run(test(*given, **named))

    return run


class Watched:
    """A running server with its flow, and all that it observed."""

    def __init__(self, server: Server, flow: Flow) -> None:
        self.server, self.flow = server, flow
        self.seen: list[Observation] = []
        flow.subscribe(self.seen.append)

    async def until(self, true: Callable[[], Any], *, seconds: float = 40.0) -> None:
        async with asyncio.timeout(seconds):
            while not true():  # noqa: ASYNC110  # whatever is asked, nobody tells of it
                await asyncio.sleep(0.02)

    def of(self, camera: str) -> list[Observation]:
        return [one for one in self.seen if one.frame.camera == camera]

    async def more(self, camera: str, count: int = 10) -> None:
        """Wait until so many more frames of a camera are analysed."""
        before = len(self.of(camera))
        await self.until(lambda: len(self.of(camera)) >= before + count)

    def kill_worker(self, model: str) -> None:
        line = next(line for (name, _), line in self.server.catalog.lines().items() if name == model)
        os.kill(line.stations[0].replicas[0].pid, signal.SIGKILL)


@asynccontextmanager
async def watching(
    monkeypatch: pytest.MonkeyPatch, cameras: list[dict[str, Any]], **more: Any
) -> AsyncIterator[Watched]:
    made: list[Flow] = []

    class SeenFlow(Flow):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            made.append(self)

    monkeypatch.setattr(mount, "Flow", SeenFlow)
    server = Server(server_configs.convert(video_kit.serving(cameras, **more)))
    await server.open()
    try:
        yield Watched(server, made[0])
    finally:
        await server.close(patience=1.0)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return video_kit.make_video(tmp_path_factory.mktemp("video") / "square.mp4", frames=50)


@in_loop
async def test_a_file_is_analysed_whole_and_in_order(monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    async with watching(monkeypatch, [{"name": "one", "source": str(video)}]) as watched:
        await watched.until(lambda: watched.flow.over)
        found = watched.of("one")
        assert [one.frame.sequence for one in found] == list(range(50))
        numbers = {track.number for one in found for track in one.tracks if track.confirmed}
        assert numbers == {1}
        assert all(track.number == 0 for one in found for track in one.tracks if not track.confirmed)
        (status,) = watched.flow.status()
        assert (status.state, status.frames, status.drops) == ("ended", 50, 0)
        assert "trackers" not in sys.modules  # the process that tracks alone loads it
        text = watched.server.service.metrics()
        assert 'torchship_video_frames_total{camera="one"} 50' in text
        assert 'torchship_video_dropped_total{camera="one",reason="full"} 0' in text


@pytest.mark.parametrize("killed", ["detect", "track"])
@in_loop
async def test_no_frame_of_a_file_is_lost_with_a_worker(
    monkeypatch: pytest.MonkeyPatch, video: Path, killed: str
) -> None:
    camera = {"name": "one", "source": str(video), "realtime": True, "policy": "wait"}
    async with watching(monkeypatch, [camera]) as watched:
        for _ in range(2):
            await watched.more("one", 5)
            watched.kill_worker(killed)
        await watched.until(lambda: watched.flow.over)
        assert [one.frame.sequence for one in watched.of("one")] == list(range(50))
        assert not sum(watched.flow.camera("one").stream.meter.drops.values())


@in_loop
async def test_a_frame_that_the_detector_cannot_stand_is_dropped_at_last(
    monkeypatch: pytest.MonkeyPatch, video: Path
) -> None:
    async with watching(monkeypatch, [{"name": "one", "source": str(video)}]) as watched:
        service, asked = watched.server.service, [0]
        infer = service.infer

        async def failing(model: str, *given: Any, **named: Any) -> Any:
            if model == "detect" and (asked[0] or watched.of("one")):
                asked[0] += 1
                raise StageFailed("it died")
            return await infer(model, *given, **named)

        monkeypatch.setattr(watched.flow.camera("one").stream, "_service", _Asked(failing))
        await watched.until(lambda: watched.flow.over)
        meter = watched.flow.camera("one").stream.meter
        assert meter.drops["failed"] == 50 - len(watched.of("one"))
        assert asked[0] == 3 * meter.drops["failed"] > 0


class _Asked:
    """A service of one function."""

    def __init__(self, infer: Callable[..., Coroutine[Any, Any, Any]]) -> None:
        self.infer = infer


@in_loop
async def test_a_sink_mjpeg_is_served(monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    camera = {"name": "one", "source": str(video), "loop": True, "realtime": True}
    sink = {"kind": "mjpeg", "options": {"width": 160}}
    async with watching(monkeypatch, [camera], sink=[sink]) as watched:
        await watched.more("one", 3)
        async with httpx.AsyncClient(base_url=watched.server.url, timeout=20) as client:
            answer = await client.get("/watch/cameras/one/picture")
            assert Image.open(io.BytesIO(answer.content)).size == (160, 120)
            (told,) = (await client.get("/watch/state")).json()["sinks"]
            assert (told["kind"], told["state"]) == ("mjpeg", "running")
    with pytest.raises(BadConfig, match="one sink mjpeg"):
        video_kit.serving([camera], sink=[sink, sink])


@in_loop
async def test_every_frame_of_a_file_is_in_every_sink(
    monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path
) -> None:
    sinks = [
        {"kind": "mp4", "options": {"path": str(tmp_path / "film.mp4")}},
        {"kind": "jsonl", "options": {"path": str(tmp_path / "seen.jsonl"), "empty": True}},
        {"kind": "motchallenge", "options": {"path": str(tmp_path / "tracks.txt")}},
    ]
    async with watching(monkeypatch, [{"name": "one", "source": str(video)}], sink=sinks) as watched:
        await watched.until(lambda: watched.flow.over)
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 50
    lines = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert [line["sequence"] for line in lines] == list(range(50))
    confirmed = [line["sequence"] + 1 for line in lines for track in line["tracks"] if track["confirmed"]]
    assert confirmed
    assert [int(row.split(",")[0]) for row in (tmp_path / "tracks.txt").read_text().splitlines()] == confirmed


@in_loop
async def test_cameras_come_change_and_go_by_the_api(monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    camera = {"name": "one", "source": str(video), "loop": True, "realtime": True}
    async with watching(monkeypatch, [camera]) as watched, httpx.AsyncClient(base_url=watched.server.url) as client:
        await watched.more("one")
        answer = await client.post("/v1/cameras", json={**camera, "name": "two", "every": 2})
        assert answer.status_code == 201, answer.text
        await watched.more("two", 20)
        meter = watched.flow.camera("two").stream.meter
        assert meter.looked <= meter.frames / 2 + 1
        assert (await client.post("/v1/cameras", json=camera)).status_code == 400
        assert "every" in (await client.post("/v1/cameras", json={**camera, "name": "x", "every": 0})).text
        changed = await client.patch("/v1/cameras/two", json={"every": 1})
        assert changed.json()["config"]["every"] == 1
        await watched.more("two")
        assert (await client.post("/v1/cameras/two/pause")).json()["state"] == "paused"
        assert (await client.delete("/v1/cameras/two")).status_code == 200
        assert [one["camera"] for one in (await client.get("/v1/cameras")).json()["cameras"]] == ["one"]
        assert (await client.get("/v1/cameras/two")).status_code == 404
        await watched.more("one")


@in_loop
async def test_pages_of_others_change_nothing(monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    async with watching(monkeypatch, []) as watched, httpx.AsyncClient(base_url=watched.server.url) as client:
        camera = json.dumps({"name": "two", "source": str(video), "paused": True})
        for origin in ("http://evil.example", "null", ""):
            answer = await client.post("/v1/cameras", content=camera, headers={"origin": origin})
            assert answer.status_code == 403, origin
        assert not watched.flow.cameras
        answer = await client.post("/v1/cameras", content=camera, headers={"origin": watched.server.url})
        assert answer.status_code == 201
        answer = await client.get("/v1/cameras", headers={"origin": "http://evil.example"})
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers
        for source in ("file:///etc/passwd", "subfile,,start,0,end,9,,://etc/passwd", "concat://a"):
            answer = await client.post("/v1/cameras", json={"name": "x", "source": source})
            assert (answer.status_code, "$" in answer.text) == (400, True), source


@in_loop
async def test_a_slow_detector_drops_frames_and_holds_no_slots(monkeypatch: pytest.MonkeyPatch, video: Path) -> None:
    camera = {"name": "one", "source": str(video), "loop": True, "realtime": True, "policy": "latest", "in_flight": 1}
    async with watching(monkeypatch, [camera]) as watched:
        await watched.more("one", 5)
        stream = watched.flow.camera("one").stream
        tracked = stream._tracked

        async def slow(*given: Any, **named: Any) -> Any:
            await asyncio.sleep(0.3)
            return await tracked(*given, **named)

        monkeypatch.setattr(stream, "_tracked", slow)
        await watched.until(lambda: stream.meter.drops["full"] > 10)
        assert len(stream._waiting) <= 1
        await watched.more("one", 2)


@pytest.mark.parametrize("killed", ["decoder", "detect", "track"])
@in_loop
async def test_what_is_killed_comes_back_and_the_others_run_on(
    monkeypatch: pytest.MonkeyPatch, video: Path, killed: str
) -> None:
    cameras = [{"name": name, "source": str(video), "loop": True, "realtime": True} for name in ("one", "two")]
    async with watching(monkeypatch, cameras) as watched:
        await watched.more("one", 15)
        await watched.more("two", 5)
        highest = max(track.number for one in watched.of("one") for track in one.tracks)
        if killed == "decoder":
            feed: Any = watched.flow.camera("one").feed
            os.kill(feed.pid, signal.SIGKILL)
            await watched.more("two", 10)
            await watched.until(lambda: feed.reconnects == 1 and feed.state == "live")
        else:
            watched.kill_worker(killed)
        await watched.more("one", 30)
        await watched.more("two", 30)
        if killed == "track":
            meter = watched.flow.camera("one").stream.meter
            assert meter.restarts >= 1
            later = [t.number for one in watched.of("one")[-5:] for t in one.tracks if t.confirmed]
            assert later
            assert min(later) > highest  # numbers are not used twice
        assert all(not one.stream.fault for one in watched.flow.cameras.values())


@in_loop
async def test_the_file_is_followed(monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path) -> None:
    from torchship_video import config as configs

    def text(*names: str) -> str:
        return "\n".join(
            f'[[camera]]\nname = "{one}"\nsource = "{video}"\nloop = true\nrealtime = true' for one in names
        )

    file = tmp_path / "cameras.toml"
    file.write_text(text("one", "two"))
    monkeypatch.setattr(mount, "_LOOK", 0.05)
    first = configs.read(file)
    application: list[Any] = []
    kept = mount._Application.__init__

    def noted(self: Any, *given: Any, **named: Any) -> None:
        kept(self, *given, **{**named, "file": str(file)})
        application.append(self)

    monkeypatch.setattr(mount._Application, "__init__", noted)
    import msgspec

    async with watching(monkeypatch, msgspec.to_builtins(first.camera)) as watched:
        application[0]._config = first
        await watched.more("two", 3)
        file.write_text("[[camera]]\nname = 1")
        await asyncio.sleep(0.3)
        assert set(watched.flow.cameras) == {"one", "two"}  # what cannot be read changes nothing
        file.write_text(text("two", "three"))
        await watched.until(lambda: set(watched.flow.cameras) == {"two", "three"})
        await watched.more("three", 3)
