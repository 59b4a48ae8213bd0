"""The raw maps of YOLOv3 to boxes. Only what may be a thing is decoded: most places of a map hold nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchship.tensors import Array

COCO = (  # noqa: SIM905  # a list would be as many lines as labels
    "person,bicycle,car,motorbike,aeroplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,sofa,"
    "pottedplant,bed,diningtable,toilet,tvmonitor,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
"""The labels of COCO in Darknet's order and spelling."""

TINY_ANCHORS = (
    ((81.0, 82.0), (135.0, 169.0), (344.0, 319.0)),
    ((23.0, 27.0), (37.0, 58.0), (81.0, 82.0)),
)
"""Of YOLOv3-tiny: width and height in pixels of its input, for each map from the coarsest to the finest.

The cfg gives the finest map the first three anchors (mask 0,1,2), but the weights were trained with the second to the
fourth: with the cfg's, boxes on that map come out half as large as what they are of.
"""


def decode(
    maps: Sequence[Array], *, anchors: Sequence[Sequence[tuple[float, float]]], side: int, least: float
) -> tuple[Array, Array, Array]:
    """Boxes [n, 4] (left, top, right, bottom in pixels of the square input), scores [n] and kinds [n] of one picture.

    `maps` are FP32 [anchors * (5 + kinds), h, w]: of each anchor x, y, width, height, whether there is anything, and
    the kinds, all raw. A box counts for its best kind, with a score of at least `least`.
    """
    boxes, scores, kinds = [], [], []
    floor = np.log(least / (1 - least)) if 0 < least < 1 else -np.inf
    for grid, sizes in zip(maps, anchors, strict=True):
        height, width = grid.shape[1:]
        numbers = grid.reshape(len(sizes), -1, height * width)
        anchor, place = np.nonzero(numbers[:, 4] >= floor)  # the product with a kind's score is smaller still
        found = numbers[anchor, :, place].astype(np.float32)
        best = found[:, 5:].argmax(axis=1)
        score = _sigmoid(found[:, 4]) * _sigmoid(found[np.arange(len(found)), 5 + best])
        kept = score >= least
        anchor, place, found, best, score = anchor[kept], place[kept], found[kept], best[kept], score[kept]
        cell = np.stack([place % width, place // width], axis=1)
        centre = (_sigmoid(found[:, :2]) + cell) * (side / width, side / height)
        half = np.exp(np.minimum(found[:, 2:4], 10)) * np.asarray(sizes)[anchor] / 2
        boxes.append(np.concatenate([centre - half, centre + half], axis=1).astype(np.float32))
        scores.append(score)
        kinds.append(best)
    return np.concatenate(boxes), np.concatenate(scores), np.concatenate(kinds)


def _sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)))
