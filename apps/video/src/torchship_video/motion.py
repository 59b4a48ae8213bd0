"""Where on a frame to look, and whether anything has changed there since: decided on a few thousand pixels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from torchship.tensors import Array
from torchship_video.messages import Box, Frame

_WIDE, _HIGH = 96, 54  # samples
_STEP = 20  # of 255; less is noise
_LEARN = 0.1  # share of the newest frame in what is remembered


class Region:
    """The part of a camera's frames that counts: a polygon, its corners as shares of width and height."""

    def __init__(self, corners: Sequence[tuple[float, float]]) -> None:
        self.all = not corners
        picture = Image.new("1", (_WIDE * 4, _HIGH * 4), int(self.all))
        if corners:
            scaled = [(x * (picture.width - 1), y * (picture.height - 1)) for x, y in corners]
            ImageDraw.Draw(picture).polygon(scaled, fill=1)
        self._mask: Array = np.asarray(picture, bool)
        self.samples: Array = self._mask[2::4, 2::4]

    def stands(self, boxes: Array, frame: Frame) -> Array:
        """Which boxes [n, 4] in pixels of a frame stand in the region: the middle of the lower edge does."""
        if self.all:
            return np.ones(len(boxes), bool)
        high, wide = self._mask.shape
        x = np.clip((boxes[:, 0] + boxes[:, 2]) / 2 / frame.width * wide, 0, wide - 1).astype(int)
        y = np.clip(boxes[:, 3] / frame.height * high, 0, high - 1).astype(int)
        return np.asarray(self._mask[y, x])

    def holds(self, box: Box, frame: Frame) -> bool:
        """The same of one box."""
        return bool(self.stands(np.asarray([box], np.float32), frame)[0])


class MotionGate:
    """Says whether the brightness of at least a `share` of the region has changed, and then for `hold` seconds more."""

    def __init__(self, share: float, *, hold: float, region: Region) -> None:
        self._share, self._hold, self._region = share, hold, region
        self._before: Array | None = None
        self._until = -np.inf

    def moves(self, pixels: Array, frame: Frame, seconds: float) -> bool:
        """Look at the next frame, at `seconds`; the first one always counts."""
        plane = pixels[..., 1] if frame.layout == "RGB" else pixels[: frame.height]
        rows = np.arange(_HIGH) * frame.height // _HIGH
        columns = np.arange(_WIDE) * frame.width // _WIDE
        now = plane[np.ix_(rows, columns)].astype(np.float32)
        before, self._before = self._before, now
        if before is None:
            self._until = seconds + self._hold
            return True
        self._before = before + _LEARN * (now - before)
        changed = (np.abs(now - before) > _STEP) & self._region.samples
        if changed.sum() > self._share * max(1, self._region.samples.sum()):
            self._until = seconds + self._hold
        return seconds <= self._until
