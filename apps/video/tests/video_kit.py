"""What the tests of the flow share: a camera that decodes a file in a process of its own, and pictures to decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np

from torchship.stage import stage
from torchship.tensors import Array
from torchship_video import mount, ring
from torchship_video.config import convert
from torchship_video.messages import decode


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
