"""What the tests of the flow share: a camera that decodes a file in a process of its own, and pictures to decode."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np

from torchship import process
from torchship.stage import stage
from torchship.tensors import Array
from torchship_video import mount, ring
from torchship_video.config import CameraConfig, convert
from torchship_video.messages import Frame, decode, encode
from torchship_video.pixels import pixel_bytes, planes, rows_of
from torchship_video.ring import RingWriter


def make_video(path: Path, *, frames: int = 40, width: int = 320, height: int = 240, rate: int = 25) -> Path:
    """A video of a bright square that goes from left to right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "ultrafast"}
        for number in range(frames):
            pixels = np.full((height, width, 3), 40, np.uint8)
            left = number * (width - 60) // max(1, frames)
            pixels[80:160, left : left + 60] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@stage("frame:BYTES[1,1] -> boxes:FP32[0..,4], scores:FP32[0..], labels:BYTES[0..]")
def bright(frame: Array, *, score_threshold: float = 0.1) -> tuple[Array, Array, Array]:
    """A detector of the square of `make_video`."""
    one = decode(frame[0, 0])
    with ring.read(one) as pixels:
        rows, columns = np.nonzero(pixels[: one.height] > 128)
    boxes = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]] if len(rows) else [], np.float32)
    count = len(boxes)
    return boxes.reshape(-1, 4), np.full(count, 0.9, np.float32), np.array([b"person"] * count, np.object_)


def serving(cameras: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A server whose detector is `bright`."""
    watch = convert({"camera": cameras, "http_port": 0, "identity": {"on": False}, **more})
    data: dict[str, Any] = msgspec.to_builtins(mount.serving(watch))
    data["model"][0] = {"name": "detect", "run": "apps.video.tests.video_kit:bright"}
    return data


class FileFeed:
    """A camera's feed: the child decodes; where it dies, another goes on from the beginning."""

    def __init__(self, config: CameraConfig, on_frame: Callable[[Frame], None]) -> None:
        self._config, self._on_frame = config, on_frame
        self.state: Any = "opening"
        self.words, self.starts = "", 0
        self.child: Any = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while self.state != "ended":
            self.starts += 1
            argument = {"config": msgspec.to_builtins(self._config)}
            self.child, sock = process.converse("apps.video.tests.video_kit:decode_file", argument=argument, threads=1)
            sock.setblocking(False)
            self._sock = sock
            try:
                while data := await loop.sock_recv(sock, 1 << 16):
                    if data == b"end":
                        self.state = "ended"
                        break
                    self.state = "live"
                    if data == b"lost":
                        self.release()
                        continue
                    self._on_frame(decode(data))
            except ConnectionError:
                pass
            finally:
                if self.state != "ended":
                    sock.close()
                    process.stop(self.child)
        try:
            await asyncio.Event().wait()
        finally:
            sock.close()
            process.stop(self.child)

    def release(self, _: Frame | None = None) -> None:
        with suppress(OSError):
            self._sock.send(b"free")

    def pause(self) -> None:
        self.state = "paused"

    def resume(self) -> None:
        self.state = "opening"


def decode_file(argument: dict[str, Any], sock: socket.socket) -> None:
    """The child's side."""
    config = msgspec.convert(argument["config"], CameraConfig)
    ring, sequence, began = None, 0, time.monotonic()
    with av.open(config.source) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", config.options.get("threads", 1)
        pause = 1 / float(stream.average_rate or 25)
        while True:
            for picture in container.decode(video=0):
                if ring is None:
                    ring = RingWriter.make(size=pixel_bytes(picture.width, picture.height, "I420"))
                if sequence >= ring.slots - 1:
                    sock.recv(16)  # one was released
                while (slot := ring.claim()) is None:
                    if not config.live:
                        time.sleep(0.002)
                        continue
                    break
                if slot is None:
                    sock.send(b"lost")
                else:
                    into = slot.pixels(picture.width, picture.height, "I420")
                    for plane, to in zip(
                        picture.planes, planes(into, picture.width, picture.height, "I420"), strict=True
                    ):
                        to[:] = rows_of(plane)[:, : to.shape[1]]
                    frame = slot.publish(config.name, sequence=sequence, position=sequence * pause)
                    sock.send(encode(frame))
                sequence += 1
                if config.realtime:
                    time.sleep(max(0.0, began + sequence * pause - time.monotonic()))
            if not config.loop:
                break
            container.seek(0)
    sock.send(b"end")
    while sock.recv(16):  # the ring lives as long as its writer
        pass
