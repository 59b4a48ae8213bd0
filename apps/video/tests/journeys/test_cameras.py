"""Cameras under their supervisor: files, pictures and streams that end, die, are killed, or come back."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from apps.video.tests.camera_kit import Taken, ended, go, rings, until
from PIL import Image

from torchship_video import supervisor
from torchship_video.config import CameraConfig
from torchship_video.conversation import Conversation
from torchship_video.sources import kind_of
from torchship_video.supervisor import Camera

FRAMES = 60


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film whose frames become brighter."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((96, 128, 3), 20 + 3 * number, np.uint8), format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode(None))
    return path


def test_every_frame_of_a_file_comes_once_in_order_with_its_pixels(clip: Path) -> None:
    async def work() -> None:
        taken = Taken()
        camera = Camera(CameraConfig(name="a", source=str(clip)), on_frame=taken)
        task = asyncio.ensure_future(camera.run())
        await until(lambda: camera.state == "ended" and len(taken.means) == FRAMES)
        await ended(task)
        assert taken.numbers == list(range(FRAMES))
        assert [round(frame.position * 30) for frame in taken.frames] == list(range(FRAMES))
        assert np.allclose(taken.means, [20 + 3 * number for number in range(FRAMES)], atol=4)

    go(work())


def test_a_decoder_that_is_killed_goes_on_where_it_was(clip: Path) -> None:
    async def work() -> None:
        taken = Taken(seconds=0.02)
        camera = Camera(CameraConfig(name="a", source=str(clip)), on_frame=taken)
        task = asyncio.ensure_future(camera.run())
        await until(lambda: len(taken.frames) >= 15)
        assert camera.pid is not None
        os.kill(camera.pid, signal.SIGKILL)
        await until(lambda: camera.state == "ended")
        assert taken.numbers == list(range(FRAMES))
        assert camera.reconnects == 1
        await until(lambda: len(taken.means) == FRAMES)
        await ended(task)

    go(work())


def test_a_slow_flow_makes_a_file_wait_and_a_film_in_realtime_drop(clip: Path) -> None:
    async def work() -> None:
        for realtime, policy in ((False, "wait"), (True, "latest")):
            taken = Taken(seconds=0.6)
            config = CameraConfig(name="a", source=str(clip), realtime=realtime, policy=policy)  # type: ignore[arg-type]
            camera = Camera(config, on_frame=taken)
            task = asyncio.ensure_future(camera.run())
            await until(lambda: camera.state == "ended")  # noqa: B023
            assert len(taken.frames) + camera.lost == FRAMES
            assert (camera.lost > 0) == realtime
            await until(lambda: len(taken.means) == len(taken.frames))  # noqa: B023
            await ended(task)

    go(work())


def test_a_file_that_is_paused_waits_and_one_that_loops_begins_again(clip: Path) -> None:
    async def work() -> None:
        taken = Taken()
        camera = Camera(CameraConfig(name="a", source=str(clip), loop=True), on_frame=taken)
        task = asyncio.ensure_future(camera.run())
        await until(lambda: len(taken.frames) > 2 * FRAMES)
        camera.pause()
        assert camera.state == "paused"
        await asyncio.sleep(0.3)
        count = len(taken.frames)
        await asyncio.sleep(0.3)
        assert len(taken.frames) == count
        camera.resume()
        await until(lambda: len(taken.frames) > count + 10)
        assert taken.numbers == list(range(len(taken.frames)))
        positions = [frame.position for frame in taken.frames]
        assert positions == sorted(positions)
        await ended(task)

    go(work())


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.write_text("no film"), "Invalid data"),
        (Path.mkdir, "no frames"),
    ],
)
def test_what_cannot_be_read_fails_in_words(tmp_path: Path, made: Callable[[Path], object], words: str) -> None:
    made(tmp_path / "x.mp4")

    async def work() -> None:
        camera = Camera(CameraConfig(name="a", source=str(tmp_path / "x.mp4")), on_frame=Taken())
        task = asyncio.ensure_future(camera.run())
        await until(lambda: camera.state == "failed")
        assert words in camera.words
        await ended(task)

    go(work())


def test_pictures_of_a_folder_in_the_order_of_names_whatever_their_size(tmp_path: Path) -> None:
    for number, size in enumerate([(64, 48), (64, 48), (33, 31), (320, 240)]):
        Image.new("RGB", size, (40 * number, 0, 0)).save(tmp_path / f"{number}.png")

    async def work() -> None:
        taken = Taken()
        camera = Camera(CameraConfig(name="a", source=str(tmp_path)), on_frame=taken)
        task = asyncio.ensure_future(camera.run())
        await until(lambda: camera.state == "ended")
        assert [(frame.width, frame.height) for frame in taken.frames] == [(64, 48), (64, 48), (33, 31), (320, 240)]
        await until(lambda: len(taken.means) == 4)
        assert np.allclose(taken.means, [0, 40 / 3, 80 / 3, 40], atol=4)
        await ended(task)

    go(work())


class Stream:
    """A camera that speaks HTTP: motion JPEG until it is told to stop, or to say nothing."""

    def __init__(self, port: int = 0) -> None:
        self.silent = self.over = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("content-type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                out = io.BytesIO()
                Image.new("RGB", (64, 48), (200, 0, 0)).save(out, "JPEG")
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(out.getvalue())}\r\n\r\n"
                with suppress(OSError):
                    while not outer.over:
                        if not outer.silent:
                            self.wfile.write(head.encode() + out.getvalue() + b"\r\n")
                        time.sleep(0.02)

            def log_message(self, format: str, *args: Any) -> None:
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """The camera loses its power."""
        self.over = True
        self._server.shutdown()
        self._server.server_close()


def test_a_stream_that_dies_comes_back_and_others_never_stop(monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    monkeypatch.setattr("torchship_video.supervisor.LONGEST_PAUSE", 1.0)
    monkeypatch.setattr("torchship_video.supervisor.STALLED", 2.0)
    stream = Stream()

    async def work() -> None:
        nonlocal stream
        taken, steady = Taken(), Taken()
        address = f"http://ann:secret@127.0.0.1:{stream.port}/video"
        camera = Camera(CameraConfig(name="a", source=address), on_frame=taken)
        other = Camera(CameraConfig(name="b", source=str(clip), loop=True, realtime=True), on_frame=steady)
        tasks = [asyncio.ensure_future(one.run()) for one in (camera, other)]
        await until(lambda: camera.state == "live" and other.state == "live")
        stream.close()
        await until(lambda: camera.state == "reconnecting")
        assert "secret" not in camera.words
        count = len(steady.frames)
        stream = Stream(stream.port)
        await until(lambda: camera.state == "live")
        stream.silent = True
        await until(lambda: camera.state in ("stalled", "reconnecting"))
        assert "no frame for" in camera.words
        stream.silent = False
        await until(lambda: camera.state == "live")
        assert len(steady.frames) > count
        assert other.state == "live"
        assert taken.numbers == sorted(set(taken.numbers))
        camera.pause()
        await until(lambda: camera.pid is None)
        assert camera.state == "paused"
        camera.resume()
        await until(lambda: camera.state == "live")
        for task in tasks:
            await ended(task)

    go(work())
    stream.close()


def test_a_broken_picture_is_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (0, 2):
        Image.new("RGB", (64, 48), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "3.png").write_bytes(b"")

    async def work() -> None:
        taken = Taken()
        camera = Camera(CameraConfig(name="a", source=str(tmp_path)), on_frame=taken)
        task = asyncio.ensure_future(camera.run())
        await until(lambda: camera.state == "ended")
        assert taken.numbers == [0, 1]
        assert camera.lost == 2
        await ended(task)

    with caplog.at_level("WARNING", logger="torchship.video"):
        go(work())
    assert [name in caplog.text for name in ("0.png", "1.png", "2.png", "3.png")] == [False, True, False, True]


def test_a_file_is_a_name_and_no_protocol(monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    monkeypatch.chdir(clip.parent)

    async def work() -> None:
        good, bad = (
            Camera(CameraConfig(name="a", source=source), on_frame=Taken()) for source in (clip.name, f"concat:{clip}")
        )
        tasks = [asyncio.ensure_future(one.run()) for one in (good, bad)]
        await until(lambda: good.state == "ended" and bad.state == "failed")
        assert "No such file" in bad.words
        for task in tasks:
            await ended(task)

    go(work())


def test_a_decoder_that_dies_before_its_first_frame_leaves_no_ring(monkeypatch: pytest.MonkeyPatch, clip: Path) -> None:
    dying = "apps.video.tests.unit.ring_children:die_with_a_ring"
    monkeypatch.setattr(supervisor, "Conversation", lambda _target, task, take: Conversation(dying, task, take=take))

    async def work() -> None:
        camera = Camera(CameraConfig(name="a", source=str(clip)), on_frame=Taken())
        before, task = rings(), asyncio.ensure_future(camera.run())
        await until(lambda: camera.reconnects == 2)
        assert not rings() - before
        await ended(task)

    go(work())


def test_a_camera_names_the_rings_of_its_decoders(clip: Path) -> None:
    async def work() -> None:
        taken = Taken()
        camera = Camera(CameraConfig(name="a", source=str(clip)), on_frame=taken)
        task = asyncio.ensure_future(camera.run())
        await until(lambda: bool(taken.frames))
        assert camera.pid
        os.kill(camera.pid, signal.SIGKILL)
        await until(lambda: camera.state == "ended")
        names = sorted({frame.ring for frame in taken.frames})
        assert [name.rpartition(".")[0] for name in names] == [f"{camera._rings}.1", f"{camera._rings}.2"]
        await ended(task)

    go(work())


def test_kinds_are_told_by_the_address(tmp_path: Path) -> None:
    found = [kind_of(source) for source in ("rtsp://a/1", "http://a/b", "/dev/video0", str(tmp_path), "a.mp4")]
    assert found == ["rtsp", "http", "v4l2", "pictures", "file"]
