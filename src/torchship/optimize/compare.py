"""Compares two artifacts, or the reports of one search on two machines: what was measured then, or side by side now."""

from __future__ import annotations

import textwrap
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np

from torchship import difference, textfiles
from torchship.artifact import Artifact
from torchship.artifact.manifest import BatchPoint, Manifest, Timing
from torchship.errors import BadConfig, NotFound, Unavailable
from torchship.optimize.facts import Facts, load
from torchship.optimize.measure import interleaved, point
from torchship.optimize.trial import Trial

# what verdicts tell of a candidate's answers: the row's name, the field, how it is written
_AGREEMENT = (
    ("output error", "error", "{:.3g}"),
    ("cosine", "cosine", "{:.6f}"),
    ("top-1 agreement", "top1", "{:.2%}"),
    ("metric", "metric", "{:.5g}"),
)


class Comparison(msgspec.Struct, frozen=True):
    """One line: both values as text, and how many times better B is (above 1) where that can be said."""

    what: str
    a: str
    b: str
    better: float | None = None


def of(a: Artifact | Manifest | Facts, b: Artifact | Manifest | Facts) -> list[Comparison]:
    """Two artifacts or manifests, or two reports; beside a report an artifact gives the one that lies in it.

    Raises BadConfig where one side has a report only, and the other none.
    """
    if not isinstance(a, Facts) and not isinstance(b, Facts):
        return rows(*(side.manifest if isinstance(side, Artifact) else side for side in (a, b)))
    found = list[Facts]()
    for side in (a, b):
        kept = side.path / "report" / "report.json" if isinstance(side, Artifact) else None
        if isinstance(side, Facts):
            found.append(side)
        elif kept is not None and kept.is_file():
            found.append(load(kept))
        else:
            raise BadConfig(
                "a report cannot be compared with an artifact that holds none",
                hint="give two report.json, or two artifacts",
            )
    return reports(*found)


def rows(a: Manifest, b: Manifest) -> list[Comparison]:
    """What the manifests say: recipe, machine, latency, throughput, size, memory, error."""
    weights = [side.provenance.model_hash for side in (a, b)]
    found = [
        Comparison("recipe", a.recipe.label, b.recipe.label),
        Comparison("machine", a.hardware, b.hardware),
        Comparison("signature", str(a.signature), "the same" if a.signature == b.signature else str(b.signature)),
        Comparison("weights", weights[0], "the same" if weights[0] == weights[1] else f"{weights[1]} (another model)"),
        Comparison("packed", a.provenance.created, b.provenance.created),
    ]
    if a.timing and b.timing:
        curves = [{point.batch: point for point in timing.curve} for timing in (a.timing, b.timing)]
        for batch in sorted(curves[0].keys() & curves[1].keys()):
            found += point_rows(curves[0][batch], curves[1][batch])
        found += _totals(a.timing, b.timing)
        found.append(_smaller("load, s", a.timing.load_s, b.timing.load_s, "{:.2f}"))
        found.append(Comparison("threads", str(a.timing.threads), str(b.timing.threads)))
    for what, field, form in _AGREEMENT:
        x, y = (getattr(side.verdict, field, None) for side in (a, b))
        if x is not None and y is not None:
            found.append(Comparison(what, form.format(x), form.format(y)))
    return found


def _smaller(what: str, a: float, b: float, form: str) -> Comparison:
    """A number of which the smaller is the better."""
    return Comparison(what, form.format(a), form.format(b), a / b if b else None)


def _totals(a: Timing, b: Timing) -> list[Comparison]:
    """Best throughput, file size, peak memory."""
    fastest = [max(timing.curve, key=lambda p: p.rows_per_s) for timing in (a, b)]
    first, second = (f"{p.rows_per_s:,.0f} (batch {p.batch})" for p in fastest)
    return [
        Comparison("best rows/s", first, second, fastest[1].rows_per_s / fastest[0].rows_per_s),
        _smaller("file size, MB", a.file_size / 1e6, b.file_size / 1e6, "{:.2f}"),
        _smaller("peak memory, MB", a.peak_memory / 1e6, b.peak_memory / 1e6, "{:.2f}"),
    ]


def point_rows(a: BatchPoint, b: BatchPoint) -> list[Comparison]:
    """Median and tail of one batch size."""
    return [
        _smaller(f"batch {a.batch} p50, ms", a.p50_ms, b.p50_ms, "{:.3f}"),
        _smaller(f"batch {a.batch} p99, ms", a.p99_ms, b.p99_ms, "{:.3f}"),
    ]


def side_by_side(a: Artifact, b: Artifact, *, device: str = "cpu", threads: int) -> list[Comparison]:
    """Both measured now on this machine, in turns, at batch 1 and 8 where they take it.

    Raises Unavailable when one of them does not run here.
    """
    found = []
    limit = min(a.manifest.signature.max_rows, b.manifest.signature.max_rows)
    for batch in (1, 8):
        if batch > limit:
            break
        seconds = interleaved([(a.path, batch), (b.path, batch)], device=device, threads=threads)
        for artifact, taken in zip((a, b), seconds, strict=True):
            if not taken:
                raise Unavailable(f"{artifact.path} does not run here", hint="`torchship doctor` says what does")
        found += point_rows(*(point(taken, batch=batch) for taken in seconds))
    return found


def outputs_apart(a: Artifact, b: Artifact, *, trust: bool) -> Comparison:
    """How far B's outputs are from A's on A's example inputs. Raises BadConfig when they take different inputs."""
    if a.manifest.signature != b.manifest.signature:
        raise BadConfig("the artifacts have different signatures", hint="compare artifacts of one model")
    with closing(a.open(trust=trust)) as first, closing(b.open(trust=trust)) as second:
        inputs = a.inputs()
        answers = [{name: np.asarray(array) for name, array in stage(inputs).items()} for stage in (first, second)]
    pairs = [(answers[0][spec.name], answers[1][spec.name]) for spec in a.manifest.signature.outputs]
    error = max((difference.relative_error(*pair) for pair in pairs), default=0.0)
    cosine = min((difference.cosine(*pair) for pair in pairs), default=1.0)
    return Comparison("B's outputs against A's", "reference", f"error {error:.3g}, cosine {cosine:.6f}")


def read(path: Path) -> Manifest | Facts:
    """A `manifest.json` or a `report.json` by itself, as it may come from another machine.

    Raises NotFound and BadConfig.
    """
    try:
        data = textfiles.decode(path.read_bytes(), where=str(path))
    except OSError as fault:
        raise NotFound(f"{path} cannot be read: {fault.strerror}") from fault
    try:
        found = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return msgspec.json.decode(data, type=Facts) if "trials" in found else msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as fault:
        raise BadConfig(f"{path} is neither a manifest nor a report: {fault}") from fault


def reports(a: Facts, b: Facts) -> list[Comparison]:
    """Two searches, as on two machines: the machines, the winners, and every recipe that either tried."""
    winners = [facts.winner for facts in (a, b)]
    first, second = ("none" if winner is None else winner.recipe.label for winner in winners)
    found = [
        Comparison("machine", a.hardware, b.hardware),
        Comparison("threads", str(a.threads or "all"), str(b.threads or "all")),
        Comparison("signature", a.signature, "the same" if a.signature == b.signature else b.signature),
        Comparison("created", a.created, b.created),
        Comparison("winner", first, second),
    ]
    timings = [winner.timing for winner in winners if winner is not None and winner.timing is not None]
    if len(timings) == 2:
        summary = [point_rows(timings[0].curve[0], timings[1].curve[0])[0], *_totals(*timings)]
        found += [msgspec.structs.replace(row, what=f"winner, {row.what}") for row in summary]
    tried = [{trial.recipe.key: trial for trial in facts.trials} for facts in (a, b)]
    for key in dict.fromkeys([*tried[0], *tried[1]]):
        sides = [one.get(key) for one in tried]
        either = [trial for trial in sides if trial is not None]
        if any(trial.status != "skipped" for trial in either):
            (first, x), (second, y) = map(_told, sides)
            what = f"{either[0].recipe.label}, batch 1 p50, ms"
            found.append(Comparison(what, first, second, x / y if x and y else None))
    return found


def _told(trial: Trial | None) -> tuple[str, float]:
    """Milliseconds at batch 1 in words, and as a number; or what became of a trial, and 0."""
    if trial is None:
        return "not tried", 0.0
    if trial.status != "ok" or trial.timing is None:
        told = f"failed: {textwrap.shorten(trial.failure, 60)}" if trial.status == "failed" else trial.status
        return told, 0.0
    return f"{trial.timing.curve[0].p50_ms:.3f}", trial.timing.curve[0].p50_ms
