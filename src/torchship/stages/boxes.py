"""Boxes: formats, overlap, suppression of doubles, and back to the pixels of the original picture. Plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec
import numpy as np

from torchship.errors import BadConfig
from torchship.stage import stage
from torchship.stages.labels import activate, read_labels
from torchship.tensors import Array

Format: TypeAlias = Literal["xyxy", "xywh", "cxcywh"]
Soft: TypeAlias = Literal["", "linear", "gaussian"]
_FORMATS = ("xyxy", "xywh", "cxcywh")
_BLOCK = 256
_FEW = 500

Score: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1, description="boxes below this score are left out")]
Overlap: TypeAlias = Annotated[
    float, msgspec.Meta(ge=0, le=1, description="of two boxes that overlap more (IoU), the better one stays")
]
Most: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=3000, description="how many boxes at most, best first")]


_GIVES = "boxes:FP32[0..,4], scores:FP32[0..], classes:INT64[0..], labels:BYTES[0..]"


@stage(f"boxes:FP32[1,-1,4], scores:FP32[1,-1,-1] -> {_GIVES}")
class Nms:
    """The boxes of one picture that are left after suppression, best first, as xyxy in the units they came in.

    `boxes` is [1, anchors, 4] in `format`, `scores` [1, anchors, classes]. Boxes of different classes do not suppress
    each other unless `together`. `soft` lowers scores instead of dropping boxes (Soft-NMS, Bodla et al. 2017).
    """

    def __init__(
        self,
        *,
        format: Format = "xyxy",
        labels: str | Sequence[str] = (),
        soft: Soft = "",
        sigma: float = 0.5,
        candidates: int = 3000,
        together: bool = False,
    ) -> None:
        check_format(format)
        if soft not in ("", "linear", "gaussian"):
            raise BadConfig(f"soft is {soft!r}", hint="use linear or gaussian, or leave it out")
        if sigma <= 0 or candidates < 1:
            raise BadConfig("sigma and candidates must be positive")
        self._format = format
        self._labels = [name.encode() for name in read_labels(labels)]
        self._soft, self._sigma, self._candidates, self._together = soft, sigma, candidates, together

    def __call__(
        self,
        boxes: Array,
        scores: Array,
        *,
        score_threshold: Score = 0.25,
        iou_threshold: Overlap = 0.45,
        max_boxes: Most = 100,
    ) -> dict[str, Array]:
        least = max(score_threshold, 1e-9)
        anchors, classes = np.nonzero(scores[0] >= least)
        found = scores[0][anchors, classes]
        best = np.argsort(-found, kind="stable")[: self._candidates]
        anchors, classes, found = anchors[best], classes[best], found[best]
        chosen = convert(boxes[0][anchors], given=self._format)
        groups = None if self._together else classes
        if self._soft:
            keep, found = soft_nms(
                chosen, found, groups=groups, overlap=iou_threshold, how=self._soft, sigma=self._sigma
            )
            keep, found = keep[found >= least], found[found >= least]
        else:
            keep = nms(chosen, found, groups=groups, overlap=iou_threshold)
            found = found[keep]
        keep, found = keep[:max_boxes], found[:max_boxes]
        names = np.empty(len(keep), object)
        names[:] = [self._name(index) for index in classes[keep].tolist()]
        return {
            "boxes": np.ascontiguousarray(chosen[keep], np.float32).reshape(-1, 4),
            "scores": found.astype(np.float32),
            "classes": classes[keep].astype(np.int64),
            "labels": names,
        }

    def _name(self, index: int) -> bytes:
        return self._labels[index] if index < len(self._labels) else str(index).encode()


@stage(f"boxes:FP32[1,-1,4], scores:FP32[1,-1,-1], frame:FP32[1,5] -> {_GIVES}")
class Detections:
    """`Nms` for a detector behind `Letterbox`: boxes are scaled back to pixels of the original picture and cut at
    its edges. `units` is what the model's boxes are in: pixels of its input, or parts of its `size`.
    """

    def __init__(
        self,
        *,
        units: Literal["pixels", "parts"] = "pixels",
        size: int | Sequence[int] = 640,
        format: Format = "xyxy",
        labels: str | Sequence[str] = (),
        soft: Soft = "",
        sigma: float = 0.5,
        candidates: int = 3000,
        together: bool = False,
    ) -> None:
        if units not in ("pixels", "parts"):
            raise BadConfig(f"units is {units!r}", hint="use pixels or parts")
        height, width = (size, size) if isinstance(size, int) else size
        self._scale = np.array([width, height] * 2, np.float32) if units == "parts" else np.float32(1)
        self._nms = Nms(format=format, labels=labels, soft=soft, sigma=sigma, candidates=candidates, together=together)

    def __call__(
        self,
        boxes: Array,
        scores: Array,
        frame: Array,
        *,
        score_threshold: Score = 0.25,
        iou_threshold: Overlap = 0.45,
        max_boxes: Most = 100,
    ) -> dict[str, Array]:
        limits = {"score_threshold": score_threshold, "iou_threshold": iou_threshold}
        found = self._nms(boxes * self._scale, scores, max_boxes=max_boxes, **limits)
        return {**found, "boxes": scale_back(found["boxes"], frame[0])}


@stage("predictions:FP32[1,-1,-1] -> boxes:FP32[1,-1,4], scores:FP32[1,-1,-1]")
class Predictions:
    """Splits what a YOLO-style head gives, [1, anchors, 4 (+1) + classes], into boxes and scores.

    `columns` when it comes as [1, 4 + classes, anchors]; `objectness` when the fifth number is the score of there
    being anything, which the class scores are multiplied by; `activation` when the scores are logits.
    """

    def __init__(
        self,
        *,
        columns: bool = False,
        objectness: bool = False,
        activation: Literal["none", "sigmoid", "softmax"] = "none",
    ) -> None:
        if activation not in ("none", "sigmoid", "softmax"):
            raise BadConfig(f"activation is {activation!r}", hint="use none, sigmoid or softmax")
        self._columns, self._objectness, self._activation = columns, objectness, activation

    def __call__(self, predictions: Array) -> tuple[Array, Array]:
        rows = predictions.transpose(0, 2, 1) if self._columns else predictions
        boxes, rest = rows[..., :4], rows[..., 4:]
        if not self._objectness:
            scores = activate(rest, self._activation)
        else:
            anything = activate(rest[..., :1], "none" if self._activation == "none" else "sigmoid")
            scores = anything * activate(rest[..., 1:], self._activation)
        return np.ascontiguousarray(boxes), np.ascontiguousarray(scores, np.float32)


def check_format(name: str) -> None:
    """Raise BadConfig for an unknown box format."""
    if name not in _FORMATS:
        raise BadConfig(f"box format {name!r} is unknown", hint=f"use one of {', '.join(_FORMATS)}")


def convert(boxes: Array, *, given: Format, wanted: Format = "xyxy") -> Array:
    """Boxes [..., 4] in another format: corners, corner and size, or centre and size."""
    if given == wanted:
        return boxes
    first, second = boxes[..., :2], boxes[..., 2:]
    if given == "xyxy":
        low, size = first, second - first
    else:
        size = second
        low = first - size / 2 if given == "cxcywh" else first
    sides = {"xyxy": (low, low + size), "xywh": (low, size), "cxcywh": (low + size / 2, size)}
    return np.concatenate(sides[wanted], axis=-1)


def areas(boxes: Array) -> Array:
    """Areas of boxes [n, 4] in xyxy; 0 for a box turned inside out."""
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return np.asarray(sides[:, 0] * sides[:, 1])


def overlaps(first: Array, second: Array) -> Array:
    """Intersection over union of boxes [n, 4] with boxes [m, 4] in xyxy, as [n, m]."""
    a, b = np.ascontiguousarray(first.T)[:, :, None], np.ascontiguousarray(second.T)[:, None, :]
    wide = np.minimum(a[2], b[2])
    wide -= np.maximum(a[0], b[0])
    np.maximum(wide, 0, out=wide)
    shared = np.minimum(a[3], b[3])
    shared -= np.maximum(a[1], b[1])
    np.maximum(shared, 0, out=shared)
    shared *= wide
    union = areas(first)[:, None] + areas(second)[None]
    union -= shared
    np.maximum(union, 1e-9, out=union)
    shared /= union
    return np.asarray(shared)


def nms(boxes: Array, scores: Array, *, overlap: float, groups: Array | None = None) -> Array:
    """Indices of the boxes that stay, best score first: greedy suppression, within each of `groups` where given.

    Boxes are [n, 4] in xyxy. The same boxes stay as with torchvision's `batched_nms`.
    """
    order = np.argsort(-scores, kind="stable")
    plain = boxes[order].astype(np.float32)
    if groups is None:
        return order[_greedy(plain, overlap)]
    if len(boxes) <= _FEW:  # one block of all classes costs less than a block each
        return order[_greedy(_apart(plain, groups[order]), overlap)]
    sorted_groups = groups[order]
    members = (np.flatnonzero(sorted_groups == group) for group in np.unique(sorted_groups))
    kept = [part[_greedy(plain[part], overlap)] for part in members]
    return order[np.sort(np.concatenate(kept))] if kept else order


def _greedy(boxes: Array, overlap: float) -> Array:
    """The same for one group of boxes, the best first: a block at a time, so that memory stays small."""
    kept = np.empty(0, np.int64)
    for start in range(0, len(boxes), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(boxes)))
        if len(kept):
            block = block[(overlaps(boxes[kept], boxes[block]) <= overlap).all(axis=0)]
        hits = overlaps(boxes[block], boxes[block]) > overlap
        dead = np.zeros(len(block), bool)
        stay = []
        for place in range(len(block)):
            if not dead[place]:
                stay.append(place)
                dead |= hits[place]
        kept = np.concatenate([kept, block[stay]])
    return kept


def soft_nms(
    boxes: Array,
    scores: Array,
    *,
    overlap: float,
    groups: Array | None = None,
    how: Soft = "gaussian",
    sigma: float = 0.5,
) -> tuple[Array, Array]:
    """All indices with their lowered scores, best first. Source: Bodla et al., Soft-NMS, ICCV 2017.

    `linear` multiplies by 1 - IoU above `overlap`, `gaussian` by exp(-IoU^2 / sigma).
    """
    apart = _apart(boxes, groups)
    lowered = scores.astype(np.float32)
    left = np.arange(len(scores))
    order = []
    while left.size:
        best = left[np.argmax(lowered[left])]
        order.append(best)
        left = left[left != best]
        shared = overlaps(apart[best][None], apart[left])[0]
        linear = np.where(shared > overlap, 1 - shared, 1.0)
        lowered[left] *= linear if how == "linear" else np.exp(-(shared**2) / sigma)
    found = np.asarray(order, np.int64)
    return found, lowered[found]


def _apart(boxes: Array, groups: Array | None) -> Array:
    """Boxes of different groups moved so far apart that they cannot overlap."""
    wide = boxes.astype(np.float64)
    if groups is None or not len(boxes):
        return wide
    span = float(wide.max() - wide.min()) + 1
    return np.asarray(wide + (groups * span)[:, None])


def scale_back(boxes: Array, frame: Array) -> Array:
    """Boxes [n, 4] in xyxy, in pixels of a letterboxed picture, in pixels of the original and within it.

    `frame` is what `Letterbox` gives: scale, left, top, height, width.
    """
    ratio, left, top, height, width = frame.astype(np.float64).tolist()
    moved = (boxes - np.array([left, top, left, top])) / ratio
    inside: Array = np.clip(moved, 0, np.array([width, height, width, height])).astype(np.float32)
    return inside
