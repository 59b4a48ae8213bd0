"""Streams that change their size, send garbage or have full-range pixels are seen as they are, and hurt nobody else."""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from apps.video.tests.camera_kit import Taken, ended, go, until
from PIL import Image

from torchship_video.config import CameraConfig
from torchship_video.supervisor import Camera


def picture(size: tuple[int, int], grey: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (grey, grey, grey)).save(out, "JPEG", quality=95)
    data = out.getvalue()
    return b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data) + data + b"\r\n"


@contextmanager
def serving(piece: Callable[[int], bytes]) -> Iterator[str]:
    """The address of a camera that sends `piece(0)`, `piece(1)` and so on."""
    over = threading.Event()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            with suppress(OSError):
                for number in range(1_000_000):
                    if over.is_set():
                        return
                    self.wfile.write(piece(number))
                    time.sleep(0.01)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/video"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def test_a_stream_changes_its_size_and_is_not_opened_again() -> None:
    sizes = [(64, 48), (320, 240), (64, 48)]
    with serving(lambda number: picture(sizes[min(number // 40, 2)], 120)) as address:

        async def work() -> None:
            taken = Taken()
            camera = Camera(CameraConfig(name="a", source=address), on_frame=taken)
            task = asyncio.ensure_future(camera.run())
            await until(lambda: len(taken.frames) > 110)
            seen = [(frame.width, frame.height) for frame in taken.frames]
            assert list(dict.fromkeys(seen)) == sizes[:2]
            assert seen[-1] == sizes[2]
            assert (camera.state, camera.reconnects) == ("live", 0)
            await asyncio.sleep(0.1)
            assert np.allclose(taken.means, 120, atol=2)
            await ended(task)

        go(work())


def test_garbage_is_no_frame_and_another_camera_never_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchship_video.supervisor.LONGEST_PAUSE", 1.0)
    monkeypatch.setattr("torchship_video.supervisor.OPENING", 3.0)
    with serving(lambda _: os.urandom(5000)) as bad, serving(lambda _: picture((64, 48), 90)) as good:

        async def work() -> None:
            taken, steady = Taken(), Taken()
            camera = Camera(CameraConfig(name="a", source=bad), on_frame=taken)
            other = Camera(CameraConfig(name="b", source=good), on_frame=steady)
            tasks = [asyncio.ensure_future(one.run()) for one in (camera, other)]
            await until(lambda: other.state == "live")
            await until(lambda: camera.reconnects >= 2)
            count = len(steady.frames)
            await until(lambda: len(steady.frames) > count + 10)
            assert taken.frames == []
            assert camera.words
            assert (other.state, other.reconnects) == ("live", 0)
            for task in tasks:
                await ended(task)

        go(work())


@pytest.mark.parametrize("grey", [30, 128, 230])
def test_dark_and_bright_of_motion_jpeg_are_as_they_were_sent(grey: int) -> None:
    with serving(lambda _: picture((64, 48), grey)) as address:

        async def work() -> None:
            taken = Taken()
            task = asyncio.ensure_future(Camera(CameraConfig(name="a", source=address), on_frame=taken).run())
            await until(lambda: len(taken.means) > 3)
            assert np.allclose(taken.means, grey, atol=2)  # JPEG has full range, frames of a ring have limited range
            await ended(task)

        go(work())
