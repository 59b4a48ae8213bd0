"""The stages of a frame on the engine's lines: from its handle to the detector's square, from maps to boxes, to tracks.

`detect` is the line Squares -> a detector's artifact -> Boxes; `track` is the line of Tracking alone, whose sequences
are the cameras. They are apart since frames of one camera may be detected at the same time, but are tracked in order.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from torchship.errors import BadConfig
from torchship.stage import stage
from torchship.stages.boxes import nms, scale_back
from torchship.tensors import Array
from torchship_video import ring, yolo
from torchship_video.messages import decode
from torchship_video.pixels import letterbox

SIDE = 416
DETECTOR = "yolov3-tiny"
_FOUND = "boxes:FP32[0..,4], scores:FP32[0..], labels:BYTES[0..]"


@stage("frame:BYTES[-1,1] -> pixels:UINT8[-1,416,416,3], place:FP32[-1,5]", batched=True, max_batch=8)
class Squares:
    """Frames, read in place by their handles, fitted into squares of `side` as RGB.

    `place` remembers how, as the engine's Letterbox does: scale, left and top border, height and width of the frame.
    `planes` gives [rows, 3, side, side] instead, and `unit` FP32 from 0 to 1, for detectors that were made so.
    Raises StaleFrame when a frame was overwritten.
    """

    def __init__(self, *, side: int = SIDE, planes: bool = False, unit: bool = False) -> None:
        self._side, self._planes, self._unit = side, planes, unit

    @classmethod
    def declare(cls, *, side: int = SIDE, planes: bool = False, unit: bool = False) -> str:
        """The signature for these options."""
        shape = f"3,{side},{side}" if planes else f"{side},{side},3"
        return f"frame:BYTES[-1,1] -> pixels:{'FP32' if unit else 'UINT8'}[-1,{shape}], place:FP32[-1,5]"

    def __call__(self, frame: Array) -> tuple[Array, Array]:
        squares = np.empty((len(frame), self._side, self._side, 3), np.uint8)
        places = np.empty((len(frame), 5), np.float32)
        for row, handle in enumerate(frame[:, 0]):
            one = decode(handle)
            with ring.read(one) as pixels:
                squares[row], scale, left, top = letterbox(pixels, one, self._side)
            places[row] = scale, left, top, one.height, one.width
        made: Array = squares
        if self._planes:
            made = made.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(made / np.float32(255) if self._unit else made), places


@stage(f"map0:FP32[1,-1,-1,-1], map1:FP32[1,-1,-1,-1], place:FP32[1,5] -> {_FOUND}")
class Boxes:
    """The maps of YOLOv3-tiny to boxes in pixels of the frame, best first; only of `labels`, where some are named."""

    def __init__(self, *, labels: list[str] | tuple[str, ...] = (), side: int = SIDE) -> None:
        unknown = sorted(set(labels) - set(yolo.COCO))
        if unknown:
            raise BadConfig(f"the detector knows no {', '.join(unknown)}", hint=f"it knows {', '.join(yolo.COCO)}")
        self._side = side
        self._wanted = np.array([not labels or name in labels for name in yolo.COCO])
        self._names = np.array([name.encode() for name in yolo.COCO], np.object_)

    def __call__(
        self,
        map0: Array,
        map1: Array,
        place: Array,
        *,
        score_threshold: Annotated[float, Meta(ge=0, le=1, description="least score of a box")] = 0.1,
        iou_threshold: Annotated[float, Meta(ge=0, le=1, description="boxes that overlap more are one")] = 0.45,
        max_boxes: Annotated[int, Meta(ge=1, le=3000, description="most boxes of a frame")] = 100,
    ) -> tuple[Array, Array, Array]:
        maps = (map0[0], map1[0])
        boxes, scores, kinds = yolo.decode(maps, anchors=yolo.TINY_ANCHORS, side=self._side, least=score_threshold)
        kept = np.flatnonzero(self._wanted[kinds])
        boxes, scores, kinds = boxes[kept], scores[kept], kinds[kept]
        stay = nms(boxes, scores, overlap=iou_threshold, groups=kinds)[:max_boxes]
        return scale_back(boxes[stay], place[0]), scores[stay].astype(np.float32), self._names[kinds[stay]]


@stage(f"{_FOUND}, state:BYTES[1] -> tracks:BYTES[1]")
class Tracking:
    """The boxes of a camera's next frame to its tracks: `tracks` is MessagePack, a list of messages.Track.

    `state` is MessagePack of (seconds in the stream, whether the frame was looked at by the detector). A sequence is a
    camera; a worker that is lost takes the tracks of its cameras with it. `first` is the number that the first new
    track gets, so that numbers go on where a lost worker ended.
    """

    def __init__(self, **options: Any) -> None:
        from torchship_video.tracking import CameraTracker, TrackerOptions

        try:
            self._options = msgspec.convert(options, TrackerOptions)
        except msgspec.ValidationError as fault:
            raise BadConfig(f"options of the tracker: {fault}") from None
        CameraTracker(self._options)  # its package takes seconds to load: now, and not while the first frame waits
        self._trackers: dict[str, Any] = {}

    def __call__(
        self,
        boxes: Array,
        scores: Array,
        labels: Array,
        state: Array,
        *,
        sequence_id: str = "",
        sequence_start: bool = False,
        sequence_end: bool = False,
        first: Annotated[int, Meta(ge=1)] = 1,
    ) -> Array:
        from torchship_video.tracking import CameraTracker

        seconds, looked = msgspec.msgpack.decode(state[0], type=tuple[float, bool])
        if sequence_start or sequence_id not in self._trackers:
            self._trackers[sequence_id] = CameraTracker(self._options, first=first)
        tracker = self._trackers[sequence_id]
        tracks = tracker.update(boxes, scores, labels, seconds=seconds) if looked else tracker.predict(seconds)
        if sequence_end:
            del self._trackers[sequence_id]
        return np.array([msgspec.msgpack.encode(tracks)], np.object_)
