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
        size = 10 * width
        place = (float(box[0]), max(0.0, float(box[1]) - size - width))
        around = pen.textbbox(place, name or "unknown", font_size=size)
        pen.rectangle((around[0] - width, around[1] - width, around[2] + width, around[3] + width), fill=colour)
        pen.text(place, name or "unknown", fill=(255, 255, 255), font_size=size)
    return image
