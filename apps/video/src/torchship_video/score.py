"""`torchship watch score`: how well tracks fit the truth, as HOTA, IDF1, MOTA and switches, from MOTChallenge text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from torchship.errors import BadConfig, BadInput

Frames = dict[int, tuple[list[int], list[tuple[float, float, float, float]]]]
"""Frame to the numbers of its tracks and their boxes (left, top, right, bottom)."""


class Score(msgspec.Struct, frozen=True):
    """How well tracks fit the truth. Ratios are 0 to 1; MOTA may be negative."""

    hota: float
    deta: float
    assa: float
    idf1: float
    mota: float
    precision: float
    recall: float
    switches: int
    misses: int
    false_boxes: int
    frames: int
    truth_tracks: int
    tracks: int


def read(path: Path, *, truth: bool = False) -> Frames:
    """The boxes of a MOTChallenge file: `frame,number,left,top,width,height[,score,...]`, frames from 1.

    Lines of the truth whose score is 0 are to be ignored by the format's rule, and are. Raises BadInput with the line.
    """
    found: Frames = {}
    taken: set[tuple[int, int]] = set()
    for number, line in _lines(path):
        where = f"{path}:{number}"
        fields = line.split(",") if "," in line else line.split()
        if len(fields) < 6:
            raise BadInput(f"{where}: {len(fields)} fields", hint="frame,number,left,top,width,height[,score,...]")
        try:
            values = [float(field) for field in fields[:7]]
        except ValueError:
            wrong = next(field for field in fields[:7] if not _is_number(field))
            raise BadInput(f"{where}: {wrong.strip()[:40]!r} is no number") from None
        frame, track = values[0], values[1]
        if not all(map(math.isfinite, values)) or frame < 1 or frame % 1 or track % 1:
            raise BadInput(f"{where}: frame {fields[0]}, track {fields[1]}", hint="whole numbers, frames from 1")
        if values[4] <= 0 or values[5] <= 0:
            raise BadInput(f"{where}: the box is {fields[4]} wide and {fields[5]} high", hint="both must be above 0")
        if (int(frame), int(track)) in taken:
            raise BadInput(f"{where}: track {int(track)} is on frame {int(frame)} twice", hint="once a frame")
        taken.add((int(frame), int(track)))
        if truth and len(values) > 6 and values[6] == 0:
            continue
        numbers, boxes = found.setdefault(int(frame), ([], []))
        numbers.append(int(track))
        boxes.append((values[2], values[3], values[2] + values[4], values[3] + values[5]))
    if truth and not found:
        raise BadInput(f"{path} holds no boxes", hint="a truth without boxes scores nothing")
    return found


def compare(truth: Frames, ours: Frames) -> Score:
    """Score `ours` against `truth`. Raises BadConfig where `motrics` is not installed."""
    try:
        import motrics
    except ImportError:
        raise BadConfig("motrics is not installed", hint="pip install 'torchship-video[score]'") from None
    aligned = motrics.align_frames(truth, ours)
    hota, clear = motrics.compute_hota(*aligned), motrics.compute_clear(*aligned)
    identity = motrics.compute_identity(*aligned)
    return Score(
        hota=hota.hota,
        deta=hota.deta,
        assa=hota.assa,
        idf1=identity.idf1,
        mota=clear.mota,
        precision=clear.clr_pr,
        recall=clear.clr_re,
        switches=clear.num_switches,
        misses=clear.num_misses,
        false_boxes=clear.num_false_positives,
        frames=len(aligned[0]),
        truth_tracks=len({number for numbers, _ in truth.values() for number in numbers}),
        tracks=len({number for numbers, _ in ours.values() for number in numbers}),
    )


@click.command(
    epilog="""\b
Examples:
  torchship watch score gt.txt tracks.txt
  torchship watch score gt.txt tracks.txt --json
"""
)
@click.argument("truth", type=click.Path(path_type=Path), metavar="TRUTH.txt")
@click.argument("ours", type=click.Path(path_type=Path), metavar="OURS.txt")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def score(*, truth: Path, ours: Path, as_json: bool) -> None:
    """Compare tracks with the truth: HOTA, IDF1, MOTA and switches of two MOTChallenge files."""
    found = compare(read(truth, truth=True), read(ours))
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{ours} against {truth}", title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    columns = {
        "HOTA": f"{found.hota:.3f}",
        "DetA": f"{found.deta:.3f}",
        "AssA": f"{found.assa:.3f}",
        "IDF1": f"{found.idf1:.3f}",
        "MOTA": f"{found.mota:.3f}",
        "prec": f"{found.precision:.3f}",
        "recall": f"{found.recall:.3f}",
        "switches": str(found.switches),
        "misses": str(found.misses),
        "false": str(found.false_boxes),
        "tracks": f"{found.tracks}/{found.truth_tracks}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*columns.values())
    Console().print(table)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that say something, counted from 1. Raises BadInput where it is no text."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except UnicodeDecodeError:
        raise BadInput(f"{path} is no text", hint="a MOTChallenge file is lines of numbers with commas") from None
    except OSError as fault:
        raise BadInput(f"{path}: {fault.strerror or fault}", hint="the path of a MOTChallenge text file") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
