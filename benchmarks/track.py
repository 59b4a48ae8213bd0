"""How well `torchship watch` tracks: HOTA, IDF1, MOTA and switches on clips with a public truth.

`python -m benchmarks.track --data DIR`, or TORCHSHIP_MOT=DIR. DIR holds CLIP.mp4 beside CLIP.gt.txt (MOTChallenge); the
clips' licence keeps them out of this repository, and without them nothing is measured. Two rows a clip: with the
truth's boxes given as detections, which judges the tracker alone, and with the detector of the store (where there is
none, the same network in torch, fp32). The tracker's settings were chosen on TUD-Campus; the last line is of the other
clips. Every frame is looked at: this measures accuracy, `benchmarks.video` speed.
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
Found = tuple[Array, Array, Array]  # boxes, scores, labels


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


def detector() -> tuple[str, Callable[[Array], tuple[Array, Array]]]:
    """What it is, and a function of a square that gives the two maps of YOLOv3-tiny."""
    store = Store()
    try:
        version = store.resolve(DETECTOR)
        run = Composed(plan(convert({"name": DETECTOR, "stages": [{"artifact": DETECTOR}]}), store), store)
    except TorchshipError:
        import torch

        from torchship_video.detector import network

        module = network()

        def eager(pixels: Array) -> tuple[Array, Array]:
            with torch.inference_mode():
                maps = module(torch.from_numpy(pixels))
            return maps["map0"].numpy(), maps["map1"].numpy()

        return "torch fp32", eager

    def served(pixels: Array) -> tuple[Array, Array]:
        maps = run({"pixels": pixels}, {})
        return maps["map0"], maps["map1"]

    return f"artifact {version.name}", served


def detected(clip: Path) -> Iterator[Found]:
    """What the detector finds on every frame."""
    _, maps = detector()
    boxes = Boxes(labels=["person"])
    for pixels, place in squares(clip):
        yield boxes(*maps(pixels), place)


def given(truth: Frames, frames: int) -> Iterator[Found]:
    """The truth's boxes as if a detector had found them."""
    for number in range(1, frames + 1):
        boxes = np.array(truth.get(number, ([], []))[1], np.float32).reshape(-1, 4)
        yield boxes, np.ones(len(boxes), np.float32), bytes_array([b"person"] * len(boxes))


def tracked(found: Iterator[Found], *, rate: float) -> Frames:
    """The confirmed tracks that were seen, as a file of `watch --mot` holds them."""
    tracker = CameraTracker(TrackerOptions(rate=rate))
    frames: Frames = {}
    for number, (boxes, scores, labels) in enumerate(found):
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
def main(data: Path | None) -> None:
    """Print the table and the line for machines."""
    folder = data or next((path for path in FOLDERS if path.is_dir()), None)
    clips = sorted(path for path in folder.glob("*.mp4") if path.with_suffix(".gt.txt").exists()) if folder else []
    if not clips:
        print("skipped: no clips with a truth here (--data DIR, or TORCHSHIP_MOT); DIR holds CLIP.mp4 and CLIP.gt.txt")
        sys.exit(0)
    print(f"detector: {detector()[0]}; tracker: {TrackerOptions().kind}, settings chosen on {TUNED_ON}")
    print(f"{'clip':16} {'boxes':10}   HOTA   DetA   AssA   IDF1   MOTA   prec recall switches")
    others: list[tuple[Score, Score]] = []
    for clip in clips:
        truth = read(clip.with_suffix(".gt.txt"), truth=True)
        with av.open(str(clip)) as film:
            stream = film.streams.video[0]
            rate, frames = float(stream.average_rate or 25), stream.frames or max(truth)
        exact = compare(truth, tracked(given(truth, frames), rate=rate))
        print(row(clip.stem, "truth", exact))
        ours = compare(truth, tracked(detected(clip), rate=rate))
        print(row(clip.stem, "detector", ours), flush=True)
        if clip.stem != TUNED_ON or len(clips) == 1:
            others.append((exact, ours))

    exact_ones, our_ones = zip(*others, strict=True)
    boxes, idf1 = np.mean([found.idf1 for found in exact_ones]), np.mean([found.idf1 for found in our_ones])
    hota, switches = np.mean([found.hota for found in our_ones]), sum(found.switches for found in our_ones)
    print(f"idf1_boxes={boxes:.3f} idf1={idf1:.3f} hota={hota:.3f} switches={switches}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
