"""How well `torchship watch` tracks: HOTA, IDF1, MOTA and switches on clips with a public truth.

`python -m benchmarks.track --data DIR`, or TORCHSHIP_MOT=DIR. DIR holds CLIP.mp4 beside CLIP.gt.txt (MOTChallenge); the
clips' licence keeps them out of this repository, and without them nothing is measured. The rows of a clip: with the
truth's boxes given as detections, which judges the tracker alone; with the detector in torch, fp32; with the artifact
of the store, where there is one; and how far IDF1 moves by itself when a little noise is added to the maps of fp32. An
artifact whose IDF1 lies within that is not worse than fp32, as far as such short clips can tell. The tracker's settings
were chosen on TUD-Campus; the last line is of the other clips, with the artifact where there is one. Every frame is
looked at: this measures accuracy, `benchmarks.video` speed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import click
import numpy as np

from torchship.artifact import Store
from torchship.errors import TorchshipError
from torchship.pipeline import Composed, convert, plan
from torchship.tensors import Array, bytes_array
from torchship_video.messages import Frame, Track
from torchship_video.pixels import letterbox
from torchship_video.score import Frames, Score, compare, read
from torchship_video.stages import DETECTOR, SIDE, Boxes
from torchship_video.tracking import CameraTracker, TrackerOptions

TUNED_ON = "TUD-Campus"
FOLDERS = (Path("../shared/data/mot"), Path("/work/shared/data/mot"))
NOISE, DRAWS = 0.01, 8
Found = tuple[Array, Array, Array]  # boxes, scores, labels
Seen = tuple[Array, Array, Array]  # the two maps, and where the frame lies in the square
Detector = Callable[[Array], tuple[Array, Array]]


def squares(clip: Path) -> Iterator[tuple[Array, Array]]:
    """Of every frame the detector's square [1, side, side, 3], and where the frame lies in it."""
    with av.open(str(clip)) as film:
        for number, shown in enumerate(film.decode(video=0)):
            pixels: Array = np.asarray(shown.to_ndarray(format="rgb24"), np.uint8)
            height, width = pixels.shape[:2]
            frame = Frame("", "", 0, 0, number, 0.0, 0.0, width, height, "RGB")
            fitted = letterbox(pixels, frame, SIDE)
            place = np.array([[fitted.scale, fitted.left, fitted.top, height, width]], np.float32)
            yield fitted.pixels[None], place


def exact_detector() -> Detector:
    """The network in torch, fp32: a function of a square that gives its two maps."""
    import torch

    from torchship_video.detector import network

    module = network()

    def eager(pixels: Array) -> tuple[Array, Array]:
        with torch.inference_mode():
            maps = module(torch.from_numpy(pixels))
        return maps["map0"].numpy(), maps["map1"].numpy()

    return eager


def stored_detector(store: Store) -> Detector | None:
    """The same of the store's artifact; None where there is none."""
    try:
        run = Composed(plan(convert({"name": DETECTOR, "stages": [{"artifact": DETECTOR}]}), store), store)
    except TorchshipError:
        return None

    def served(pixels: Array) -> tuple[Array, Array]:
        maps = run({"pixels": pixels}, {})
        return maps["map0"], maps["map1"]

    return served


def detected(clip: Path, maps: Detector) -> list[Seen]:
    """The maps of every frame."""
    return [(*(np.array(one) for one in maps(pixels)), place) for pixels, place in squares(clip)]  # type: ignore[misc]


def found(seen: list[Seen], *, noise: float = 0.0, seed: int = 0) -> Iterator[Found]:
    """The boxes in the maps; `noise` is added to these, in shares of their own standard deviation."""
    boxes, draw = Boxes(labels=["person"]), np.random.default_rng(seed)
    for *maps, place in seen:
        map0, map1 = (one + noise * one.std() * draw.standard_normal(one.shape, np.float32) for one in maps)
        yield boxes(map0, map1, place)


def given(truth: Frames, frames: int) -> Iterator[Found]:
    """The truth's boxes as if a detector had found them."""
    for number in range(1, frames + 1):
        boxes = np.array(truth.get(number, ([], []))[1], np.float32).reshape(-1, 4)
        yield boxes, np.ones(len(boxes), np.float32), bytes_array([b"person"] * len(boxes))


def tracked(boxes_of_frames: Iterator[Found], *, rate: float) -> Frames:
    """The confirmed tracks that were seen, as a file of `watch --mot` holds them."""
    tracker = CameraTracker(TrackerOptions(rate=rate))
    frames: Frames = {}
    for number, (boxes, scores, labels) in enumerate(boxes_of_frames):
        tracks: list[Track] = tracker.update(boxes, scores, labels, seconds=number / rate)
        kept = [track for track in tracks if track.confirmed and track.seen]
        frames[number + 1] = ([track.number for track in kept], [track.box for track in kept])
    return frames


def row(name: str, how: str, score: Score) -> str:
    """A line of the table."""
    figures = (score.hota, score.deta, score.assa, score.idf1, score.mota, score.precision, score.recall)
    return f"{name:16} {how:10} " + " ".join(f"{figure:6.3f}" for figure in figures) + f" {score.switches:8}"


@click.command()
@click.option("--data", type=click.Path(path_type=Path), envvar="TORCHSHIP_MOT", metavar="DIR", help="The clips.")
@click.option("--store", default="", metavar="DIR", help="The store of the artifact.")
def main(data: Path | None, store: str) -> None:
    """Print the table and the line for machines."""
    folder = data or next((path for path in FOLDERS if path.is_dir()), None)
    clips = sorted(path for path in folder.glob("*.mp4") if path.with_suffix(".gt.txt").exists()) if folder else []
    if not clips:
        print("skipped: no clips with a truth here (--data DIR, or TORCHSHIP_MOT); DIR holds CLIP.mp4 and CLIP.gt.txt")
        sys.exit(0)
    exact_maps, stored_maps = exact_detector(), stored_detector(Store(store or None))
    print(f"tracker: {TrackerOptions().kind}, settings chosen on {TUNED_ON}")
    print(f"{'clip':16} {'boxes':10}   HOTA   DetA   AssA   IDF1   MOTA   prec recall switches")
    others: list[tuple[Score, Score]] = []
    for clip in clips:
        truth = read(clip.with_suffix(".gt.txt"), truth=True)
        with av.open(str(clip)) as film:
            stream = film.streams.video[0]
            rate, frames = float(stream.average_rate or 25), stream.frames or max(truth)
        exact = compare(truth, tracked(given(truth, frames), rate=rate))
        print(row(clip.stem, "truth", exact))
        seen = detected(clip, exact_maps)
        ours = compare(truth, tracked(found(seen), rate=rate))
        print(row(clip.stem, "fp32", ours), flush=True)
        if stored_maps is not None:
            ours = compare(truth, tracked(found(detected(clip, stored_maps)), rate=rate))
            print(row(clip.stem, "artifact", ours), flush=True)
        shaken = [compare(truth, tracked(found(seen, noise=NOISE, seed=seed), rate=rate)) for seed in range(DRAWS)]
        idf1 = sorted(score.idf1 for score in shaken)
        print(f"{clip.stem:16} fp32 with {NOISE:.0%} of noise, {DRAWS} draws: IDF1 {idf1[0]:.3f} to {idf1[-1]:.3f}, "
              f"mean {np.mean(idf1):.3f}; MOTA {min(score.mota for score in shaken):.3f} to "
              f"{max(score.mota for score in shaken):.3f}", flush=True)  # fmt: skip
        if clip.stem != TUNED_ON or len(clips) == 1:
            others.append((exact, ours))

    exact_ones, our_ones = zip(*others, strict=True)
    boxes, idf1 = np.mean([one.idf1 for one in exact_ones]), np.mean([one.idf1 for one in our_ones])
    hota, switches = np.mean([one.hota for one in our_ones]), sum(one.switches for one in our_ones)
    print(f"idf1_boxes={boxes:.3f} idf1={idf1:.3f} hota={hota:.3f} switches={switches}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
