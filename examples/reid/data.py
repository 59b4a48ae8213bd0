"""Crops of people: of vtest.avi by the tracks of benchmarks/clips, and of MOT clips by their truth.

Nobody labelled vtest.avi for training. Crops of one track are taken for one person; two tracks that were there at one
time, on the same or on the other view, are two: that is all that training knows.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from benchmarks import identity
from numpy.typing import NDArray
from PIL import Image

from examples.reid.model import HEIGHT, WIDTH

TRAINED_UNTIL = 400  # frames of vtest.avi before this are for training, those from here on for evaluation
_LEAST_HEIGHT = 50


class Crops(NamedTuple):
    """`pixels` uint8 [rows, 128, 64, 3]; who each is (a track, or a person of a truth), on which camera, when."""

    pixels: NDArray[np.uint8]
    who: NDArray[np.int64]
    camera: NDArray[np.int64]
    frame: NDArray[np.int64]


def cut(image: NDArray[np.uint8], box: tuple[float, ...]) -> NDArray[np.uint8] | None:
    """The box of a picture, None when too little of it is inside."""
    height, width = image.shape[:2]
    left, top, right, bottom = (round(edge) for edge in box)
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
    if bottom - top < _LEAST_HEIGHT or right - left < _LEAST_HEIGHT / 4:
        return None
    part = Image.fromarray(image[top:bottom, left:right])
    return np.asarray(part.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))


def _joined(rows: list[tuple[NDArray[np.uint8], int, int, int]]) -> Crops:
    pixels, who, camera, frame = zip(*rows, strict=True)
    return Crops(np.stack(pixels), np.array(who), np.array(camera), np.array(frame))


def of_tracks(*, every: int = 2) -> Crops:
    """Crops of the training frames of vtest.avi; `who` counts tracks of both views."""
    known = {view: identity.tracks(view) for view in identity.VIEWS}
    rows = []
    for number, pixels in enumerate(identity.frames()):
        if number >= TRAINED_UNTIL:
            break
        if number % every:
            continue
        for camera, (view, columns) in enumerate(identity.VIEWS.items()):
            for track in known[view].get(number, ()):
                crop = cut(pixels[:, columns], track.box)
                if crop is not None:
                    rows.append((crop, 10_000 * camera + track.number, camera, number))
    return _joined(rows)


def of_truth(*, start: int = TRAINED_UNTIL, around: int = 6) -> Crops:
    """Crops of people of the written truth of vtest.avi, each place with some frames of its track before and after."""
    wanted: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    known = {view: identity.tracks(view) for view in identity.VIEWS}
    for person, entry in enumerate(identity.truth()["person"]):
        for view, number, x, y in entry["seen"]:
            inside = [t for t in known[view].get(number, ()) if t.box[0] <= x <= t.box[2] and t.box[1] <= y <= t.box[3]]
            for near in range(number - around, number + around + 1, 3) if number >= start and inside else ():
                wanted[view, near].append((person, inside[0].number))
    rows = []
    for number, pixels in enumerate(identity.frames()):
        for camera, (view, columns) in enumerate(identity.VIEWS.items()):
            for person, track_number in wanted.get((view, number), ()):
                for track in known[view].get(number, ()):
                    crop = cut(pixels[:, columns], track.box) if track.number == track_number else None
                    if crop is not None:
                        rows.append((crop, person, camera, number))
    return _joined(rows)


def of_mot(clip: Path, *, every: int = 5) -> Crops:
    """Crops of a MOT clip by its truth beside it (`NAME.gt.txt`): for evaluation only."""
    boxes: dict[int, list[tuple[int, tuple[float, ...]]]] = defaultdict(list)
    with clip.with_suffix(".gt.txt").open() as file:
        for line in csv.reader(file):
            x, y, width, height, shown = map(float, line[2:7])
            if shown:
                boxes[int(line[0]) - 1].append((int(line[1]), (x, y, x + width, y + height)))
    rows = []
    for number, pixels in enumerate(_frames(clip)):
        for who, box in boxes.get(number, ()) if number % every == 0 else ():
            crop = cut(pixels, box)
            if crop is not None:
                rows.append((crop, who, 0, number))
    return _joined(rows)


def _frames(clip: Path) -> Iterator[NDArray[np.uint8]]:
    import av

    with av.open(str(clip)) as opened:
        for frame in opened.decode(video=0):
            yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
