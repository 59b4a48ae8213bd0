"""Boxes, numbers, identities, zones and lines drawn on a frame, by Pillow alone."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from torchship_video.messages import Observation, Track
from torchship_video.zones import LineConfig, Point, ZoneConfig

Color = tuple[int, int, int]
_GOLDEN = 0.618034  # of a circle: successive hues by it are far apart
_QUIET: Color = (150, 150, 150)
_SHAPES: Color = (255, 200, 40)
_DARK: Color = (16, 16, 16)


def color_of(number: int) -> Color:
    """A colour of a track's or identity's own, the same everywhere."""
    red, green, blue = colorsys.hsv_to_rgb(number * _GOLDEN % 1.0, 0.75, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def caption(track: Track) -> str:
    """What is written on a track's box: `#identity (number)`, a question mark where it is ambiguous."""
    if track.identity:
        return f"#{track.identity}{'?' if track.ambiguous else ''} ({track.number})"
    return f"{track.label} {track.number}" if track.confirmed else track.label


def picture(
    pixels: NDArray[np.uint8],
    observation: Observation,
    *,
    zones: Iterable[ZoneConfig] = (),
    lines: Iterable[LineConfig] = (),
) -> Image.Image:
    """The frame `pixels` (RGB [height, width, 3], perhaps made smaller) with all that is known of it drawn on.

    Boxes have the colour of their identity, or of the track while that is unknown; tracks that are not confirmed are
    grey, boxes that are predicted are thin.
    """
    frame = observation.frame
    image = Image.fromarray(pixels)
    scale = image.width / frame.width
    pen = ImageDraw.Draw(image)
    thick = max(1, round(image.height / 240))
    font = _font(max(10, image.height // 36))
    shapes: list[ZoneConfig | LineConfig] = [*zones, *lines]
    for shape in shapes:
        if shape.camera in ("", frame.camera):
            _draw_shape(pen, shape, image.size, thick=thick, font=font)
    for track in sorted(observation.tracks, key=lambda track: track.box[3]):  # the nearest one on top
        _draw_track(pen, track, scale, thick=thick, font=font)
    return image


def jpeg(image: Image.Image, *, quality: int = 75, largest: int = 0) -> bytes:
    """A picture as JPEG of `largest` bytes at most (0: any), at a lower quality where it must be."""
    while True:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        if not largest or out.tell() <= largest or quality <= 15:
            return out.getvalue()
        quality -= 15


def _draw_track(
    pen: ImageDraw.ImageDraw, track: Track, scale: float, *, thick: int, font: ImageFont.FreeTypeFont
) -> None:
    left, right = sorted((track.box[0] * scale, track.box[2] * scale))
    top, bottom = sorted((track.box[1] * scale, track.box[3] * scale))
    color = color_of(track.identity or track.number) if track.confirmed else _QUIET
    pen.rectangle((left, top, right, bottom), outline=color, width=thick if track.seen else 1)
    if track.confirmed:
        _label(pen, (left, top), caption(track), color, font=font)


def _draw_shape(
    pen: ImageDraw.ImageDraw,
    shape: ZoneConfig | LineConfig,
    size: tuple[int, int],
    *,
    thick: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    def placed(point: Point) -> Point:
        return point[0] / shape.size[0] * size[0], point[1] / shape.size[1] * size[1]

    if isinstance(shape, ZoneConfig):
        corners = [placed(point) for point in shape.points]
        pen.line([*corners, corners[0]], fill=_SHAPES, width=thick)
        _label(pen, min(corners, key=lambda corner: corner[1]), shape.name, _SHAPES, font=font)
        return
    start, end = placed(shape.start), placed(shape.end)
    pen.line((start, end), fill=_SHAPES, width=thick)
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    length = max(1.0, float(np.hypot(end[0] - start[0], end[1] - start[1])))
    right = (start[1] - end[1]) / length * thick * 10, (end[0] - start[0]) / length * thick * 10
    pen.line((middle, (middle[0] + right[0], middle[1] + right[1])), fill=_SHAPES, width=thick)  # towards `in`
    _label(pen, start, shape.name, _SHAPES, font=font)


def _label(pen: ImageDraw.ImageDraw, place: Point, text: str, color: Color, *, font: ImageFont.FreeTypeFont) -> None:
    """Text on a plate of a colour, above a place, or below it where there is no room."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, place[0])
    y = place[1] - height if place[1] >= height else max(0.0, place[1])
    pen.rectangle((x, y, x + width, y + height), fill=color)
    pen.text((x + 2 - left, y + 2 - top), text, fill=_DARK, font=font)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)  # noqa: S101  (Pillow's wheels have FreeType)
    return found
