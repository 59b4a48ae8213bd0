"""From planes to RGB: whole frames, parts, squares; each against PyAV's own conversion of a whole frame."""

from __future__ import annotations

import numpy as np
import pytest
from av import VideoFrame

from torchship.errors import BadInput
from torchship_video.messages import Frame, Layout
from torchship_video.pixels import Pixels, crop, letterbox, pixel_shape, planes, to_rgb

LAYOUTS: list[Layout] = ["I420", "NV12", "RGB"]
FORMATS = {"I420": "yuv420p", "NV12": "nv12", "RGB": "rgb24"}


def scene(width: int, height: int) -> Pixels:
    """Smooth colours that differ everywhere, so that every shift of a plane is seen."""
    y, x = np.mgrid[0:height, 0:width]
    colours = np.stack([x * 255 / width, y * 255 / height, 255 - x * 128 / width - y * 127 / height], -1)
    return colours.astype(np.uint8)


def laid(rgb: Pixels, layout: Layout) -> tuple[Pixels, Frame]:
    height, width = rgb.shape[:2]
    frame = Frame("door", "r", 0, 2, 0, 0.0, 0.0, width, height, layout)
    if layout == "RGB":
        return rgb, frame
    space = 1 if height >= 720 else 5  # as a camera would: BT.709 for large frames, BT.601 for small ones
    made = VideoFrame.from_ndarray(rgb, "rgb24").reformat(
        format=FORMATS[layout],
        src_color_range="JPEG",
        dst_color_range="MPEG",
        src_colorspace=space,
        dst_colorspace=space,
    )
    pixels: Pixels = np.empty(pixel_shape(width, height, layout), np.uint8)
    for plane, into in zip(made.planes, planes(pixels, width, height, layout), strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
        into.reshape(into.shape[0], -1)[:] = rows[:, : into.reshape(into.shape[0], -1).shape[1]]
    return pixels, frame


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(64, 48), (62, 50), (1280, 720), (34, 30)])
def test_rgb_comes_back(layout: Layout, size: tuple[int, int]) -> None:
    rgb = scene(*size)
    found = to_rgb(*laid(rgb, layout))
    assert found.shape == rgb.shape
    assert np.abs(found.astype(int) - rgb).max() <= 14
    assert np.abs(found.astype(int) - rgb).mean() <= 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("box", [(10, 6, 30, 40), (9.5, 5.2, 31.0, 44.9), (-20, -3, 17, 12), (50, 40, 400, 300)])
def test_a_part_is_the_part_of_the_whole(layout: Layout, box: tuple[float, float, float, float]) -> None:
    pixels, frame = laid(scene(64, 50), layout)
    part = crop(pixels, frame, box)
    grain = 1 if layout == "RGB" else 2
    left, top = (max(0, int(np.floor(edge)) // grain * grain) for edge in box[:2])
    whole = to_rgb(pixels, frame)[top : top + part.shape[0], left : left + part.shape[1]]
    assert part.shape == whole.shape
    assert left + part.shape[1] >= min(64, box[2])
    assert top + part.shape[0] >= min(50, box[3])
    assert np.abs(part.astype(int) - whole).max() <= 8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_is_scaled(layout: Layout) -> None:
    pixels, frame = laid(scene(64, 48), layout)
    part = crop(pixels, frame, (8, 8, 40, 40), size=(16, 24))
    assert part.shape == (24, 16, 3)
    assert np.abs(part.reshape(-1, 3).mean(0) - scene(64, 48)[8:40, 8:40].reshape(-1, 3).mean(0)).max() < 4


def test_a_box_outside_is_refused() -> None:
    with pytest.raises(BadInput, match="has nothing of a frame"):
        crop(*laid(scene(64, 48), "I420"), (70, 0, 80, 20))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(64, 36), (36, 64), (416, 416), (1280, 720)])
def test_a_frame_fits_into_a_square_and_its_boxes_go_back(layout: Layout, size: tuple[int, int]) -> None:
    rgb = scene(*size)
    square, scale, left, top = letterbox(*laid(rgb, layout), 64)
    assert square.shape == (64, 64, 3)
    width, height = round(size[0] * scale), round(size[1] * scale)
    assert max(width, height) == 64
    outside = np.ones((64, 64), bool)
    outside[top : top + height, left : left + width] = False
    assert np.all(square[outside] == 114)
    for x, y in ((5, 5), (size[0] - 6, size[1] - 6), (size[0] // 3, size[1] // 2)):
        there = square[int(top + y * scale), int(left + x * scale)]
        assert np.abs(there.astype(int) - rgb[y, x]).max() <= 25
