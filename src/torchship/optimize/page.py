"""The report as one self-contained page: table, Pareto plots, batch curves, failures; no network, dark and light."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
from markupsafe import Markup

from torchship.optimize import finetune, plots
from torchship.optimize.facts import (
    Facts,
    at_batch,
    best_rate,
    cells,
    eager_of,
    has_won,
    left_in_float,
    megabytes,
    ms_text,
    ordered,
    outside_of,
)
from torchship.optimize.judge import HOPELESS
from torchship.optimize.trial import Trial
from torchship.plugins import rendered

# options of a search that are not those of one recipe
_NOT_ITS_OWN = {"--recipe", "--backends", "--budget", "--store", "--name", "--labels"}


def render(facts: Facts) -> str:
    """HTML of a report; loads nothing from anywhere."""
    measured = [trial for trial in facts.trials if trial.timing and trial.timing.curve and trial.verdict]
    return rendered(
        "torchship.optimize",
        "report.html.j2",
        facts=facts,
        winner=None if facts.choice.winner is None else facts.trials[facts.choice.winner],
        tiles=_tiles(facts),
        rows=_rows(facts),
        colours=_colours(facts),
        measured={trial.recipe.backend for trial in measured},
        by_error=_pareto(facts, measured),
        by_size=_sizes(facts, measured),
        rates=_curves(facts, measured, rate=True),
        calls=_curves(facts, measured, rate=False),
        layers=_sensitivity(facts),
        troubles=_troubles(facts),
        commands=[(trial.recipe.label, reproduce(facts, trial)) for trial in ordered(facts)],
        circumstances=_circumstances(facts),
    )


def _colours(facts: Facts) -> dict[str, int]:
    """A colour for each backend; eager is always grey."""
    backends = dict.fromkeys(trial.recipe.backend for trial in facts.trials if trial.recipe.backend != "eager")
    return {"eager": 0} | {name: 1 + index % (plots.COLOURS - 1) for index, name in enumerate(backends)}


def _tiles(facts: Facts) -> list[tuple[str, str]]:
    """What the winner came to: a figure and what it is, each."""
    if facts.choice.winner is None:
        return []
    trial, eager = facts.trials[facts.choice.winner], eager_of(facts)
    timing, verdict = trial.timing, trial.verdict
    if timing is None or verdict is None:
        return []
    first = timing.curve[0]
    tiles = [(f"{ms_text(first.p50_ms)} ms", f"p50 at batch 1 (p99 {ms_text(first.p99_ms)})")]
    if eager is not None and eager.timing is not None:
        tiles.insert(0, (f"{eager.timing.curve[0].p50_ms / first.p50_ms:.1f}x", "faster than eager at batch 1"))
        tiles.append((f"{best_rate(trial):,.0f}/s", f"rows at best ({best_rate(trial) / best_rate(eager):.1f}x eager)"))
        tiles.append((f"{megabytes(timing.file_size)} MB", f"on disk (eager {megabytes(eager.timing.file_size)} MB)"))
    tiles.append((f"{timing.peak_memory / 1e6:.0f} MB", "peak memory of the process, up to batch 8"))
    if verdict.metric is not None and verdict.reference_metric is not None:
        tiles.append((f"{verdict.metric:.4g}", f"your metric (eager {verdict.reference_metric:.4g})"))
    elif verdict.top1 is not None:
        tiles.append((f"{verdict.top1:.1%}", f"top-1 agreement on {facts.rows} rows"))
    tiles.append((f"{verdict.error:.2g}", "relative output error"))
    return tiles


def _rows(facts: Facts) -> list[dict[str, Any]]:
    """The rows of the table; skipped trials have no numbers and are told below it."""
    eager, colours = eager_of(facts), _colours(facts)
    base = eager.timing.curve[0].p50_ms if eager and eager.timing else 0.0
    found = []
    for trial in ordered(facts):
        if trial.status == "skipped":
            continue
        won = has_won(facts, trial)
        label, *others, remark = cells(trial, base=base, outside=outside_of(facts, trial), won=won)
        row = {"label": label, "cells": others, "remark": "; ".join(word for word in (remark, *trial.notes) if word)}
        found.append(row | {"look": "won" if won else trial.status, "colour": colours[trial.recipe.backend]})
    return found


def _pareto(facts: Facts, measured: Sequence[Trial]) -> Markup:
    floor = min((t.verdict.error for t in measured if t.verdict and 0 < t.verdict.error < HOPELESS), default=1e-7) / 3
    dots = [
        _dot(facts, trial, max(trial.verdict.error, floor))
        for trial in measured
        if trial.verdict and trial.verdict.error < HOPELESS
    ]
    return plots.scatter(dots, x_title="p50 at batch 1, ms", y_title="relative output error")


def _sizes(facts: Facts, measured: Sequence[Trial]) -> Markup:
    dots = [_dot(facts, trial, trial.timing.file_size / 1e6) for trial in measured if trial.timing]
    return plots.scatter(dots, x_title="p50 at batch 1, ms", y_title="size, MB")


def _dot(facts: Facts, trial: Trial, y: float) -> plots.Dot:
    assert trial.timing is not None  # noqa: S101  # only measured trials are drawn
    x = trial.timing.curve[0].p50_ms
    label = f"{trial.recipe.label}: {ms_text(x)} ms, {plots.number(y)}"
    colour = _colours(facts)[trial.recipe.backend]
    return plots.Dot(x, y, label, colour, strong=has_won(facts, trial), hollow=trial.status != "ok")


def _curves(facts: Facts, measured: Sequence[Trial], *, rate: bool) -> Markup:
    series = [
        plots.Series(
            trial.recipe.label,
            [(point.batch, point.rows_per_s if rate else point.p50_ms) for point in trial.timing.curve],
            _colours(facts)[trial.recipe.backend],
            strong=has_won(facts, trial),
        )
        for trial in measured
        if trial.timing and at_batch(trial, 8)
    ]
    return plots.lines(series, x_title="batch size", y_title="rows/s" if rate else "p50, ms")


def _sensitivity(facts: Facts) -> Markup:
    kept = {path for trial in facts.trials if trial.status == "ok" for path in left_in_float(trial.recipe)}
    worst = sorted(facts.sensitivity, key=lambda item: item[1])[:24]
    return plots.bars([(name, value, name in kept) for name, value in worst], unit="dB")


def _troubles(facts: Facts) -> list[tuple[str, str, str]]:
    """Label, reason and log of refused and failed trials; skipped ones by their reasons; backends that took no part."""
    items = [(t.recipe.label, t.failure, t.log) for t in ordered(facts) if t.status in ("refused", "failed")]
    skipped: dict[str, list[str]] = {}
    for trial in facts.trials:
        if trial.status == "skipped":
            skipped.setdefault(trial.failure, []).append(trial.recipe.label)
    items += [(f"{len(labels)} not tried", f"{why}: {', '.join(labels)}", "") for why, labels in skipped.items()]
    return [*items, *((name, reason, "") for name, reason in sorted(facts.left_out.items()))]


def reproduce(facts: Facts, trial: Trial) -> str:
    """One command (or call, for a search from Python) that runs one row again."""
    steps = tuple(step for step in trial.recipe.transforms if step.transform != finetune.STEP)  # --finetune takes it
    recipe = msgspec.json.encode(msgspec.structs.replace(trial.recipe, transforms=steps)).decode()
    if facts.command:
        words = shlex.split(facts.command)
        kept = [word for before, word in pairwise(["", *words]) if not {before, word} & _NOT_ITS_OWN]
        return shlex.join([*kept, "--no-publish", "--recipe", recipe])
    return f"torchship.optimize(module, example_inputs, recipes=[msgspec.json.decode({recipe!r}, type=Recipe)])"


def _circumstances(facts: Facts) -> list[tuple[str, str]]:
    versions = {"torchship": facts.torchship, **facts.packages}
    return [
        ("machine", facts.hardware),
        ("threads", str(facts.threads)),
        ("device", facts.device),
        ("source", facts.source),
        ("when", f"{facts.created}, {facts.seconds:.0f} s"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("judged on", f"{facts.rows} rows"),
        *(("note", note) for note in facts.notes),
    ]
