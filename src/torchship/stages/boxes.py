"""Boxes: formats, overlap, suppression of doubles, and back to the pixels of the original picture. Plain numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal, TypeAlias, get_args

import msgspec
import numpy as np

from torchship.errors import BadConfig
from torchship.stage import stage
from torchship.stages.labels import activate, names_of, read_labels
from torchship.tensors import Array

Format: TypeAlias = Literal["xyxy", "xywh", "cxcywh"]
Soft: TypeAlias = Literal["", "linear", "gaussian"]
_BLOCK = 256
_FEW = 500
_LARGE = 1e18  # above it float32 cannot hold an area
_MAX_CLASSES = 10_000

Score: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1, description="boxes below this score are left out")]
Overlap: TypeAlias = Annotated[
    float, msgspec.Meta(ge=0, le=1, description="of two boxes that overlap more (IoU), the better one stays")
]
Most: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=3000, description="how many boxes at most, best first")]


_GIVES = "boxes:FP32[0..,4], scores:FP32[0..], classes:INT64[0..], labels:BYTES[0..]"


@stage(f"boxes:FP32[1,-1,4], scores:FP32[1,-1,-1] -> {_GIVES}")
@dataclass(kw_only=True, eq=False)
class Nms:
    """The boxes of one picture that are left after suppression, best first, as xyxy in the units they came in.

    `boxes` is [1, anchors, 4] in `format`, `scores` [1, anchors, classes]. Boxes of different classes do not suppress
    each other unless `together`. A box or score that is not finite is left out. `soft` lowers scores instead of
    dropping boxes (Soft-NMS, Bodla et al. 2017).
    """

    format: Format = "xyxy"
    labels: str | Sequence[str] = ()
    soft: Soft = ""
    sigma: float = 0.5
    candidates: int = 3000
    together: bool = False

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise BadConfig(f"box format {self.format!r} is unknown", hint=f"use one of {', '.join(get_args(Format))}")
        if self.soft not in get_args(Soft):
            raise BadConfig(f"soft is {self.soft!r}", hint="use linear or gaussian, or leave it out")
        if self.sigma <= 0 or self.candidates < 1:
            raise BadConfig("sigma and candidates must be positive")
        self._known = read_labels(self.labels)

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
        with np.errstate(all="ignore"):
            plain, likely = convert(boxes[0], given=self.format), scores[0]
            if not np.isfinite(plain.sum()):
                likely = np.where(np.isfinite(plain).all(axis=1, keepdims=True), likely, 0)
        anchors, classes = np.nonzero(likely >= least)
        found = likely[anchors, classes]
        best = np.argsort(-found, kind="stable")
        best = best[found[best] < np.inf][: self.candidates]
        anchors, classes, found = anchors[best], classes[best], found[best]
        chosen = plain[anchors]
        groups = None if self.together else classes
        if self.soft:
            keep, found = soft_nms(chosen, found, groups=groups, overlap=iou_threshold, how=self.soft, sigma=self.sigma)
            keep, found = keep[found >= least], found[found >= least]
        else:
            keep = nms(chosen, found, groups=groups, overlap=iou_threshold)
            found = found[keep]
        keep, found = keep[:max_boxes], found[:max_boxes]
        return {
            "boxes": np.ascontiguousarray(chosen[keep], np.float32).reshape(-1, 4),
            "scores": found.astype(np.float32),
            "classes": classes[keep].astype(np.int64),
            "labels": names_of(classes[keep], self._known),
        }


@stage(f"boxes:FP32[1,-1,4], scores:FP32[1,-1,-1], frame:FP32[1,5] -> {_GIVES}")
@dataclass(kw_only=True, eq=False)
class Detections:
    """`Nms` for a detector behind `Letterbox`: boxes are scaled back to pixels of the original picture and cut at
    its edges. `units` is what the model's boxes are in: pixels of its input, or parts of its `size`.
    """

    units: Literal["pixels", "parts"] = "pixels"
    size: int | Sequence[int] = 640
    format: Format = "xyxy"
    labels: str | Sequence[str] = ()
    soft: Soft = ""
    sigma: float = 0.5
    candidates: int = 3000
    together: bool = False

    def __post_init__(self) -> None:
        if self.units not in ("pixels", "parts"):
            raise BadConfig(f"units is {self.units!r}", hint="use pixels or parts")
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        self._scale = np.array([width, height] * 2, np.float32) if self.units == "parts" else np.float32(1)
        self._nms = Nms(**{option.name: getattr(self, option.name) for option in fields(Nms)})

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
@dataclass(kw_only=True, eq=False)
class Predictions:
    """Splits what a YOLO-style head gives, [1, anchors, 4 (+1) + classes], into boxes and scores.

    `columns` when it comes as [1, 4 + classes, anchors]; `objectness` when the fifth number is the score of there
    being anything, which the class scores are multiplied by; `activation` when the scores are logits; `end_to_end` for
    a head that has suppressed doubles itself and gives [1, boxes, 6]: x1, y1, x2, y2, score, number of the class.
    Raises BadConfig where the numbers can only be of such a head and `end_to_end` is not set.
    """

    columns: bool = False
    objectness: bool = False
    activation: Literal["none", "sigmoid", "softmax"] = "none"
    end_to_end: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ("none", "sigmoid", "softmax"):
            raise BadConfig(f"activation is {self.activation!r}", hint="use none, sigmoid or softmax")
        if self.end_to_end and self.objectness:
            raise BadConfig("a head that is end_to_end has no objectness", hint="set one of them")

    def __call__(self, predictions: Array) -> tuple[Array, Array]:
        rows = predictions.transpose(0, 2, 1) if self.columns else predictions
        boxes, rest = rows[..., :4], rows[..., 4:]
        if rest.shape[-1] == 2 and not self.objectness and self.activation == "none":
            numbers = rest[0, :, 1]
            if not self.end_to_end and numbers.any() and (numbers == np.rint(numbers)).all():
                raise BadConfig(
                    "predictions end with a score and whole numbers, as of classes", hint="set end_to_end = true"
                )
        if self.end_to_end:
            scores = spread(rest[0])
        elif not self.objectness:
            scores = activate(rest, self.activation)
        else:
            anything = activate(rest[..., :1], "none" if self.activation == "none" else "sigmoid")
            scores = anything * activate(rest[..., 1:], self.activation)
        return np.ascontiguousarray(boxes), np.ascontiguousarray(scores, np.float32)


def spread(ends: Array) -> Array:
    """Scores [1, boxes, classes] of boxes that end with a score and the number of its class, [boxes, 2].

    A class below 0, as heads fill up their boxes, has no score. Raises BadConfig for what is no class.
    """
    if ends.shape[-1] != 2:
        raise BadConfig(f"a head that is end_to_end ends with 2 numbers, not {ends.shape[-1]}", hint="see its options")
    real = np.flatnonzero(ends[:, 1] >= 0)
    likely, classes = ends[real].T
    if (classes != np.rint(classes)).any() or classes.max(initial=0) >= _MAX_CLASSES:
        raise BadConfig(f"{classes.max():g} is the number of no class", hint="is the score the fifth number?")
    scores = np.zeros((1, len(ends), int(classes.max(initial=0)) + 1), np.float32)
    scores[0, real, classes.astype(np.int64)] = likely
    return scores


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


def overlaps(first: Array, second: Array) -> Array:
    """Intersection over union of boxes [n, 4] with boxes [m, 4] in xyxy, as [n, m]; 0 where there is none."""
    a, b = np.ascontiguousarray(first.T)[:, :, None], np.ascontiguousarray(second.T)[:, None, :]
    with np.errstate(all="ignore"):  # what is not finite gives NaN, which is larger than no limit
        wide = np.minimum(a[2], b[2])
        wide -= np.maximum(a[0], b[0])
        np.maximum(wide, 0, out=wide)
        shared = np.minimum(a[3], b[3])
        shared -= np.maximum(a[1], b[1])
        np.maximum(shared, 0, out=shared)
        shared *= wide
        areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(axis=1) for boxes in (first, second)]
        union = areas[0][:, None] + areas[1][None]
        union -= shared
        np.maximum(union, np.finfo(union.dtype).tiny, out=union)
        shared /= union
    return np.asarray(shared)


def nms(boxes: Array, scores: Array, *, overlap: float, groups: Array | None = None) -> Array:
    """Indices of the boxes that stay, best score first: greedy suppression, within each of `groups` where given.

    Boxes are [n, 4] in xyxy. The same boxes stay as with torchvision's `batched_nms`.
    """
    order = np.argsort(-scores, kind="stable")
    plain = boxes[order].astype(np.float32 if np.abs(boxes).max(initial=0) < _LARGE else np.float64)
    if groups is None:
        return order[_greedy(plain, overlap)]
    sorted_groups = groups[order]
    if len(boxes) <= _FEW:  # one block of all classes costs less than a block each
        return order[_greedy(plain, overlap, sorted_groups)]
    members = (np.flatnonzero(sorted_groups == group) for group in np.unique(sorted_groups))
    kept = np.concatenate([part[_greedy(plain[part], overlap)] for part in members])
    return np.asarray(order[np.sort(kept)])


def _greedy(boxes: Array, overlap: float, groups: Array | None = None) -> Array:
    """The same for boxes that come the best first: a block at a time, so that memory stays small."""

    def hits_of(first: Array, second: Array) -> Array:
        """Which boxes of `first` suppress which of `second`: those of one group that overlap more."""
        hits = overlaps(boxes[first], boxes[second]) > overlap
        return np.asarray(hits if groups is None else hits & (groups[first][:, None] == groups[second]))

    kept = np.empty(0, np.int64)
    for start in range(0, len(boxes), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(boxes)))
        if len(kept):
            block = block[~hits_of(kept, block).any(axis=0)]
        hits = hits_of(block, block)
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
    wide = boxes.astype(np.float64)
    lowered = scores.astype(np.float32)
    left = np.arange(len(scores))
    order = []
    while left.size:
        best = left[np.argmax(lowered[left])]
        order.append(best)
        left = left[left != best]
        shared = np.nan_to_num(overlaps(wide[best][None], wide[left])[0])
        if groups is not None:
            shared[groups[left] != groups[best]] = 0
        linear = np.where(shared > overlap, 1 - shared, 1.0)
        lowered[left] *= linear if how == "linear" else np.exp(-(shared**2) / sigma)
    found = np.asarray(order, np.int64)
    return found, lowered[found]


def scale_back(boxes: Array, frame: Array) -> Array:
    """Boxes [n, 4] in xyxy, in pixels of a letterboxed picture, in pixels of the original and within it.

    `frame` is what `Letterbox` gives: scale, left, top, height, width.
    """
    ratio, left, top, height, width = frame.astype(np.float64).tolist()
    moved = (boxes - np.array([left, top, left, top])) / ratio
    return np.asarray(np.clip(moved, 0, np.array([width, height, width, height])).astype(np.float32))
