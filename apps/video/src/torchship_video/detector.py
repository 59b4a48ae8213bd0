"""The detector as a Model: fetched, optimized on frames, published. What serves it afterwards needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

import torchship
from torchship.artifact import Artifact, Store, open_artifact
from torchship.errors import BadInput, NoWinner
from torchship.stage import Stage
from torchship.stages.boxes import nms, overlaps
from torchship.tensors import Array, Tensors
from torchship_video import weights
from torchship_video.darknet import Darknet
from torchship_video.messages import Frame
from torchship_video.pixels import letterbox
from torchship_video.stages import DETECTOR, SIDE
from torchship_video.yolo import TINY_ANCHORS, decode

_PORTABLE = ("onnxruntime", "openvino")  # they serve without torch, and their files are data
_FRAMES = 96
Goal: TypeAlias = Literal["latency", "throughput", "size", "memory"]
_MAX_BATCH = 4
_SURE = 0.3


def network() -> Darknet:
    """YOLOv3-tiny with the weights of its authors. Raises Unavailable, CorruptArtifact."""
    return Darknet(weights.fetch("yolov3-tiny.cfg"), weights.fetch("yolov3-tiny.weights")).eval()


def prepare(
    store: Store,
    *,
    data: Path | None = None,
    budget: float = 240.0,
    goal: Goal = "latency",
    again: bool = False,
    max_drop: float = 0.05,
    tell: Callable[[str], None] = lambda _: None,
    on_trial: Any = None,
) -> Artifact:
    """Search the best way to run the detector here, int8 included, and publish it as `yolov3-tiny`.

    `data` is a video: of frames from all over it 64 calibrate and 32 others judge; else a public street scene is
    fetched. What judges is how well the boxes agree with those of fp32 (see Agreement), of which `max_drop` may be
    lost. What the store holds already is left as it is, unless `again`.
    Raises Unavailable, CorruptArtifact, BadInput, NoWinner.
    """
    if store.versions(DETECTOR) and not again:
        tell(f"{DETECTOR} is in the store already; --again makes it anew")
        return open_artifact(store.resolve(DETECTOR), verify=False)
    for name in ("yolov3-tiny.cfg", "yolov3-tiny.weights"):
        weights.fetch(name, tell=tell)
    taken = squares(data or weights.fetch("bikes.mp4", tell=tell))
    frames, judged = taken[np.arange(len(taken)) % 3 < 2], taken[2::3]
    module = network()
    tell(f"optimizing {DETECTOR} on {len(frames)} frames, judged on {len(judged)} others")
    with TemporaryDirectory(prefix="torchship-video-") as scratch:
        report = torchship.optimize(
            module,
            (torch.from_numpy(frames[:2]),),
            calibration=[{"pixels": frames[at : at + 4]} for at in range(0, len(frames), 4)],
            evaluate=Agreement(module, judged),
            guard=torchship.Guard(max_drop=max_drop),
            effort=torchship.Effort(seconds=0.5, max_batch=_MAX_BATCH),
            backends=_PORTABLE,
            budget=budget,
            goal=goal,
            store=Store(scratch),
            name=DETECTOR,
            on_trial=on_trial,
        )
        if report.artifact is None or report.winner is None:
            raise NoWinner(report.facts.choice.reason, hint="give more time with --budget, or other frames with --data")
        store.publish(report.artifact.path, name=DETECTOR)
    tell(f"{DETECTOR}: {report.winner.recipe.label}, {report.speedup:.1f}x eager")
    return open_artifact(store.resolve(DETECTOR), verify=False)


class Agreement:
    """How well a candidate's boxes agree with the module's own on frames UINT8 [n, side, side, 3]: F1 of each frame.

    What one side finds with a score of 0.3 or more the other must find too, a box of the same kind that overlaps it by
    half or more (IoU), with half that score at least: boxes near a threshold come and go with the last bit of a score.
    A frame on which both find nothing counts as 1.
    """

    def __init__(self, module: Darknet, frames: Array) -> None:
        self._frames = frames
        with torch.inference_mode():
            maps = [module(torch.from_numpy(frames[at : at + 1])) for at in range(len(frames))]
        self._wanted = [_boxes({name: value.numpy() for name, value in found.items()}) for found in maps]

    def __call__(self, stage: Stage) -> Array:
        """F1 of each frame."""
        found = [_boxes(stage({"pixels": self._frames[at : at + 1]})) for at in range(len(self._frames))]
        return np.array([_f1(*pair) for pair in zip(self._wanted, found, strict=True)])


def _boxes(maps: Tensors) -> tuple[Array, Array, Array]:
    """Boxes, scores and kinds, of what may be found."""
    both = [maps["map0"][0], maps["map1"][0]]
    boxes, scores, kinds = decode(both, anchors=TINY_ANCHORS, side=SIDE, least=_SURE / 2)
    kept = nms(boxes, scores, overlap=0.45, groups=kinds)
    return boxes[kept], scores[kept], kinds[kept]


def _f1(wanted: tuple[Array, Array, Array], found: tuple[Array, Array, Array]) -> float:
    near = (overlaps(wanted[0], found[0]) >= 0.5) & (wanted[2][:, None] == found[2])
    sure, also = wanted[1] >= _SURE, found[1] >= _SURE
    count = int(sure.sum() + also.sum())
    return float(near.any(axis=1)[sure].sum() + near.any(axis=0)[also].sum()) / count if count else 1.0


def squares(path: Path, *, most: int = _FRAMES) -> Array:
    """Frames from all over a video as the detector takes them: UINT8 [n, side, side, 3]. Raises BadInput."""
    frames = list(_decoded(path))
    if not frames:
        raise BadInput(f"{path} holds no frames", hint="give a video file")
    step = max(1, len(frames) // most)
    return np.stack(frames[::step][:most])


def _decoded(path: Path) -> Iterator[Array]:
    import av

    try:
        with av.open(str(path)) as container:
            for number, decoded in enumerate(container.decode(video=0)):
                pixels = decoded.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                height, width = pixels.shape[:2]
                frame = Frame("", "", 0, 0, number, 0.0, 0.0, width, height, "RGB")
                yield letterbox(pixels, frame, SIDE).pixels
    except av.error.FFmpegError as fault:
        raise BadInput(f"{path}: {fault}", hint="give a video file that FFmpeg reads") from None
