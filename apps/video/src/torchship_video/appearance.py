"""How somebody looks, as a vector: the line `appearance` cuts tracks out of frames in place and embeds them.

    Crops       handles and boxes -> crops UINT8 [rows, 128, 64, 3], JPEG, sharpness
    Histogram   crops -> embedding: colours in four stripes; needs no weights, the default
    an artifact crops -> embedding: a trained one, prepared by examples/reid/train.py

A row is one crop, with its own handle: rows of many cameras join to one batch.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from torchship.errors import BadConfig, BadInput
from torchship.stage import stage
from torchship.tensors import Array
from torchship_video.identity.assignment import Rule
from torchship_video.messages import decode

HEIGHT, WIDTH = 128, 64
STRIPES = 4
BINS = (12, 3, 4)  # hue, saturation, value
HISTOGRAM = "hsv-4-stripes"
HISTOGRAM_WIDTH = STRIPES * int(np.prod(BINS))
HISTOGRAM_RULE = Rule(threshold=0.80, margin=0.02, travel=0.06)
_SHARP = 60.0  # the variance of the Laplacian of a crop that is half way to sharp


@stage(
    f"frame:BYTES[-1,1], box:FP32[-1,4] -> "
    f"crop:UINT8[-1,{HEIGHT},{WIDTH},3], jpeg:BYTES[-1,1], sharpness:FP32[-1], usable:BOOL[-1]",
    batched=True,
)
class Crops:
    """The part of a frame in a box, read in place from the ring, as pixels and as JPEG.

    `frame` is a handle (`messages.encode`), `box` left, top, right, bottom in its pixels. `sharpness` is from 0 to 1. A
    row whose frame was overwritten meanwhile, or whose box has nothing of the frame, is black and not `usable`: it
    does not fail the others in the batch. Raises BadInput for what is no handle.
    """

    def __init__(self, *, height: int = HEIGHT, width: int = WIDTH, jpeg_quality: int = 88) -> None:
        if not (16 <= height <= 1024 and 16 <= width <= 1024 and 1 <= jpeg_quality <= 95):
            raise BadConfig(f"crops of {width}x{height} with JPEG quality {jpeg_quality}", hint="16 to 1024; 1 to 95")
        self._size, self._quality = (width, height), jpeg_quality

    @classmethod
    def declare(cls, *, height: int = HEIGHT, width: int = WIDTH, **_: object) -> str:
        """The signature for these options."""
        return (
            "frame:BYTES[-1,1], box:FP32[-1,4] -> "
            f"crop:UINT8[-1,{height},{width},3], jpeg:BYTES[-1,1], sharpness:FP32[-1], usable:BOOL[-1]"
        )

    def __call__(self, frame: Array, box: Array) -> tuple[Array, Array, Array, Array]:
        rows, (width, height) = len(frame), self._size
        crops = np.zeros((rows, height, width, 3), np.uint8)
        jpegs = np.full((rows, 1), b"", np.object_)
        sharp, usable = np.zeros(rows, np.float32), np.zeros(rows, np.bool_)
        for row in range(rows):
            pixels = self._cut(frame[row, 0], box[row])
            if pixels is not None:
                crops[row], usable[row] = pixels, True
                jpegs[row, 0], sharp[row] = as_jpeg(pixels, quality=self._quality), sharpness(pixels)
        return crops, jpegs, sharp, usable

    def _cut(self, handle: bytes, box: Array) -> Array | None:
        import msgspec

        from torchship_video import pixels, ring

        try:
            frame = decode(handle)
        except msgspec.MsgspecError as fault:
            raise BadInput(f"that is no handle of a frame: {fault}", hint="send messages.encode(frame)") from None
        if not np.isfinite(box).all():
            return None
        left, top, right, bottom = (float(edge) for edge in box)
        try:
            with ring.read(frame) as whole:
                return pixels.crop(whole, frame, (left, top, right, bottom), size=self._size)
        except (ring.StaleFrame, BadInput):
            return None


@stage(f"crop:UINT8[-1,{HEIGHT},{WIDTH},3] -> embedding:FP32[-1,{HISTOGRAM_WIDTH}]", batched=True)
def Histogram(crop: Array) -> Array:  # noqa: N802  # a stage's name
    """Colours (hue, saturation, value) in four stripes from head to feet, as a vector of length 1.

    Of the crop a tenth above and below and a fifth at each side are left out, and the middle of the rest counts most:
    the background stands around a body. The root of the shares is taken, so that the product of two vectors is the
    Bhattacharyya coefficient.
    """
    return np.stack([colours(pixels) for pixels in crop])


def colours(pixels: Array) -> Array:
    """The histogram of one crop [height, width, 3]."""
    height, width = pixels.shape[:2]
    pixels = np.ascontiguousarray(pixels[height // 10 : height - height // 10, width // 5 : width - width // 5])
    height, width = pixels.shape[:2]
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(pixels).convert("HSV"), np.int64), -1, 0)
    hues, saturations, values = BINS
    tone = np.where(saturation < 32, 0, hue * hues // 256)  # the hue of grey is noise
    code = (tone * saturations + saturation * saturations // 256) * values + value * values // 256
    stripe = (np.arange(height) * STRIPES // height)[:, None] * int(np.prod(BINS))
    centre = np.exp(-0.5 * ((np.arange(width) + 0.5) / width * 4 - 2) ** 2 / 0.75**2)
    weights = np.broadcast_to(centre, (height, width))
    counts = np.bincount((code + stripe).ravel(), weights.ravel(), HISTOGRAM_WIDTH)
    roots = np.sqrt(counts / max(float(counts.sum()), 1e-12)).astype(np.float32)
    return roots / max(float(np.linalg.norm(roots)), 1e-12)


def sharpness(pixels: Array) -> float:
    """From 0 (one colour, or blurred) towards 1 (fine detail): by the variance of the Laplacian of the brightness."""
    grey = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    edges = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    variance = float(edges.var())
    return variance / (variance + _SHARP)


def as_jpeg(pixels: Array, *, quality: int = 88) -> bytes:
    """A crop as JPEG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return file.getvalue()


def line(*, artifact: str = "", name: str = "appearance", copies: int = 1) -> dict[str, Any]:
    """The line as plain data, as a server's file has it: with the colour histogram, or with a trained artifact."""
    embedder: dict[str, Any] = {"run": "torchship_video.appearance:Histogram"}
    if artifact:
        embedder = {"artifact": artifact, "name": "embed", "threads": 1}
    return {
        "name": name,
        "outputs": ["embedding", "jpeg", "sharpness", "usable"],
        "stages": [{"run": "torchship_video.appearance:Crops", "copies": copies}, embedder],
    }
