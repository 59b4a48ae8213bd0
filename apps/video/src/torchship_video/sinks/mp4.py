"""Annotated video: an MP4 a camera, H.264 by PyAV, in fragments, so that a file whose writer was killed still plays."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig
from torchship_video.drawing import picture
from torchship_video.messages import Frame, Observation
from torchship_video.sinks import Opening
from torchship_video.sinks.files import CameraPaths

PIXELS, AGAIN = True, False
_TICKS = 1000  # of the clock of a file in a second
_FRAGMENTS = {"movflags": "+frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


class Mp4Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`path` is the file, `{camera}` in it the camera's name; one that is there is kept, the next gets a number.

    Pictures are at most `width` wide (0: as they are); `quality` is x264's rate factor, 0 (best) to 51. A file ends
    after `minutes` (0: never), or when the frames change their size. `draw`: tracks, zones and lines are drawn on.
    """

    path: str
    width: int = 0
    quality: int = 26
    minutes: float = 0.0
    draw: bool = True

    def __post_init__(self) -> None:
        if not self.path or not 0 <= self.quality <= 51 or self.minutes < 0 or not 0 <= self.width <= 7680:
            raise BadConfig("sink mp4: it needs a path, quality from 0 to 51, minutes of 0 or more, width up to 7680")


class Mp4:
    """Encodes what was observed."""

    def __init__(self, options: Mp4Options, opening: Opening) -> None:
        self._options, self._opening = options, opening
        self._paths, self._open = CameraPaths(options.path), dict[str, _Mp4File]()
        self._files = 0

    def write(self, observation: Observation, pixels: NDArray[np.uint8] | None) -> None:
        """Encode one frame."""
        if pixels is None:
            return
        shapes = self._opening if self._options.draw else Opening()
        shown = observation if self._options.draw else Observation(observation.frame)
        image = picture(pixels, shown, zones=shapes.zones, lines=shapes.lines)
        image = image.crop((0, 0, image.width // 2 * 2, image.height // 2 * 2))  # what 4:2:0 can hold
        frame = observation.frame
        file = self._open.get(frame.camera)
        minutes = self._options.minutes
        if file is not None and (file.size != image.size or (minutes and file.seconds(frame) >= 60 * minutes)):
            self._open.pop(frame.camera).close()
            file = None
        if file is None:
            path = next(path for path in _numbered(self._paths(frame.camera)) if not path.exists())
            file = self._open[frame.camera] = _Mp4File(path, image.size, frame, quality=self._options.quality)
            self._files += 1
        file.add(np.asarray(image), frame)

    def facts(self) -> dict[str, int]:
        """How many files were begun."""
        return {"files": self._files}

    def close(self) -> None:
        """Finish the files."""
        while self._open:
            self._open.popitem()[1].close()


class _Mp4File:
    """One file while it is written."""

    def __init__(self, path: Path, size: tuple[int, int], first: Frame, *, quality: int) -> None:
        self.size = size
        self._container: Any = av.open(str(path), "w", format="mp4", options=_FRAGMENTS)
        options = {"crf": str(quality), "preset": "veryfast", "tune": "zerolatency", "g": "60"}
        self._stream: Any = self._container.add_stream("libx264", rate=30, options=options)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS)
        self._stream.codec_context.thread_count = 1
        self._start, self._last = first, -1

    def seconds(self, frame: Frame) -> float:
        """How long the file is by the stream's clock, and by the wall where that one was set back."""
        position = frame.position - self._start.position
        return position if position >= 0 else frame.taken - self._start.taken

    def add(self, pixels: NDArray[np.uint8], frame: Frame) -> None:
        """Encode RGB pixels at the frame's time; times only grow."""
        found = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._last = found.pts = max(self._last + 1, round(self.seconds(frame) * _TICKS))
        found.time_base = Fraction(1, _TICKS)
        self._container.mux(self._stream.encode(found))

    def close(self) -> None:
        """Write what the encoder still holds."""
        self._container.mux(self._stream.encode(None))
        self._container.close()


def _numbered(path: Path) -> Iterator[Path]:
    """`a.mp4`, `a-2.mp4`, `a-3.mp4` ..."""
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1


OPTIONS, SINK = Mp4Options, Mp4
