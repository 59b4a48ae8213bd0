"""The bytes of a picture to pixels, as if an enemy had sent them: known formats only, limits before decoding."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

from torchship.errors import BadInput

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_FORMATS = "JPEG, PNG, WebP, GIF or BMP"
_PNG = b"\x89PNG\r\n\x1a\n"
_STARTS = (
    (b"\xff\xd8\xff", "Jpeg"),
    (_PNG, "Png"),
    (b"RIFF", "WebP"),
    (b"GIF87a", "Gif"),
    (b"GIF89a", "Gif"),
    (b"BM", "Bmp"),
)
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class PictureLimits:
    """What is refused before it is decoded: `pixels` counts width times height, `size` the bytes that came in."""

    pixels: int = 64_000_000
    size: int = 32 * 2**20


def picture_files(folder: Path, *, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """What is named like a picture below a folder, in the order of names: links are followed, hidden names left out.

    A folder comes too where it cannot be read, links back to one `above` it (device and inode), or is named like a
    picture and holds none: as a dangling link does, it says what is wrong when it is read.
    """
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))  # ._x.jpg is a Mac's note
        where = folder.stat()
    except OSError:
        yield folder
        return
    above |= {(where.st_dev, where.st_ino)}
    for path in inside:
        if path.is_dir():
            there = path.stat()
            below = [path] if (there.st_dev, there.st_ino) in above else list(picture_files(path, above=above))
            yield from below or ([path] if path.suffix.lower() in SUFFIXES else [])
        elif path.suffix.lower() in SUFFIXES:
            yield path


def read_file(path: Path) -> bytes:
    """The bytes of a file that `picture_files` found. Raises BadInput."""
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise BadInput(f"{path} is a folder, not a picture", hint="a link to one above, or an empty one?") from None
    except OSError as fault:
        raise BadInput(f"{path}: {fault.strerror}", hint="is it a link to what is gone?") from None


def decode(data: bytes, *, limits: PictureLimits = PictureLimits(), at_least: int = 0) -> Image.Image:
    """The picture upright, as RGB or L: the first frame, turned as its EXIF says; transparency is dropped.

    Broken or huge metadata (EXIF, profiles, comments) neither changes nor stops a picture.
    `at_least` lets a JPEG be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter side stays that long:
    much faster, not the same numbers. Raises BadInput for everything that is no picture within the limits.
    """
    if len(data) > limits.size:
        raise BadInput(f"the picture has {len(data)} bytes, at most {limits.size} are taken", hint="send a smaller one")
    reader = _reader(data)
    try:
        picture = _loaded(reader, data, limits, at_least)
    except BadInput:
        raise
    except Exception as fault:  # decoders raise whatever they like on broken files
        try:
            picture = _loaded(reader, without_metadata(data), limits, at_least)
        except Exception:  # it was not the metadata
            raise BadInput(f"the picture is broken: {fault}", hint="was it sent whole?") from None
    return _plain(_upright(picture))


def _loaded(reader: Callable[[io.BytesIO], ImageFile], data: bytes, limits: PictureLimits, at_least: int) -> ImageFile:
    picture = reader(io.BytesIO(data))
    check_size(*picture.size, limits=limits)
    if at_least:
        shrink = min(picture.size) / at_least
        picture.draft("RGB", (int(picture.width / shrink), int(picture.height / shrink)))
    picture.load()
    return picture


def _reader(data: bytes) -> Callable[[io.BytesIO], ImageFile]:
    """The decoder by the first bytes. Not `Image.open`, which tries every plugin and has a limit of its own."""
    for start, format_name in _STARTS:
        if data.startswith(start) and (format_name != "WebP" or data[8:12] == b"WEBP"):
            plugin = import_module(f"PIL.{format_name}ImagePlugin")
            reader: Callable[[io.BytesIO], ImageFile] = getattr(plugin, f"{format_name}ImageFile")
            return reader
    start_hex = data[:12].hex(" ") or "nothing"
    raise BadInput(f"not a picture (it starts with {start_hex})", hint=f"send the bytes of a {_FORMATS} file")


def check_size(width: int, height: int, *, limits: PictureLimits = PictureLimits()) -> None:
    """Raises BadInput for a picture, sent or to be made, of more pixels than `limits` allow."""
    if width * height > limits.pixels:
        raise BadInput(
            f"the picture has {width}x{height} pixels, at most {limits.pixels / 1e6:g} million are taken",
            hint="scale it down before sending, or raise max_pixels of the stage",
        )


def without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG with the parts alone that its upright pixels depend on; other files as they are.

    Kept are the critical chunks of a PNG (PNG 3rd edition, 5.4) and its EXIF, of a JPEG all but its application
    segments and comments (ITU-T T.81, B.2.4), of which EXIF (APP1) and the colour transform (Adobe's APP14) are kept.
    """
    kept = bytearray(data[:8] if data.startswith(_PNG) else data[:2])
    place = len(kept)
    if data.startswith(_PNG):
        while place + 12 <= len(data):
            end = place + 12 + int.from_bytes(data[place : place + 4])
            name, checksum = data[place + 4 : place + 8], int.from_bytes(data[end - 4 : end])
            if not name[0] & 0x20 or (name == b"eXIf" and crc32(data[place + 4 : end - 4]) == checksum):
                kept += data[place:end]
            place = end
        return bytes(kept)
    if not data.startswith(b"\xff\xd8"):
        return data
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] != b"\xda":  # up to the start of scan
        marker = data[place + 1]
        end = place + (1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4]))  # FF fills
        exif = marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0"
        if exif or marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept += data[place:end]
        place = end
    return bytes(kept) + data[place:]


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(picture.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a broken EXIF block, or an orientation that is no number
        return picture
    return picture if turn is None else picture.transpose(turn)


def _plain(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGB", "L"):
        return picture
    if picture.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip, not scale
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    return picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
