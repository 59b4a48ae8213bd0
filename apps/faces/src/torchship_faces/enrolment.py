"""From a picture's faces to an enrolment: one good face, or the reason why not."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchship.errors import BadInput
from torchship.stages.picture import Limits, decode
from torchship.tensors import Tensors
from torchship_faces.quality import Gate, grade, refusal

_KEPT_SIDE = 320


@dataclass(frozen=True)
class Face:
    """A face that may be enrolled: `embedding` [width], `grade` from 0 to 1, `kept` a JPEG cut out of the picture."""

    embedding: NDArray[np.float32]
    grade: float
    kept: bytes


class Refused(BadInput):
    """The picture is fine as a picture, but not for enrolment."""


def examine(found: Tensors, *, gate: Gate | None = None, picture: bytes = b"") -> Face:
    """The one face of a picture, from the outputs of the embed pipeline; `picture` is cut for keeping when given.

    A second face counts when it is at least half as large as the first. Raises Refused with the reason.
    """
    sides = found["quality"][:, 0]
    if not len(sides):
        raise Refused("there is no face in the picture", hint="use a picture that shows one face, upright")
    first = int(np.argmax(sides))
    rivals = int((sides >= sides[first] / 2).sum()) - 1
    if rivals:
        raise Refused(
            f"there are {rivals + 1} faces in the picture", hint="cut the picture so that it shows one person"
        )
    quality, score = found["quality"][first], float(found["score"][first])
    reason = refusal(quality, score, gate=gate or Gate())
    if reason:
        raise Refused(reason, hint="use a better picture, or lower the limit")
    kept = cut(picture, found["box"][first]) if picture else b""
    return Face(np.asarray(found["embedding"][first]), grade(quality, score), kept)


def largest(found: Tensors, *, what: str = "the picture") -> int:
    """The row of the largest face. Raises Refused when there is none."""
    boxes = found["box"]
    if not len(boxes):
        raise Refused(f"there is no face in {what}", hint="lower min_score, or use a picture that shows a face")
    return int(np.argmax((boxes[:, 2:] - boxes[:, :2]).prod(1)))


def cut(picture: bytes, box: NDArray[np.float32]) -> bytes:
    """A face with some of its surroundings as JPEG, at most 320 pixels a side: enough to embed it anew."""
    whole = decode(picture, limits=Limits()).convert("RGB")
    margin = 0.5 * float(max(box[2] - box[0], box[3] - box[1]))
    left, top = max(0, int(box[0] - margin)), max(0, int(box[1] - margin))
    part = whole.crop((left, top, min(whole.width, int(box[2] + margin)), min(whole.height, int(box[3] + margin))))
    part.thumbnail((_KEPT_SIDE, _KEPT_SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    part.save(out, "JPEG", quality=95)
    return out.getvalue()
