"""Pictures with known boxes: shapes of three kinds on coloured clouds, drawn with a seed; and the detector's score."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from examples.detector.boxes import SIZE, detections, iou

Array = NDArray[Any]
_HELD_BACK = 900_000  # seeds from here on are never trained on


def scene(seed: int) -> tuple[Array, Array, Array]:
    """A picture FP32 [3, SIZE, SIZE] in 0 to 1, its boxes FP32 [n, 4] and kinds INT64 [n]."""
    draw = np.random.default_rng(seed)
    clouds = Image.fromarray(draw.integers(0, 200, (5, 5, 3), dtype=np.uint8)).resize(
        (SIZE, SIZE), Image.Resampling.BICUBIC
    )
    pencil = ImageDraw.Draw(clouds)
    boxes: list[list[float]] = []
    kinds: list[int] = []
    for _ in range(int(draw.integers(1, 5))):
        side = float(draw.uniform(18, 72))
        x, y = draw.uniform(2, SIZE - side - 2, 2)
        box = [float(x), float(y), float(x) + side, float(y) + side]
        if boxes and iou(np.asarray([box]), np.asarray(boxes)).max() > 0.1:
            continue
        kind = int(draw.integers(0, 3))
        _shape(pencil, kind, box, tuple(int(value) for value in draw.integers(60, 256, 3)))
        boxes.append(box)
        kinds.append(kind)
    noisy = np.asarray(clouds, np.float32) + draw.normal(0, 6, (SIZE, SIZE, 3)).astype(np.float32)
    pixels = np.clip(noisy / 255, 0, 1).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels, np.float32), np.asarray(boxes, np.float32), np.asarray(kinds, np.int64)


def _shape(pencil: ImageDraw.ImageDraw, kind: int, box: list[float], colour: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    if kind == 0:
        pencil.ellipse(box, fill=colour)
    elif kind == 1:
        pencil.rectangle(box, fill=colour)
    else:
        pencil.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)


def calibration() -> Iterator[dict[str, Array]]:
    """Sixteen batches of four pictures for quantizers."""
    for start in range(0, 64, 4):
        yield {"image": np.stack([scene(500_000 + start + index)[0] for index in range(4)])}


def f1(stage: Callable[..., Any], *, pictures: int = 200, threshold: float = 0.4) -> float:
    """The harmonic mean of precision and recall (right kind, IoU of 0.5) over held-back pictures, 0 to 1."""
    hits = found_all = true_all = 0
    for seed in range(_HELD_BACK, _HELD_BACK + pictures):
        pixels, boxes, kinds = scene(seed)
        answer = stage({"image": pixels[None]})
        found, _, labels = detections(answer["boxes"], answer["scores"], threshold=threshold)
        table = (iou(found, boxes) > 0.5) & (labels[:, None] == kinds[None])
        hits += int(table.any(0).sum())
        found_all += len(found)
        true_all += len(boxes)
    return 2 * hits / max(found_all + true_all, 1)
