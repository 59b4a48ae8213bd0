"""Motion JPEG for browsers: each frame with its tracks drawn on, as a JPEG that goes back to the host.

The host's routes serve them on the engine's port (see `torchship_video.view`), so that its tokens and limits hold for
pictures as well; drawing and compressing happen here, beside the event loop.
"""

from __future__ import annotations

import time

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig
from torchship_video.drawing import jpeg, picture
from torchship_video.messages import Observation
from torchship_video.sinks import Opening

PIXELS, AGAIN = True, False
LARGEST = 150_000  # bytes of a JPEG: it must fit a socket's buffer


class MjpegOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Pictures are at most `width` wide, have JPEG's `quality`, and come at most `fps` times a second and camera."""

    width: int = 960
    quality: int = 70
    fps: float = 12.0

    def __post_init__(self) -> None:
        if not 16 <= self.width <= 7680 or not 1 <= self.quality <= 95 or not 0 < self.fps <= 120:
            raise BadConfig("sink mjpeg: width is 16 to 7680, quality 1 to 95, fps above 0 and at most 120")


class MotionJpeg:
    """Draws and compresses frames."""

    def __init__(self, options: MjpegOptions, opening: Opening) -> None:
        self._options, self._opening = options, opening
        self._next: dict[str, float] = {}

    def write(self, observation: Observation, pixels: NDArray[np.uint8] | None) -> bytes | None:
        """The frame's picture, or None where it would be one too many in a second."""
        now, camera = time.monotonic(), observation.frame.camera
        due, pause = self._next.get(camera, now), 1 / self._options.fps
        if pixels is None or now < due:
            return None
        self._next[camera] = max(due, now - pause) + pause
        image = picture(pixels, observation, zones=self._opening.zones, lines=self._opening.lines)
        return jpeg(image, quality=self._options.quality, largest=LARGEST)

    def facts(self) -> dict[str, int]:
        """Nothing of its own."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


OPTIONS, SINK = MjpegOptions, MotionJpeg
