"""Pictures in, tensors out: decoding, and the resizing and normalizing that classifiers were trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from torchship.errors import BadConfig, BadInput
from torchship.stage import stage
from torchship.stages.picture import PictureLimits, check_size, decode
from torchship.tensors import Array, TensorSpec

Size: TypeAlias = int | Sequence[int]
Filter: TypeAlias = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Colour: TypeAlias = Literal["rgb", "bgr", "grey"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_WHOLE = 64  # times the pixels that stay: so large may a picture become before it is cut


@stage("image:BYTES[1] -> pixels:UINT8[1,-1,-1,3], size:INT64[1,2]")
@dataclass(kw_only=True, eq=False)
class Decode:
    """The bytes of one picture to `pixels` (height, width, RGB) and its `size` (height, width) in pixels.

    JPEG, PNG, WebP, GIF (first frame), BMP; turned as EXIF says; grey, palette, RGBA and CMYK become RGB.
    Raises BadInput for anything else, or above `max_pixels` or `max_bytes`.
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 32 * 2**20

    def __call__(self, image: Array) -> tuple[Array, Array]:
        picture = decode(element(image), limits=PictureLimits(self.max_pixels, self.max_bytes)).convert("RGB")
        pixels = np.asarray(picture)[None]
        return pixels, np.asarray([pixels.shape[1:3]], np.int64)


@stage("image:BYTES[-1] -> pixels:FP32[-1,3,-1,-1]", batched=True, max_batch=1)
@dataclass(kw_only=True, eq=False)
class Classify:
    """The bytes of pictures to what a classifier takes: the numbers of torchvision's ImageClassification transform.

    The shorter side is resized to `resize` pixels (0: `size`), the centre of `size` is cut out (`crop="center"`), or
    the whole picture is squeezed into `size` (`crop="squash"`); then (pixel * scale - mean) / std for each channel.
    `fast` decodes a JPEG at a fraction of its size where that still leaves twice the pixels needed: up to 2 times
    faster on large photos, numbers differ by a few levels in 255.
    """

    size: Size = 224
    resize: int = 0
    crop: Literal["center", "squash"] = "center"
    interpolation: Filter = "bilinear"
    colour: Colour = "rgb"
    scale: float = 1 / 255
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    fast: bool = False
    max_pixels: int = 64_000_000
    max_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        self._height, self._width = _pair(self.size)
        self._short = self.resize or min(self._height, self._width)
        self._filter = _filter(self.interpolation)
        self._normalize = Normalize(colour=self.colour, scale=self.scale, mean=self.mean, std=self.std)
        self._limits = PictureLimits(self.max_pixels, self.max_bytes)
        if self.crop not in ("center", "squash"):
            raise BadConfig(f"crop is {self.crop!r}", hint="use center or squash")

    @classmethod
    def declare(cls, *, size: Size = 224, colour: Colour = "rgb", **_: object) -> str:
        """The signature for these options."""
        height, width = _pair(size)
        return f"image:BYTES[-1] -> pixels:FP32[-1,{1 if colour == 'grey' else 3},{height},{width}]"

    def __call__(self, image: Array) -> Array:
        pixels = np.empty((len(image), self._normalize.channels, self._height, self._width), np.float32)
        for row in range(len(image)):
            self._normalize.fill(pixels[row], self._fit(element(image, row)))
        return pixels

    def _fit(self, data: bytes) -> Image.Image:
        least = 2 * max(self._short, self._height, self._width) if self.fast else 0
        picture = decode(data, limits=self._limits, at_least=least)
        if self.crop == "squash":
            return picture.resize((self._width, self._height), self._filter)
        return resize_and_crop(picture, short=self._short, height=self._height, width=self._width, how=self._filter)


@stage("pixels:UINT8[1,-1,-1,3] -> image:FP32[1,3,-1,-1], frame:FP32[1,5]")
@dataclass(kw_only=True, eq=False)
class Letterbox:
    """One picture, kept in shape, into a square (or `size=[height, width]`) with borders of `fill`, for detectors.

    `frame` remembers how: scale, left border, top border (pixels of the result), height and width of the original;
    `torchship.stages.boxes` scales boxes back with it. `enlarge=false` never makes a picture larger.
    """

    size: Size = 640
    fill: int = 114
    corner: bool = False
    enlarge: bool = True
    interpolation: Filter = "bilinear"
    colour: Colour = "rgb"
    scale: float = 1 / 255
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        self._height, self._width = _pair(self.size)
        self._filter = _filter(self.interpolation)
        self._normalize = Normalize(colour=self.colour, scale=self.scale, mean=self.mean, std=self.std)

    @classmethod
    def declare(cls, *, size: Size = 640, colour: Colour = "rgb", **_: object) -> str:
        """The signature for these options."""
        height, width = _pair(size)
        planes = 1 if colour == "grey" else 3
        return f"pixels:UINT8[1,-1,-1,3] -> image:FP32[1,{planes},{height},{width}], frame:FP32[1,5]"

    def __call__(self, pixels: Array) -> tuple[Array, Array]:
        height, width = pixels.shape[1:3]
        ratio = min(self._height / height, self._width / width)
        ratio = ratio if self.enlarge else min(ratio, 1.0)
        inner = max(round(width * ratio), 1), max(round(height * ratio), 1)
        left, top = (0, 0) if self.corner else ((self._width - inner[0]) // 2, (self._height - inner[1]) // 2)
        canvas = Image.new("RGB", (self._width, self._height), (self.fill,) * 3)
        canvas.paste(Image.fromarray(pixels[0]).resize(inner, self._filter), (left, top))
        image = np.empty((1, self._normalize.channels, self._height, self._width), np.float32)
        self._normalize.fill(image[0], canvas)
        return image, np.asarray([[ratio, left, top, height, width]], np.float32)


@stage("pixels:UINT8[-1,-1,-1,3] -> image:FP32[-1,3,-1,-1]")
@dataclass(kw_only=True, eq=False)
class Normalize:
    """Pixels of one size (height, width, RGB) to channels first: (pixel * scale - mean) / std."""

    colour: Colour = "rgb"
    scale: float = 1 / 255
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.colour not in ("rgb", "bgr", "grey"):
            raise BadConfig(f"colour is {self.colour!r}", hint="use rgb, bgr or grey")
        self.channels = 1 if self.colour == "grey" else 3
        for values in (self.mean, self.std):
            if len(values) not in (1, self.channels):
                text = f"{len(values)} numbers for {self.channels} channels"
                raise BadConfig(text, hint="give mean and std one number a channel")
        means, stds = (np.broadcast_to(np.asarray(v, np.float32), self.channels) for v in (self.mean, self.std))
        levels = np.arange(256, dtype=np.float32) * np.float32(self.scale)
        if self.scale == 1 / 255:
            levels = np.arange(256, dtype=np.float32) / np.float32(255)  # as torchvision divides
        # one table of 256 numbers a channel: exact, and several times faster
        self._tables = [(levels - m) / s for m, s in zip(means, stds, strict=True)]

    @classmethod
    def declare(cls, *, colour: Colour = "rgb", **_: object) -> str:
        """The signature for these options."""
        return f"pixels:UINT8[-1,-1,-1,3] -> image:FP32[-1,{1 if colour == 'grey' else 3},-1,-1]"

    def __call__(self, pixels: Array) -> Array:
        image = np.empty((len(pixels), self.channels, *pixels.shape[1:3]), np.float32)
        for row in range(len(pixels)):
            self.fill(image[row], Image.fromarray(pixels[row]))
        return image

    def fill(self, planes: Array, picture: Image.Image) -> None:
        """Make `picture` the numbers of `planes`, FP32 [channels, height, width]."""
        plain = picture.convert("L" if self.channels == 1 else "RGB")
        pixels = np.asarray(plain).reshape(picture.height, picture.width, self.channels)
        order = (2, 1, 0) if self.colour == "bgr" else range(self.channels)
        for table, channel, plane in zip(self._tables, order, planes, strict=True):
            np.take(table, pixels[..., channel], out=plane, mode="clip")


@stage("pixels:UINT8[1,-1,-1,3] -> resized:UINT8[1,-1,-1,3]")
@dataclass(kw_only=True, eq=False)
class Resize:
    """One picture to `size` (height and width), or with `short` its shorter side to so many pixels.

    Raises BadInput for a picture so thin that the result would have more than `max_pixels`.
    """

    size: Size | None = None
    short: int = 0
    interpolation: Filter = "bilinear"
    max_pixels: int = 64_000_000

    def __post_init__(self) -> None:
        if (self.size is None) == (not self.short):
            raise BadConfig("Resize needs either size or short", hint="size = [480, 640], or short = 256")
        self._pair = None if self.size is None else _pair(self.size)
        self._filter = _filter(self.interpolation)

    def __call__(self, pixels: Array) -> Array:
        picture = Image.fromarray(pixels[0])
        height, width = self._pair or _short_side(picture, self.short)
        check_size(width, height, limits=PictureLimits(self.max_pixels))
        return np.asarray(picture.resize((width, height), self._filter))[None]


def reader(spec: TensorSpec, *, mean: Sequence[float] = (), std: Sequence[float] = ()) -> Callable[[bytes], Array]:
    """What makes the bytes of a picture one row of the model's input `spec`, as `Classify` does by default.

    A row is [channels, height, width]. `spec` is FP32 or UINT8 (plain pixels), [rows, 1 or 3, height, width]; a free
    side has 224 pixels. `mean` and `std` are ImageNet's, of grey pictures 0 and 1, where not given. Raises BadInput for
    another `spec`.
    """
    shape, plain = spec.shape, spec.dtype == "UINT8"
    if spec.dtype not in ("FP32", "UINT8") or len(shape) != 4 or shape[1] not in (1, 3):
        raise BadInput(f"a picture cannot become {spec}", hint="an input of FP32[-1,3,height,width] can take one")
    grey = shape[1] == 1
    stage = Classify(
        size=[side if isinstance(side, int) else 224 for side in shape[2:]],
        colour="grey" if grey else "rgb",
        scale=1.0 if plain else 1 / 255,
        mean=mean or ((0.0,) if grey or plain else IMAGENET_MEAN),
        std=std or ((1.0,) if grey or plain else IMAGENET_STD),
    )

    def read(data: bytes) -> Array:
        row = np.empty(1, object)
        row[0] = data
        pixels: Array = stage(row)[0].astype(np.uint8 if plain else np.float32, copy=False)
        return pixels

    return read


def resize_and_crop(picture: Image.Image, *, short: int, height: int, width: int, how: Image.Resampling) -> Image.Image:
    """torchvision's Resize(short) and CenterCrop([height, width]).

    When scaling down, only the pixels that stay are computed: 2 to 3 times faster, and equal but for a few ties that
    round the other way (one level in 255). So is what a thin picture would be too large for otherwise.
    """
    tall, wide = _short_side(picture, short)
    left, top = round(max(wide - width, 0) / 2), round(max(tall - height, 0) / 2)
    inner = min(width, wide), min(height, tall)
    if short >= min(picture.size) and tall * wide <= _WHOLE * height * width:
        fitted = picture.resize((wide, tall), how).crop((left, top, left + inner[0], top + inner[1]))
    else:
        x, y = picture.width / wide, picture.height / tall
        right, bottom = min((left + inner[0]) * x, picture.width), min((top + inner[1]) * y, picture.height)
        fitted = picture.resize(inner, how, box=(left * x, top * y, right, bottom))
    if inner == (width, height):
        return fitted
    canvas = Image.new(picture.mode, (width, height))  # torchvision pads with black
    canvas.paste(fitted, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def _short_side(picture: Image.Image, short: int) -> tuple[int, int]:
    """Height and width once the shorter side has `short` pixels, rounded as torchvision does."""
    width, height = picture.size
    if width <= height:
        return int(short * height / width), short
    return short, int(short * width / height)


def element(array: Array, row: int = 0) -> bytes:
    """One element of a BYTES tensor as bytes. Raises BadInput."""
    found = array[row]
    if not isinstance(found, bytes):
        raise BadInput(f"row {row} holds {type(found).__name__}, expected bytes", hint="send BYTES")
    return found


def _pair(size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(not isinstance(side, int) or not 1 <= side <= 16_384 for side in pair):
        raise BadConfig(f"size is {size!r}", hint="write 224, or [height, width]")
    return pair[0], pair[1]


def _filter(name: Filter) -> Image.Resampling:
    known = {kind.name.lower(): kind for kind in Image.Resampling}
    if name not in known:
        raise BadConfig(f"interpolation is {name!r}", hint=f"use one of {', '.join(known)}")
    return known[name]
