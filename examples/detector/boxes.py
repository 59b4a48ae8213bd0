"""Suppression outside of the model: thresholds belong to the request, not to the weights."""

from __future__ import annotations

import io
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.stage import stage

Array = NDArray[Any]
SIZE = 160


@stage("image:BYTES[1] -> image:FP32[1,3,-1,-1]")
def picture(image: Array) -> Array:
    """The bytes of one picture as the detector takes it: squeezed to SIZE x SIZE, 0 to 1."""
    from PIL import Image

    with Image.open(io.BytesIO(image[0])) as opened:
        pixels = np.asarray(opened.convert("RGB").resize((SIZE, SIZE)), np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None] / 255)


@stage("boxes:FP32[1,-1,4], scores:FP32[1,-1,-1] -> found:FP32[-1,4], confidence:FP32[-1], kind:INT64[-1]")
def detections(
    boxes: Array,
    scores: Array,
    *,
    threshold: Annotated[float, msgspec.Meta(ge=0, le=1, description="least score")] = 0.4,
    overlap: Annotated[float, msgspec.Meta(ge=0, le=1, description="largest IoU of two boxes of one kind")] = 0.5,
) -> tuple[Array, Array, Array]:
    """One picture's boxes: those above `threshold`, without the weaker of two of a kind that overlap too much."""
    kinds, best = scores[0].argmax(1), scores[0].max(1)
    kept = np.flatnonzero(best >= threshold)
    kept = kept[np.argsort(-best[kept], kind="stable")]
    chosen: list[int] = []
    while kept.size:
        first, rest = kept[0], kept[1:]
        chosen.append(int(first))
        same = kinds[rest] == kinds[first]
        kept = rest[~(same & (iou(boxes[0][first][None], boxes[0][rest])[0] > overlap))]
    index = np.asarray(chosen, np.int64)
    return boxes[0][index], best[index], kinds[index].astype(np.int64)


def iou(a: Array, b: Array) -> Array:
    """Intersection over union of boxes [n, 4] and [m, 4]: [n, m]."""
    near, far = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(far - near, 0, None).prod(2)
    areas = [(side[:, 2:] - side[:, :2]).prod(1) for side in (a, b)]
    total: Array = areas[0][:, None] + areas[1][None] - both
    share: Array = both / np.maximum(total, 1e-9)
    return share
