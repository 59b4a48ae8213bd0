"""The bytes of a picture to pixels, as if an enemy had sent them: known formats only, limits before decoding."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from torchship.errors import BadInput

_FORMATS = "JPEG, PNG, WebP, GIF or BMP"
_STARTS = (
    (b"\xff\xd8\xff", "Jpeg"),
    (b"\x89PNG\r\n\x1a\n", "Png"),
    (b"RIFF", "WebP"),
    (b"GIF87a", "Gif"),
    (b"GIF89a", "Gif"),
    (b"BM", "Bmp"),
)
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Limits:
    """What is refused before it is decoded: `pixels` counts width times height, `size` the bytes that came in."""

    pixels: int = 64_000_000
    size: int = 32 * 2**20


def decode(data: bytes, *, limits: Limits = Limits(), at_least: int = 0) -> Image.Image:
    """The picture upright, as RGB or L: the first frame, turned as its EXIF says; transparency is dropped.

    `at_least` lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side stays that long:
    much faster, not the same numbers. Raises BadInput for everything that is no picture within the limits.
    """
    if len(data) > limits.size:
        raise BadInput(f"the picture has {len(data)} bytes, at most {limits.size} are taken", hint="send a smaller one")
    try:
        picture = _reader(data)(io.BytesIO(data))
        _check_size(picture, limits)
        if at_least:
            shrink = min(picture.size) / at_least
            picture.draft("RGB", (int(picture.width / shrink), int(picture.height / shrink)))
        picture.load()
    except BadInput:
        raise
    except Exception as fault:  # decoders raise whatever they like on broken files
        raise BadInput(f"the picture is broken: {fault}", hint="was it sent whole?") from None
    return _plain(_upright(picture))


def _reader(data: bytes) -> Callable[[io.BytesIO], ImageFile]:
    """The decoder by the first bytes. Not `Image.open`, which tries every plugin and has a limit of its own."""
    for start, format_name in _STARTS:
        if data.startswith(start) and (format_name != "WebP" or data[8:12] == b"WEBP"):
            plugin = import_module(f"PIL.{format_name}ImagePlugin")
            reader: Callable[[io.BytesIO], ImageFile] = getattr(plugin, f"{format_name}ImageFile")
            return reader
    start_hex = data[:12].hex(" ") or "nothing"
    raise BadInput(f"not a picture (it starts with {start_hex})", hint=f"send the bytes of a {_FORMATS} file")


def _check_size(picture: Image.Image, limits: Limits) -> None:
    width, height = picture.size
    if width * height > limits.pixels:
        raise BadInput(
            f"the picture has {width}x{height} pixels, at most {limits.pixels / 1e6:g} million are taken",
            hint="scale it down before sending, or raise max_pixels of the stage",
        )


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turn = picture.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not spoil the pixels
        return picture
    return ImageOps.exif_transpose(picture) if turn in range(2, 9) else picture


def _plain(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGB", "L"):
        return picture
    if picture.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip, not scale
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    return picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
