"""Pictures: the same numbers as torchvision, and a clear answer to everything that is no picture."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as tv

from torchship.errors import BadConfig, BadInput
from torchship.stages.images import IMAGENET_MEAN, IMAGENET_STD, Classify, Decode, Letterbox, Normalize, Resize, reader
from torchship.stages.picture import PictureLimits, decode
from torchship.tensors import Array, TensorSpec


def photo(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth picture with some noise, the same whichever tests ran before."""
    noise = np.random.default_rng((width, height))
    y, x = np.mgrid[:height, :width]
    planes = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / (width + height)], 2)
    return Image.fromarray((planes + noise.integers(0, 20, planes.shape)).clip(0, 255).astype(np.uint8))


def encoded(picture: Image.Image, format_name: str = "PNG", **options: Any) -> bytes:
    """A picture as a file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, format_name, **options)
    return buffer.getvalue()


def request(*files: bytes) -> Array:
    """A BYTES tensor."""
    found = np.empty(len(files), object)
    found[:] = files
    return found


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (500, 333), (37, 37), (20, 200), (33, 21)])
@pytest.mark.parametrize(("resize", "size"), [(40, 32), (32, 32), (51, 44), (24, 32)])
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_classify_gives_torchvisions_numbers(width: int, height: int, resize: int, size: int, how: Any) -> None:
    picture = photo(width, height)
    reference = tv.Compose(
        [
            tv.Resize(resize, InterpolationMode(how), antialias=True),
            tv.CenterCrop(size),
            tv.PILToTensor(),
            tv.ToDtype(torch.float32, scale=True),
            tv.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )(picture).numpy()
    found = Classify(size=size, resize=resize, interpolation=how)(request(encoded(picture)))[0]
    assert found.shape == reference.shape
    levels = np.abs(found - reference) * np.array(IMAGENET_STD)[:, None, None] * 255
    assert levels.max() < 1.01  # one level in 255, where a rounding falls the other way
    assert levels.mean() < 0.1


def test_options_of_classify() -> None:
    picture = photo()
    squashed = Classify(size=[16, 24], crop="squash", scale=1.0, mean=[127.0], std=[128.0])(request(encoded(picture)))
    wanted = (np.asarray(picture.resize((24, 16), Image.Resampling.BILINEAR), np.float32) - 127) / 128
    np.testing.assert_allclose(squashed[0], wanted.transpose(2, 0, 1), atol=1e-6)
    bgr = Classify(size=[16, 24], crop="squash", scale=1.0, mean=[127.0], std=[128.0], colour="bgr")
    np.testing.assert_array_equal(bgr(request(encoded(picture)))[0], squashed[0][::-1])
    grey = Classify(size=28, colour="grey", mean=[0.0], std=[1.0])(request(encoded(picture), encoded(picture)))
    assert grey.shape == (2, 1, 28, 28)
    assert Classify.declare(size=28, colour="grey") == "image:BYTES[-1] -> pixels:FP32[-1,1,28,28]"


def test_fast_decoding_is_close() -> None:
    data = encoded(photo(1600, 1200), "JPEG", quality=95)
    exact, fast = (Classify(size=64, fast=fast)(request(data)) for fast in (False, True))
    assert 0 < np.abs(exact - fast).max() * 0.225 * 255 < 12


@pytest.mark.parametrize(
    ("mode", "format_name"),
    [
        ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"),
        ("P", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("RGB", "WEBP"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "BMP"),
    ],
)  # fmt: skip
def test_every_mode_becomes_rgb(mode: str, format_name: str) -> None:
    picture = photo()
    if mode == "I;16":
        saved = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) << 8)
    else:
        saved = picture.convert(mode)
    pixels, size = Decode()(request(encoded(saved, format_name)))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 48, 64, 3)
    assert size.tolist() == [[48, 64]]
    if mode != "1":
        grey = np.asarray(picture.convert("L"), float)
        assert np.abs(np.asarray(Image.fromarray(pixels[0]).convert("L"), float) - grey).mean() < 12


def test_only_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Decode()(request(data))[0][0, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = photo(32, 16)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that EXIF's turn undoes
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    found = decode(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(upright))


def turned_by(kind: int, count: int, value: bytes) -> bytes:
    """An EXIF block that says orientation 6, and beside it an odd resolution (a tag, its type, count and value)."""
    inline = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 38)
    entries = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI", 0x11A, kind, count) + inline
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4) + (value if len(value) > 4 else b"")


def segment(marker: int, content: bytes) -> bytes:
    """One segment of a JPEG."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(name: bytes, data: bytes, *, off: int = 0) -> bytes:
    """One chunk of a PNG; its checksum is wrong by `off`."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ off)


SIX = turned_by(3, 1, b"\1")
JPEG_PARTS = {
    "a resolution of -1/0": segment(0xE1, turned_by(10, 1, struct.pack("<ii", -1, 0))),
    "a resolution as text": segment(0xE1, turned_by(2, 3, b"72\0")),
    "a block that ends early": segment(0xE1, SIX[:-8]),
    "half a resource of Photoshop": segment(0xE1, SIX) + segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4"),
    "a profile without a number": segment(0xE1, SIX) + segment(0xE2, b"ICC_PROFILE\0"),
    "half a JFIF": segment(0xE0, b"JFIF\0") + segment(0xE1, SIX),
}
PNG_PARTS = {
    "a profile of 2 MB": chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2 << 20))) + chunk(b"eXIf", SIX[6:]),
    "a text of 2 MB": chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2 << 20))) + chunk(b"eXIf", SIX[6:]),
    "a broken note": chunk(b"tIME", bytes(7), off=1) + chunk(b"eXIf", SIX[6:]),
    "half a gamma": chunk(b"gAMA", b"\0") + chunk(b"eXIf", SIX[6:]),
}


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("what", [*JPEG_PARTS, *PNG_PARTS])
def test_odd_metadata_neither_stops_nor_changes_a_picture(what: str) -> None:
    stored = photo(32, 16)
    if what in JPEG_PARTS:
        plain = encoded(stored, "JPEG", quality=95)
        data = plain[:2] + JPEG_PARTS[what] + plain[2:]
    else:
        plain = encoded(stored)
        data = plain[:33] + PNG_PARTS[what] + plain[33:]
    found, wanted = decode(data), decode(plain).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("data", [b"Exif\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_exif_that_says_nothing_leaves_the_picture_as_it_is(data: bytes) -> None:
    plain = encoded(photo(32, 16), "JPEG")
    assert decode(plain[:2] + segment(0xE1, data) + plain[2:]).size == (32, 16)


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (65_000, 2)])
def test_a_thin_picture_costs_no_more_than_what_is_kept(size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, (255, 0, 0)))
    for resize in (0, 100, 300):
        found = Classify(size=224, resize=resize, mean=[0.0], std=[1.0])(request(data))
        assert found.shape == (1, 3, 224, 224)
        assert found[0, :, 112, 112].tolist() == [1, 0, 0]
    with pytest.raises(BadInput, match="pixels, at most 64 million"):
        Resize(short=256)(decode_pixels(data))


def decode_pixels(data: bytes) -> Array:
    """The pixels of a file."""
    pixels: Array = Decode()(request(data))[0]
    return pixels


@pytest.mark.parametrize("datatype", ["FP32", "UINT8"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_input_is_filled_as_classify_fills_it(datatype: str, channels: int) -> None:
    data = encoded(photo(50, 40))
    found = reader(TensorSpec.parse(f"x:{datatype}[-1,{channels},16,24]"))(data)
    colour: Any = "grey" if channels == 1 else "rgb"
    plain = Classify(size=[16, 24], colour=colour, mean=[0.0], std=[1.0])(request(data))[0]
    if datatype == "UINT8":
        np.testing.assert_array_equal(found, np.rint(plain * 255))
    elif channels == 1:
        np.testing.assert_array_equal(found, plain)
    else:
        np.testing.assert_array_equal(found, Classify(size=[16, 24])(request(data))[0])
    with pytest.raises(BadInput, match="cannot become"):
        reader(TensorSpec.parse("x:FP32[-1,16,24,3]"))


def png_of(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds next to nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a picture (it starts with nothing)"),
        (b"hello, I am text", "not a picture"),
        (b"RIFF\0\0\0\0WAVEfmt ", "not a picture"),
        (b"\xff\xd8\xff\xe0 no more", "broken"),
        (b"\x89PNG\r\n\x1a\n", "broken"),
        (b"GIF89a", "broken"),
        (b"BM", "broken"),
        (encoded(photo(), "JPEG")[:700], "broken"),
        (encoded(photo(), "PNG")[:2000], "broken"),
        (encoded(photo(), "WEBP")[:200], "broken"),
        (png_of(10_000, 10_001), "10000x10001 pixels, at most 64 million"),
        (png_of(2**31 - 1, 2**31 - 1), "pixels"),
        (png_of(0, 10), "broken"),
        (png_of(100, 100), "broken"),
        (b"\xff\xd8\xff" + bytes(33 << 20), "bytes, at most"),
    ],
)
def test_what_is_no_picture_gets_a_clear_answer(data: bytes, words: str) -> None:
    for take in (Decode(), Classify()):
        with pytest.raises(BadInput) as caught:
            take(request(data))
        assert words in str(caught.value)
        assert caught.value.hint


def test_elements_must_be_bytes() -> None:
    with pytest.raises(BadInput, match="row 0 holds str"):
        Decode()(np.array(["text"], object))


def test_one_pixel_is_a_picture() -> None:
    assert Classify()(request(encoded(Image.new("RGB", (1, 1), "red"))))[0, :, 100, 100].argmax() == 0


def test_limits_can_be_set() -> None:
    with pytest.raises(BadInput, match=r"at most 0\.001 million"):
        decode(encoded(photo()), limits=PictureLimits(pixels=1000))


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (640, 2), (1, 640), (3, 3)])
@pytest.mark.parametrize("corner", [False, True])
def test_letterbox_keeps_the_shape_and_remembers_how(width: int, height: int, corner: bool) -> None:
    pixels = np.full((1, height, width, 3), 255, np.uint8)
    box = Letterbox(size=[32, 40], fill=0, corner=corner)
    image, frame = box(pixels)
    assert image.shape == (1, 3, 32, 40)
    ratio, left, top, tall, wide = frame[0].tolist()
    assert (tall, wide) == (height, width)
    assert ratio == pytest.approx(min(32 / height, 40 / width))
    inside = image[0, 0, int(top) : int(top) + max(round(height * ratio), 1), int(left) :]
    assert inside[:, : max(round(width * ratio), 1)].min() == 1
    assert image.sum() == pytest.approx(3 * max(round(height * ratio), 1) * max(round(width * ratio), 1))


def test_letterbox_need_not_enlarge() -> None:
    _, frame = Letterbox(size=32, enlarge=False)(np.zeros((1, 4, 4, 3), np.uint8))
    assert frame[0, 0] == 1


def test_normalize_and_resize() -> None:
    pixels = np.asarray(photo())[None]
    image = Normalize()(pixels)
    wanted = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(image, wanted.transpose(0, 3, 1, 2), atol=1e-5)
    assert Resize(short=24)(pixels).shape == (1, 24, 32, 3)
    assert Resize(size=[10, 20])(pixels).shape == (1, 10, 20, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Classify(size=0),
        lambda: Classify(size=[1, 2, 3]),
        lambda: Classify(interpolation="cubic"),  # type: ignore[arg-type]
        lambda: Classify(colour="cmyk"),  # type: ignore[arg-type]
        lambda: Classify(crop="left"),  # type: ignore[arg-type]
        lambda: Classify(mean=[1, 2]),
        Resize,
        lambda: Resize(size=3, short=3),
    ],
)
def test_wrong_options_are_refused(make: Any) -> None:
    with pytest.raises(BadConfig) as caught:
        make()
    assert caught.value.hint
