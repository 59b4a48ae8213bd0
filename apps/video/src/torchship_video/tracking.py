"""The tracks of one camera, by a tracker of the package `trackers`, in a process of its own: see stages.Tracking.

A track has a number from when it is confirmed on; before that it has none (the package says -1) and is told with number
0 and `confirmed` false, so that nothing counts it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np

from torchship.errors import Unavailable
from torchship.tensors import Array
from torchship_video.messages import Track

Kind: TypeAlias = Literal["bytetrack", "ocsort", "sort", "cbiou"]
_CLASSES = {
    "bytetrack": "ByteTrackTracker", "ocsort": "OCSORTTracker", "sort": "SORTTracker", "cbiou": "CBIoUTracker"
}  # fmt: skip
_NOTHING: Array = np.empty((0, 4), np.float32)


class TrackerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[tracker]`: which one, and when a box is a track.

    A box of at least `start` score begins a track, one of at least `sure` continues it in the first round, weaker ones
    in the second. A track is confirmed after `frames` of them in a row, and kept for `patience` seconds unseen.
    `overlap` is the least IoU of a box with where its track is expected.
    """

    kind: Kind = "cbiou"
    start: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    sure: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.4
    frames: Annotated[int, msgspec.Meta(ge=1, le=100)] = 2
    patience: Annotated[float, msgspec.Meta(ge=0, le=60)] = 1.0
    overlap: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    rate: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 30.0


class CameraTracker:
    """The tracker of one camera. `first` is the number of its first track."""

    def __init__(self, options: TrackerOptions, *, first: int = 1) -> None:
        """Raises Unavailable where the package is missing."""
        self._tracker, self._boxes_of = _made(options)
        self._first = first
        self._known: dict[int, tuple[float, str]] = {}  # the last score and label of each track
        self._last = -np.inf

    def update(self, boxes: Array, scores: Array, labels: Array, *, seconds: float) -> list[Track]:
        """The tracks on the next frame, at `seconds` in the stream: those seen, and confirmed ones where expected."""
        self._last = max(seconds, self._last + 1e-6)
        found = self._tracker.update(
            self._boxes_of(
                xyxy=np.asarray(boxes, np.float32).reshape(-1, 4),
                confidence=np.asarray(scores, np.float32),
                data={"label": np.array([label.decode() for label in labels], np.str_)},
            ),
            timestamp=self._last,
        )
        tracks: list[Track] = []
        for row in range(len(found)):
            raw = int(found.tracker_id[row])
            score, label = float(found.confidence[row]), str(found.data["label"][row])
            if raw >= 0:
                self._known[raw] = (score, label)
            tracks.append(
                Track(raw + self._first if raw >= 0 else 0, _box(found.xyxy[row]), score, label, confirmed=raw >= 0)
            )
        return [*tracks, *self._expected({track.number for track in tracks})]

    def predict(self, seconds: float) -> list[Track]:
        """The confirmed tracks where they were last expected, on a frame that no detector looked at."""
        return self._expected(set())

    def _expected(self, seen: set[int]) -> list[Track]:
        alive = {int(one.tracker_id): one for one in self._tracker.tracks if one.tracker_id >= 0}
        self._known = {raw: known for raw, known in self._known.items() if raw in alive}
        return [
            Track(raw + self._first, _box(alive[raw].get_state_bbox()), *known, confirmed=True, seen=False)
            for raw, known in self._known.items()
            if raw + self._first not in seen
        ]


def _box(corners: Array) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(value) for value in np.asarray(corners).reshape(-1)[:4])
    return left, top, right, bottom


def _made(options: TrackerOptions) -> tuple[Any, Any]:
    """The tracker, and the class of what it takes."""
    try:
        import supervision
        import trackers
    except ImportError as fault:
        raise Unavailable(f"tracking needs the package trackers: {fault}", hint="pip install trackers") from None
    given: dict[str, Any] = {
        "lost_track_buffer": round(options.patience * 30),  # the package counts in thirtieths of a second
        "frame_rate": options.rate,
        "minimum_consecutive_frames": options.frames,
    }
    if options.kind != "ocsort":
        given["track_activation_threshold"] = options.start
    if options.kind != "sort":
        given["high_conf_det_threshold"] = options.start if options.kind == "ocsort" else options.sure
    if options.kind == "cbiou":
        given["minimum_iou_threshold_first_assoc"] = options.overlap
    else:
        given["minimum_iou_threshold"] = options.overlap
    return getattr(trackers, _CLASSES[options.kind])(**given), supervision.Detections
