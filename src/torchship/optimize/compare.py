"""Compares two artifacts, or the reports of one search on two machines: what was measured then, or side by side now."""

from __future__ import annotations

import textwrap
from pathlib import Path

import msgspec
import numpy as np

from torchship import difference, textfiles
from torchship.artifact import Artifact
from torchship.artifact.manifest import BatchPoint, Manifest, Timing
from torchship.errors import BadConfig, NotFound, Unavailable
from torchship.optimize import interleaved
from torchship.optimize.facts import Facts, load
from torchship.optimize.measure import point
from torchship.optimize.trial import Trial


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
    if isinstance(a, Facts) or isinstance(b, Facts):
        first, second = _report(a), _report(b)
        if first is None or second is None:
            raise BadConfig(
                "a report cannot be compared with an artifact that holds none",
                hint="give two report.json, or two artifacts",
            )
        return reports(first, second)
    return rows(*(side.manifest if isinstance(side, Artifact) else side for side in (a, b)))


def _report(side: Artifact | Manifest | Facts) -> Facts | None:
    if not isinstance(side, Artifact):
        return side if isinstance(side, Facts) else None
    path = side.path / "report" / "report.json"
    return load(path) if path.is_file() else None


def rows(a: Manifest, b: Manifest) -> list[Comparison]:
    """What the manifests say: recipe, machine, latency, throughput, size, memory, error."""
    found = [
        Comparison("recipe", a.recipe.label, b.recipe.label),
        Comparison("machine", a.hardware, b.hardware),
        Comparison("signature", str(a.signature), "the same" if a.signature == b.signature else str(b.signature)),
        Comparison(
            "weights",
            a.provenance.model_hash,
            "the same" if _same_model(a, b) else f"{b.provenance.model_hash} (another model)",
        ),
        Comparison("packed", a.provenance.created, b.provenance.created),
    ]
    if a.timing and b.timing:
        found += _timing_rows(a.timing, b.timing)
    return found + _verdict_rows(a, b)


def _same_model(a: Manifest, b: Manifest) -> bool:
    return a.provenance.model_hash == b.provenance.model_hash


def _timing_rows(a: Timing, b: Timing) -> list[Comparison]:
    found = []
    shared = sorted({point.batch for point in a.curve} & {point.batch for point in b.curve})
    for batch in shared:
        found += point_rows(_at(a, batch), _at(b, batch))
    found += _totals(a, b)
    found.append(Comparison("load, s", f"{a.load_s:.2f}", f"{b.load_s:.2f}", a.load_s / b.load_s if b.load_s else None))
    found.append(Comparison("threads", str(a.threads), str(b.threads)))
    return found


def _totals(a: Timing, b: Timing) -> list[Comparison]:
    """Best throughput, file size, peak memory."""
    fastest = [max(timing.curve, key=lambda p: p.rows_per_s) for timing in (a, b)]
    first, second = (f"{p.rows_per_s:,.0f} (batch {p.batch})" for p in fastest)
    found = [Comparison("best rows/s", first, second, fastest[1].rows_per_s / fastest[0].rows_per_s)]
    for what, x, y in (
        ("file size, MB", a.file_size, b.file_size),
        ("peak memory, MB", a.peak_memory, b.peak_memory),
    ):
        found.append(Comparison(what, f"{x / 1e6:.2f}", f"{y / 1e6:.2f}", x / y if y else None))
    return found


def point_rows(a: BatchPoint, b: BatchPoint) -> list[Comparison]:
    """Median and tail of one batch size."""
    return [
        Comparison(f"batch {a.batch} p50, ms", f"{a.p50_ms:.3f}", f"{b.p50_ms:.3f}", a.p50_ms / b.p50_ms),
        Comparison(f"batch {a.batch} p99, ms", f"{a.p99_ms:.3f}", f"{b.p99_ms:.3f}", a.p99_ms / b.p99_ms),
    ]


def _at(timing: Timing, batch: int) -> BatchPoint:
    return next(found for found in timing.curve if found.batch == batch)


def _verdict_rows(a: Manifest, b: Manifest) -> list[Comparison]:
    if a.verdict is None or b.verdict is None:
        return []
    found = [
        Comparison("output error", f"{a.verdict.error:.3g}", f"{b.verdict.error:.3g}"),
        Comparison("cosine", f"{a.verdict.cosine:.6f}", f"{b.verdict.cosine:.6f}"),
    ]
    if a.verdict.top1 is not None and b.verdict.top1 is not None:
        found.append(Comparison("top-1 agreement", f"{a.verdict.top1:.2%}", f"{b.verdict.top1:.2%}"))
    if a.verdict.metric is not None and b.verdict.metric is not None:
        found.append(Comparison("metric", f"{a.verdict.metric:.5g}", f"{b.verdict.metric:.5g}"))
    return found


def side_by_side(a: Artifact, b: Artifact, *, device: str = "cpu", threads: int) -> list[Comparison]:
    """Both measured now on this machine, in turns, at batch 1 and 8 where they take it.

    Raises Unavailable when one of them does not run here.
    """
    found = []
    limit = min(a.manifest.signature.max_rows, b.manifest.signature.max_rows)
    for batch in (1, 8):
        if batch > limit:
            break
        seconds = interleaved.measure([(a.path, batch), (b.path, batch)], device=device, threads=threads)
        for artifact, taken in zip((a, b), seconds, strict=True):
            if not taken:
                raise Unavailable(f"{artifact.path} does not run here", hint="`torchship doctor` says what does")
        found += point_rows(*(point(taken, batch=batch) for taken in seconds))
    return found


def outputs_apart(a: Artifact, b: Artifact, *, trust: bool) -> Comparison:
    """How far B's outputs are from A's on A's example inputs. Raises BadConfig when they take different inputs."""
    if a.manifest.signature != b.manifest.signature:
        raise BadConfig("the artifacts have different signatures", hint="compare artifacts of one model")
    stages = [artifact.open(trust=trust) for artifact in (a, b)]
    try:
        inputs = a.inputs()
        answers = [{name: np.asarray(array) for name, array in stage(inputs).items()} for stage in stages]
    finally:
        for stage in stages:
            stage.close()
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
    found = [
        Comparison("machine", a.hardware, b.hardware),
        Comparison("threads", str(a.threads or "all"), str(b.threads or "all")),
        Comparison("signature", a.signature, "the same" if a.signature == b.signature else b.signature),
        Comparison("created", a.created, b.created),
        Comparison("winner", _winner(a), _winner(b)),
    ]
    best = [facts.trials[facts.choice.winner] for facts in (a, b) if facts.choice.winner is not None]
    if len(best) == 2:
        found += [
            Comparison(f"winner, {row.what}", row.a, row.b, row.better)
            for row in _summary(best[0].timing, best[1].timing)
        ]
    tried = [{trial.recipe.key: trial for trial in facts.trials} for facts in (a, b)]
    for key in dict.fromkeys([*tried[0], *tried[1]]):
        first, second = (one.get(key) for one in tried)
        either = [trial for trial in (first, second) if trial is not None]
        if any(trial.status != "skipped" for trial in either):
            label = either[0].recipe.label
            found.append(Comparison(f"{label}, batch 1 p50, ms", _told(first), _told(second), _ratio(first, second)))
    return found


def _summary(a: Timing | None, b: Timing | None) -> list[Comparison]:
    if a is None or b is None:
        return []
    return [point_rows(a.curve[0], b.curve[0])[0], *_totals(a, b)]


def _winner(facts: Facts) -> str:
    return "none" if facts.choice.winner is None else facts.trials[facts.choice.winner].recipe.label


def _told(trial: Trial | None) -> str:
    if trial is None:
        return "not tried"
    if trial.status != "ok" or trial.timing is None:
        return f"failed: {textwrap.shorten(trial.failure, 60)}" if trial.status == "failed" else trial.status
    return f"{trial.timing.curve[0].p50_ms:.3f}"


def _ratio(a: Trial | None, b: Trial | None) -> float | None:
    if a is None or b is None or a.status != "ok" or b.status != "ok" or not a.timing or not b.timing:
        return None
    return a.timing.curve[0].p50_ms / b.timing.curve[0].p50_ms
