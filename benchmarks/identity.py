"""vtest.avi as two cameras that share nothing: who is who across them, and counts per line, against a written truth.

    python -m benchmarks.identity [--artifact FOLDER]

The pixels are read from Debian's opencv-doc (`apt-get install opencv-doc`), the tracks of each view are those that
YOLOv3-tiny at 416 and ByteTrack (least IoU 0.3) found on it (benchmarks/clips/vtest-left.txt, vtest-right.txt), the
truth was written from looking at the frames (vtest-truth.toml). What the identities are told was chosen on frames
before 400. A pair is two places of the truth on different cameras; it is found when both
carry one identity. `certain` leaves out the tracks that were said to be ambiguous.
"""

from __future__ import annotations

import asyncio
import csv
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, cast

import click
import msgspec
import numpy as np

from torchship.artifact import Store
from torchship.pipeline import Composed, convert, plan
from torchship.serve.routes import Service
from torchship.tensors import Array, Tensors
from torchship_video import appearance, ring
from torchship_video.identity.assignment import Rule
from torchship_video.identity.identities import Identities
from torchship_video.identity.recognition import Recognition
from torchship_video.messages import Observation, Track
from torchship_video.zones import LineConfig, Zones

CLIPS = Path(__file__).parent / "clips"
VTEST = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
VIEWS = {"left": slice(0, 360), "right": slice(408, 768)}
RATE = 10.0


class Line:
    """The line `appearance` in this process, asked as a server is."""

    def __init__(self, config: dict[str, Any], store: Store | None = None) -> None:
        self._run = Composed(plan(convert(config), store or Store()), store or Store())

    async def infer(self, model: str, inputs: Tensors, *, outputs: Sequence[str] = ()) -> Tensors:
        return self._run(inputs, {})


@dataclass
class Result:
    """What came out. `pairs` counts found and right, found, and all that are right; so does `certain`."""

    identities: Identities
    pairs: tuple[int, int, int] = (0, 0, 0)
    certain: tuple[int, int, int] = (0, 0, 0)
    crossed: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    ambiguous: int = 0
    places: int = 0
    shown: dict[tuple[str, int], Observation] = field(default_factory=dict)

    def precision(self, kind: str = "pairs") -> float:
        right, found, _ = getattr(self, kind)
        return right / found if found else 1.0

    def recall(self, kind: str = "pairs") -> float:
        right, _, every = getattr(self, kind)
        return right / every if every else 1.0


def truth() -> dict[str, Any]:
    """People and the line."""
    return tomllib.loads((CLIPS / "vtest-truth.toml").read_text())


def tracks(view: str) -> dict[int, list[Track]]:
    """The tracks of each frame, from 0."""
    found: dict[int, list[Track]] = defaultdict(list)
    with (CLIPS / f"vtest-{view}.txt").open() as file:
        for number, track, left, top, width, height, score, *_ in csv.reader(file):
            x, y = float(left), float(top)
            box = (x, y, x + float(width), y + float(height))
            found[int(number) - 1].append(Track(int(track), box, float(score), "person", True))
    return found


def frames() -> Iterator[Array]:
    """vtest.avi as RGB [576, 768, 3]."""
    import av

    with av.open(str(VTEST)) as clip:
        for frame in clip.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


async def watch(identities: Identities, config: dict[str, Any], *, store: Store | None = None) -> Result:
    """Both cameras, frame by frame, through the ring, the line and the identities."""
    size = 576 * 360 * 3
    rings = {view: ring.RingWriter.make(size=size, slots=8) for view in VIEWS}
    recognition = Recognition(cast(Service, Line(config, store)), identities, pending=100)
    known = {view: tracks(view) for view in VIEWS}
    result = Result(identities)
    facts = truth()["line"]
    line = LineConfig(name="path", start=tuple(facts["start"]), end=tuple(facts["end"]), size=(360, 576))
    zones = Zones(lines=[line])
    crossed = {"in": 0, "out": 0}
    try:
        for number, pixels in enumerate(frames()):
            for view, columns in VIEWS.items():
                slot = rings[view].claim()
                assert slot is not None
                slot.pixels(360, 576, "RGB")[:] = pixels[:, columns]
                frame = slot.publish(view, sequence=number, taken=1e6 + number / RATE, position=number / RATE)
                seen = recognition.observe(Observation(frame, tuple(known[view].get(number, ()))))
                result.shown[view, number] = seen
                if view == facts["view"]:
                    for event in zones.update(seen.tracks, time=number / RATE, size=(360, 576)):
                        crossed[event.kind] += 1
            await asyncio.sleep(0)
        await recognition.settle()
    finally:
        for writer in rings.values():
            writer.close()
    result.crossed = {"to_the_left": crossed["in"], "to_the_right": crossed["out"]}
    score(result)
    return result


def score(result: Result) -> None:
    """Pairs across the two cameras, by who the tracks turned out to be in the end."""
    final: dict[tuple[str, int, int], tuple[int, bool]] = {}
    for number in result.identities.numbers():
        for visit in result.identities.visits(number):
            for place in range(round((visit.first - 1e6) * RATE), round((visit.last - 1e6) * RATE) + 1):
                final[visit.camera, visit.track, place] = (number, visit.ambiguous)
    places: list[tuple[str, str, int, bool]] = []
    for person in truth()["person"]:
        for view, number, x, y in person["seen"]:
            track = _at(result.shown[view, number], x, y)
            identity, doubtful = final.get((view, track, number), (0, False))
            places.append((person["looks"], view, identity, doubtful))
    result.places, result.missed = len(places), sum(not identity for _, _, identity, _ in places)
    result.ambiguous = sum(doubtful for *_, doubtful in places)
    result.pairs = _pairs(places)
    result.certain = _pairs([place for place in places if not place[3]])


def _pairs(places: list[tuple[str, str, int, bool]]) -> tuple[int, int, int]:
    pairs = [(a, b) for a, b in product(places, places) if (a[1], b[1]) == ("left", "right")]
    found = [(a, b) for a, b in pairs if a[2] and a[2] == b[2]]
    return sum(a[0] == b[0] for a, b in found), len(found), sum(a[0] == b[0] for a, b in pairs)


def _at(shown: Observation, x: float, y: float) -> int:
    """The track whose box is nearest around a point, 0 when there is none."""
    around = [
        (abs((track.box[0] + track.box[2]) / 2 - x) + abs((track.box[1] + track.box[3]) / 2 - y), track.number)
        for track in shown.tracks
        if track.box[0] <= x <= track.box[2] and track.box[1] <= y <= track.box[3]
    ]
    return min(around)[1] if around else 0


def gallery(rule: Rule, *, width: int) -> Identities:
    """An empty gallery in memory."""
    return Identities(embedder="benchmark", width=width, rule=rule)


def _show(name: str, result: Result) -> None:
    line = f"{name:28}"
    for kind in ("pairs", "certain"):
        right, found, every = getattr(result, kind)
        line += f"  {kind} {right:3} of {found:3} found are right, {every:3} there are: "
        line += f"precision {result.precision(kind):.2f}, recall {result.recall(kind):.2f};"
    line += f"  {len(result.identities.numbers())} identities, {result.ambiguous} of {result.places} places ambiguous"
    click.echo(line)


@click.command()
@click.option("--store", type=click.Path(path_type=Path), help="Where a trained embedder was published.")
@click.option("--artifact", default="", help="Its name there; see examples/reid.")
@click.option("--threshold", type=float, default=0.6, show_default=True, help="Of the trained embedder.")
def main(store: Path | None, artifact: str, threshold: float) -> None:
    """Print precision, recall and counts."""
    if not VTEST.exists():
        click.echo("vtest.avi is missing: apt-get install opencv-doc", err=True)
        sys.exit(1)
    rule = appearance.HISTOGRAM_RULE
    width = appearance.HISTOGRAM_WIDTH
    plain = asyncio.run(watch(gallery(msgspec.structs.replace(rule, travel=0.0), width=width), appearance.line()))
    _show("histogram, no travel times", plain)
    result = asyncio.run(watch(gallery(rule, width=width), appearance.line()))
    _show("histogram and travel times", result)
    if artifact:
        opened = Store(store) if store else Store()
        config = appearance.line(artifact=artifact)
        width = int(np.prod(plan(convert(config), opened).signature.outputs[0].shape[1:]))  # type: ignore[arg-type]
        result = asyncio.run(watch(gallery(Rule(threshold=threshold), width=width), config, store=opened))
        _show(f"{artifact} and travel times", result)
    for way in result.identities.transitions():
        if way.from_camera != way.to_camera:
            click.echo(f"  {way.from_camera} to {way.to_camera}: {way.count} times, median {way.p50} s")
    facts = truth()["line"]
    for side in ("to_the_left", "to_the_right"):
        click.echo(f"line crossed {side.replace('_', ' ')}: {result.crossed[side]}, truth {facts[side]}")
    wrong = sum(abs(result.crossed[side] - facts[side]) for side in ("to_the_left", "to_the_right"))
    click.echo(
        f"pair_precision={result.precision():.3f} pair_recall={result.recall():.3f} "
        f"certain_precision={result.precision('certain'):.3f} certain_recall={result.recall('certain'):.3f} "
        f"identities={len(result.identities.numbers())} people={len(truth()['person'])} "
        f"ambiguous={result.ambiguous} line_errors={wrong}"
    )


if __name__ == "__main__":
    main()
