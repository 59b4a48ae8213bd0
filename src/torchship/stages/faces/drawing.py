"""Draws found faces onto their picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from torchship.stages.picture import Limits, decode
from torchship.tensors import Tensors

_KNOWN, _UNKNOWN, _POINT = (46, 160, 67), (207, 34, 46), (255, 212, 0)


def draw(picture: bytes, found: Tensors, *, names: Sequence[str] = ()) -> Image.Image:
    """The picture with boxes, points, and the name of each face (empty: unknown)."""
    image = decode(picture, limits=Limits()).convert("RGB")
    pen = ImageDraw.Draw(image)
    width = max(2, min(image.size) // 250)
    for row, (box, points) in enumerate(zip(found["box"], found["points"], strict=True)):
        name = names[row] if row < len(names) else ""
        colour = _KNOWN if name else _UNKNOWN
        pen.rectangle([float(value) for value in box], outline=colour, width=width)
        for x, y in points:
            pen.ellipse((x - width, y - width, x + width, y + width), fill=_POINT)
        place = (float(box[0]) + width, max(0.0, float(box[1]) - 8 * width))
        pen.text(place, name or "unknown", fill=colour, font_size=7 * width)
    return image
