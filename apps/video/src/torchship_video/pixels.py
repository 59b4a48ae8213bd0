"""From the pixels of a frame to what models take: RGB, a part of a frame, a frame fitted into a square.

libswscale converts and scales in one pass, straight from the planes in shared memory. Frames carry no colour space:
those of 720 rows and more are taken for BT.709, smaller ones for BT.601, both with limited range, as players do.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadInput
from torchship_video.messages import Box, Frame, Layout

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.plane import VideoPlane

Pixels: TypeAlias = NDArray[np.uint8]
_FORMATS: dict[Layout, str] = {"I420": "yuv420p", "NV12": "nv12", "RGB": "rgb24"}
_MOST = 2**15  # pixels a side
_local = threading.local()


class Letterboxed(NamedTuple):
    """A frame fitted into a square: `pixels` [side, side, 3]; x of the frame = (x of the square - left) / scale."""

    pixels: Pixels
    scale: float
    left: int
    top: int


def pixel_shape(width: int, height: int, layout: Layout) -> tuple[int, ...]:
    """I420 and NV12: [height * 3/2, width], for even sides; RGB: [height, width, 3]. Raises BadInput."""
    if not (0 < width <= _MOST and 0 < height <= _MOST):
        raise BadInput(f"a frame of {width}x{height}", hint=f"from 1 to {_MOST} pixels a side")
    if layout == "RGB":
        return height, width, 3
    if width % 2 or height % 2:
        raise BadInput(f"a frame of {width}x{height} in {layout}", hint="its sides are even, else use RGB")
    return height * 3 // 2, width


def pixel_bytes(width: int, height: int, layout: Layout) -> int:
    """Bytes of one frame."""
    return int(np.prod(pixel_shape(width, height, layout)))


def to_rgb(pixels: Pixels, frame: Frame) -> Pixels:
    """[height, width, 3]; in the layout RGB the pixels themselves."""
    return pixels if frame.layout == "RGB" else _scaled(pixels, frame, frame.width, frame.height)


def crop(pixels: Pixels, frame: Frame, box: Box, *, size: tuple[int, int] | None = None) -> Pixels:
    """The part of a frame in a box as RGB [height, width, 3], scaled to `size` (width, height) when that is given.

    What lies outside the frame is cut off; in I420 and NV12 the box grows to even edges. Raises BadInput when nothing
    is left.
    """
    grain = 1 if frame.layout == "RGB" else 2
    left, top = (max(0, int(np.floor(edge)) // grain * grain) for edge in box[:2])
    right = min(frame.width, -int(-np.ceil(box[2]) // grain) * grain)
    bottom = min(frame.height, -int(-np.ceil(box[3]) // grain) * grain)
    if right <= left or bottom <= top:
        raise BadInput(f"the box {box} has nothing of a frame of {frame.width}x{frame.height}", hint="clip boxes first")
    part = _part(pixels, frame, (left, top), (right, bottom))
    small = msgspec.structs.replace(frame, width=right - left, height=bottom - top)
    if size is None:
        return np.ascontiguousarray(to_rgb(part, small))
    return _scaled(part, small, *size)


def letterbox(pixels: Pixels, frame: Frame, side: int, *, fill: int = 114) -> Letterboxed:
    """The whole frame as RGB, fitted into a square of `side` with its proportions, in the middle of grey."""
    scale = side / max(frame.width, frame.height)
    width, height = max(1, round(frame.width * scale)), max(1, round(frame.height * scale))
    left, top = (side - width) // 2, (side - height) // 2
    square = np.full((side, side, 3), fill, np.uint8)
    square[top : top + height, left : left + width] = _scaled(pixels, frame, width, height)
    return Letterboxed(square, scale, left, top)


def planes(pixels: Pixels, width: int, height: int, layout: Layout) -> list[Pixels]:
    """Views of the planes: Y, U, V of I420; Y and [height/2, width/2, 2] of NV12; RGB itself."""
    if layout == "RGB":
        return [pixels]
    flat, area = pixels.reshape(-1), width * height
    if layout == "NV12":
        return [pixels[:height], flat[area:].reshape(height // 2, width // 2, 2)]
    quarter = area // 4
    return [pixels[:height], *(flat[area + n * quarter :][:quarter].reshape(height // 2, width // 2) for n in (0, 1))]


def _part(pixels: Pixels, frame: Frame, start: tuple[int, int], end: tuple[int, int]) -> Pixels:
    """The part as a frame of its own in the same layout; a copy of that part alone, but of RGB a view."""
    (left, top), (right, bottom) = start, end
    if frame.layout == "RGB":
        return pixels[top:bottom, left:right]
    part = np.empty(pixel_shape(right - left, bottom - top, frame.layout), np.uint8)
    into = planes(part, right - left, bottom - top, frame.layout)
    whole = planes(pixels, frame.width, frame.height, frame.layout)
    into[0][:] = whole[0][top:bottom, left:right]
    for to, source in zip(into[1:], whole[1:], strict=True):
        to[:] = source[top // 2 : bottom // 2, left // 2 : right // 2]
    return part


def wrap(pixels: Pixels, width: int, height: int, layout: Layout) -> VideoFrame:
    """The pixels as a frame of PyAV without a copy, where PyAV can."""
    from av import VideoFrame

    if layout == "RGB" or not height % 4:
        return VideoFrame.from_numpy_buffer(pixels, _FORMATS[layout])
    made = VideoFrame(width, height, _FORMATS[layout])  # from_numpy_buffer rounds the height down to fours
    for plane, source in zip(made.planes, planes(pixels, width, height, layout), strict=True):
        packed = source.reshape(source.shape[0], -1)
        rows_of(plane)[:, : packed.shape[1]] = packed
    return made


def rows_of(plane: VideoPlane) -> Pixels:
    """The memory of a plane of PyAV, [height, bytes of a line]: lines may be longer than the picture is wide."""
    flat: Pixels = np.frombuffer(memoryview(plane), np.uint8)
    return flat.reshape(plane.height, plane.line_size)


def _scaled(pixels: Pixels, frame: Frame, width: int, height: int) -> Pixels:
    """RGB [height, width, 3]."""
    from av.video.reformatter import Colorspace, VideoReformatter

    reformatter = getattr(_local, "reformatter", None)
    if reformatter is None:
        reformatter = _local.reformatter = VideoReformatter()
    space = Colorspace.ITU709 if frame.height >= 720 else Colorspace.ITU601
    made = reformatter.reformat(
        wrap(pixels, frame.width, frame.height, frame.layout),
        width,
        height,
        "rgb24",
        src_colorspace=space,
        dst_colorspace=space,
        src_color_range="MPEG",
        dst_color_range="JPEG",
        threads=1,
    )
    return np.ascontiguousarray(rows_of(made.planes[0])[:, : width * 3]).reshape(height, width, 3)
