"""The stages of face recognition: open a picture, find faces, turn them upright, answer."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import numpy as np
from msgspec import Meta
from PIL import Image

from torchship.errors import BadConfig
from torchship.stage import stage
from torchship.stages.images import element
from torchship.stages.picture import PictureLimits, decode
from torchship.tensors import Array
from torchship_faces import geometry, quality

SIDE = 640
CHIP = 112


@stage("image:BYTES[1] -> pixels:UINT8[1,-1,-1,3], canvas:UINT8[1,640,640,3], frame:FP32[1,4]")
class Open:
    """The bytes of a picture to its `pixels` (shorter than twice `max_side`) and the detector's square `canvas`.

    `frame` remembers pixels of the canvas per pixel of `pixels`, pixels of `pixels` per pixel of the picture, and the
    picture's height and width. Raises BadInput for what is no picture, or is larger than the limits.
    """

    def __init__(
        self, *, max_side: int = 1600, max_pixels: int = 64_000_000, max_bytes: int = 32 * 2**20, side: int = SIDE
    ) -> None:
        self._max_side, self._side = max_side, side
        self._limits = PictureLimits(max_pixels, max_bytes)

    @classmethod
    def declare(cls, *, side: int = SIDE, **_: object) -> str:
        """The signature for these options."""
        return f"image:BYTES[1] -> pixels:UINT8[1,-1,-1,3], canvas:UINT8[1,{side},{side},3], frame:FP32[1,4]"

    def __call__(self, image: Array) -> tuple[Array, Array, Array]:
        picture = decode(element(image), limits=self._limits).convert("RGB")
        width, height = picture.size
        factor = min(max(width, height) // self._max_side, width, height)
        if factor > 1:  # whole factors only: much faster than resampling, and faces that large lose nothing
            picture = picture.reduce(factor)
        shrink = 1 / max(factor, 1)
        ratio = min(self._side / picture.width, self._side / picture.height, 4.0)
        inner = max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio))
        canvas = np.zeros((1, self._side, self._side, 3), np.uint8)
        canvas[0, : inner[1], : inner[0]] = np.asarray(
            picture.resize(inner, Image.Resampling.BILINEAR, reducing_gap=1.0)
        )
        return np.asarray(picture)[None], canvas, np.array([[ratio, shrink, height, width]], np.float32)


@stage(
    "loc:FP32[1,-1,4], face:FP32[1,-1], landmarks:FP32[1,-1,10], frame:FP32[1,4] "
    "-> box:FP32[0..,4], score:FP32[0..], points:FP32[0..,5,2]"
)
class Find:
    """The detector's raw outputs to faces: `box` (left, top, right, bottom), `score`, five `points`.

    All in pixels of the upright picture, best first. Points: the eye on the left, the eye on the right, the nose, the
    corners of the mouth.
    """

    def __init__(self, *, side: int = SIDE) -> None:
        self._side = side

    def __call__(
        self,
        loc: Array,
        face: Array,
        landmarks: Array,
        frame: Array,
        *,
        min_score: Annotated[float, Meta(ge=0.02, le=1.0, description="least detection score of a face")] = 0.8,
        overlap: Annotated[float, Meta(ge=0.0, le=1.0, description="boxes that overlap more are one face")] = 0.4,
        max_faces: Annotated[int, Meta(ge=1, le=1000, description="most faces of a picture")] = 200,
    ) -> tuple[Array, Array, Array]:
        ratio, shrink, height, width = (float(value) for value in frame[0])
        box, score, points = geometry.decode(
            loc[0], face[0], landmarks[0], side=self._side, min_score=min_score, overlap=overlap, most=max_faces
        )
        scale = np.float32(1 / (ratio * shrink))
        box = (box * scale).clip(0, np.array([width, height, width, height], np.float32))
        return box.astype(np.float32), score.astype(np.float32), (points * scale).astype(np.float32)


@stage(
    "pixels:UINT8[1,-1,-1,3], frame:FP32[1,4], box:FP32[0..,4], points:FP32[0..,5,2] "
    "-> chip:UINT8[0..,112,112,3], quality:FP32[0..,4]"
)
class Align:
    """Each face upright in a small square `chip`, and its `quality`: size in pixels, sharpness, yaw, pitch.

    `template` says where the embedder wants the face: `arcface` or `dlib`. Quality is always measured on the first.
    """

    def __init__(self, *, side: int = CHIP, template: Literal["arcface", "dlib"] = "arcface") -> None:
        if template not in geometry.TEMPLATES:
            raise BadConfig(f"template is {template!r}", hint=f"use one of {', '.join(geometry.TEMPLATES)}")
        self._side, self._template = side, template

    @classmethod
    def declare(cls, *, side: int = CHIP, **_: object) -> str:
        """The signature for these options."""
        return (
            "pixels:UINT8[1,-1,-1,3], frame:FP32[1,4], box:FP32[0..,4], points:FP32[0..,5,2] "
            f"-> chip:UINT8[0..,{side},{side},3], quality:FP32[0..,4]"
        )

    def __call__(self, pixels: Array, frame: Array, box: Array, points: Array) -> tuple[Array, Array]:
        shrink = frame[0, 1]
        chips = np.empty((len(points), self._side, self._side, 3), np.uint8)
        measured = np.empty((len(points), 4), np.float32)
        for row, five in enumerate(points):
            seen = chips[row] = geometry.chip(pixels[0], five * shrink, side=self._side, template=self._template)
            if (self._side, self._template) != (CHIP, "arcface"):
                seen = geometry.chip(pixels[0], five * shrink, side=CHIP)
            measured[row] = quality.measure(seen, five, box[row])
        return chips, measured


@stage(
    "box:FP32[0..,4], score:FP32[0..], points:FP32[0..,5,2], quality:FP32[0..,4], person:BYTES[0..], "
    "similarity:FP32[0..] -> answer:BYTES[1]"
)
def answer(  # noqa: PLR0917  # positional parameters are the tensors it takes
    box: Array, score: Array, points: Array, quality: Array, person: Array, similarity: Array
) -> Array:
    """The faces of a picture as one JSON text, for callers who want to read it: `person` is null when unknown."""
    faces = [
        {
            "person": name.decode() or None,
            "unknown": not name,
            "similarity": round(float(similar), 4),
            "score": round(float(sure), 4),
            "box": [round(float(value), 1) for value in corners],
            "points": [[round(float(x), 1), round(float(y), 1)] for x, y in five],
            "side": round(float(measured[0]), 1),
        }
        for corners, sure, five, measured, name, similar in zip(
            box, score, points, quality, person, similarity, strict=True
        )
    ]
    return np.array([msgspec.json.encode({"faces": faces})], np.object_)
