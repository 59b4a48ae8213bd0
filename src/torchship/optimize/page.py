"""The report as one self-contained page: table, Pareto plots, batch curves, failures; no network, dark and light."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
from markupsafe import Markup

from torchship.optimize import plots
from torchship.optimize.choose import Goal, baseline, cost, is_valid
from torchship.optimize.facts import Facts, at_batch, best_rate, left_in_float, megabytes, ms_text
from torchship.optimize.judge import HOPELESS
from torchship.optimize.plots import Mark
from torchship.optimize.trial import Trial
from torchship.plugins import rendered
from torchship.recipe import FINETUNE, PRUNE

# options of a search that are not those of one recipe
_NOT_ITS_OWN = {"--recipe", "--backends", "--budget", "--store", "--name", "--labels"}

_GOALS: dict[Goal, tuple[str, Callable[[Trial], float]]] = {
    "latency": ("p50 at batch 1, ms", lambda trial: cost(trial, goal="latency")),
    "throughput": ("rows/s", best_rate),
    "size": ("size, MB", lambda trial: cost(trial, goal="size") / 1e6),
    "memory": ("peak memory, MB", lambda trial: cost(trial, goal="memory") / 1e6),
}


def render(facts: Facts) -> str:
    """HTML of a report; loads nothing from anywhere."""
    backends = dict.fromkeys(trial.recipe.backend for trial in facts.trials)
    backends.pop(baseline().backend, None)
    # a colour for each backend; eager is always grey
    colours = {baseline().backend: 0} | {name: 1 + i % (plots.COLOURS - 1) for i, name in enumerate(backends)}
    measured = [trial for trial in facts.trials if trial.timing and trial.timing.curve and trial.verdict]
    kept = {path for trial in facts.trials if trial.status == "ok" for path in left_in_float(trial.recipe)}
    worst = sorted(facts.sensitivity, key=lambda item: item[1])[:24]
    return rendered(
        "torchship.optimize",
        "report.html.j2",
        facts=facts,
        best_rate=best_rate,
        ms=ms_text,
        megabytes=megabytes,
        colours=colours,
        measured={trial.recipe.backend for trial in measured},
        **_drawings(facts, measured, colours),
        layers=plots.bars([(name, value, name in kept) for name, value in worst], unit="dB"),
        commands=[(trial.recipe.label, reproduce(facts, trial)) for trial in facts.ordered()],
    )


def _drawings(facts: Facts, measured: list[Trial], colours: dict[str, int]) -> dict[str, Markup]:
    """The plots: error and size against latency with a dot for each trial, both curves by batch size, and the best so
    far by the goal."""
    errors = [trial.verdict.error for trial in measured if trial.verdict]
    floor = min((error for error in errors if 0 < error < HOPELESS), default=1e-7) / 3
    by_error, by_size, rates, calls = list[Mark](), list[Mark](), list[Mark](), list[Mark]()
    for trial in measured:
        assert trial.timing is not None  # noqa: S101  # it was measured
        assert trial.verdict is not None  # noqa: S101
        label, curve, ms = trial.recipe.label, trial.timing.curve, trial.timing.curve[0].p50_ms
        how: dict[str, Any] = {"colour": colours[trial.recipe.backend], "strong": trial is facts.winner}
        error, size = max(trial.verdict.error, floor), trial.timing.file_size / 1e6
        for marks, y in ((by_error, error), (by_size, size)):
            if marks is by_size or error < HOPELESS:
                words = f"{label}: {ms_text(ms)} ms, {plots.number(y)}"
                marks.append(Mark(words, [(ms, y)], hollow=trial.status != "ok", **how))
        if at_batch(trial, 8):
            rates.append(Mark(label, [(point.batch, point.rows_per_s) for point in curve], **how))
            calls.append(Mark(label, [(point.batch, point.p50_ms) for point in curve], **how))
    latency = "p50 at batch 1, ms"
    return {
        "by_error": plots.plot(by_error, x_title=latency, y_title="relative output error"),
        "by_size": plots.plot(by_size, x_title=latency, y_title="size, MB"),
        "rates": plots.plot(rates, x_title="batch size", y_title="rows/s", joined=True),
        "calls": plots.plot(calls, x_title="batch size", y_title="p50, ms", joined=True),
        "so_far": so_far(facts),
    }


def so_far(facts: Facts) -> Markup:
    """How the best valid trial got better while the trials ran; what came out of the cache took no time."""
    words, value = _GOALS[facts.goal]
    seconds, best, points, names = 0.0, float("inf"), list[tuple[float, float]](), list[str]()
    for trial in facts.trials:
        seconds += 0 if trial.cached else trial.seconds
        if is_valid(trial) and cost(trial, goal=facts.goal) < best:
            best = cost(trial, goal=facts.goal)
            points.append((seconds, value(trial)))
            names.append(trial.recipe.label)
    if len(points) < 2 or not seconds:
        return Markup()
    mark = Mark("best so far", points, colour=1, strong=True, names=names)
    return plots.plot([mark], x_title="seconds of trials", y_title=words, joined=True, until=seconds)


def reproduce(facts: Facts, trial: Trial) -> str:
    """One command (or call, for a search from Python) that runs one row again."""
    # --finetune and --prune take those
    steps = tuple(step for step in trial.recipe.transforms if step.transform not in (FINETUNE, PRUNE))
    recipe = msgspec.json.encode(msgspec.structs.replace(trial.recipe, transforms=steps)).decode()
    if facts.command:
        words = shlex.split(facts.command)
        kept = [word for before, word in pairwise(["", *words]) if not {before, word} & _NOT_ITS_OWN]
        return shlex.join([*kept, "--no-publish", "--recipe", recipe])
    return f"torchship.optimize(module, example_inputs, recipes=[msgspec.json.decode({recipe!r}, type=Recipe)])"
