"""Journey: RTSP cameras that work, lose their power and come back, or accept and say nothing."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
from apps.video.tests.camera_kit import Taken, ended, go, until

from torchship_video.config import CameraConfig
from torchship_video.supervisor import Camera

SERVER = Path(__file__).parents[1] / "rtsp_server.py"
PYTHON = "/usr/bin/python3"


class Power:
    """A camera's power switch."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._process: subprocess.Popen[str] | None = None

    def on(self) -> None:
        words = [PYTHON, "-I", str(SERVER), str(self.port)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            if self._process.wait() == 77:
                pytest.skip("needs GStreamer's RTSP server: python3-gst-1.0, gir1.2-gst-rtsp-server-1.0")
            pytest.fail("the RTSP server did not start")

    def off(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture
def powers() -> Iterator[list[Power]]:
    if not Path(PYTHON).exists():
        pytest.skip(f"needs {PYTHON}")
    made = [Power(free_port()), Power(free_port())]
    try:
        for power in made:
            power.on()
        yield made
    finally:
        for power in made:
            power.off()


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_camera_whose_power_fails_comes_back_and_another_never_stops(
    monkeypatch: pytest.MonkeyPatch, powers: list[Power], transport: Literal["tcp", "udp"]
) -> None:
    monkeypatch.setattr("torchship_video.supervisor.LONGEST_PAUSE", 1.0)
    monkeypatch.setattr("torchship_video.supervisor.STALLED", 2.0)

    async def work() -> None:
        taken, steady = Taken(), Taken()
        cameras = [
            Camera(
                CameraConfig(
                    name=f"c{at}", source=f"rtsp://ann:secret@127.0.0.1:{power.port}/test", transport=transport
                ),
                on_frame=flow,
            )
            for at, (power, flow) in enumerate(zip(powers, (taken, steady), strict=True))
        ]
        tasks = [asyncio.ensure_future(camera.run()) for camera in cameras]
        await until(lambda: len(taken.frames) > 20 and len(steady.frames) > 20)
        assert (taken.frames[0].width, taken.frames[0].height) == (320, 240)
        powers[0].off()
        await until(lambda: cameras[0].state == "reconnecting")
        assert "secret" not in cameras[0].words
        before, meanwhile = len(taken.frames), len(steady.frames)
        await until(lambda: cameras[0].reconnects >= 2 and len(steady.frames) > meanwhile + 10)
        powers[0].on()
        await until(lambda: len(taken.frames) > before + 20)
        assert cameras[0].state == "live"
        assert taken.numbers == sorted(set(taken.numbers))
        assert (cameras[1].state, cameras[1].reconnects) == ("live", 0)
        assert steady.numbers == sorted(set(steady.numbers))
        for task in tasks:
            await ended(task)

    go(work())


def test_a_camera_that_accepts_and_says_nothing_is_left_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchship_video.supervisor.LONGEST_PAUSE", 1.0)
    monkeypatch.setattr("torchship_video.supervisor.OPENING", 1.0)

    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            config = CameraConfig(name="a", source=f"rtsp://127.0.0.1:{silent.getsockname()[1]}/test")
            camera = Camera(config, on_frame=Taken())
            task = asyncio.ensure_future(camera.run())
            await until(lambda: camera.reconnects >= 2)
            assert "no frame for" in camera.words
            await ended(task)
            assert camera.pid is None

    go(work())
