"""Rescues int8 candidates that the guard refused: the most sensitive layers go back to float until it holds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from torchship import process
from torchship.artifact import folder as folders
from torchship.optimize import combine, race
from torchship.optimize.choose import Goal, cost, is_valid
from torchship.optimize.guard import precision_of
from torchship.optimize.race import Course
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe

_MOST_CANDIDATES = 3
_NAMED_LAYERS = 6


class Layer(msgspec.Struct, frozen=True):
    """One layer's signal to quantization noise in dB: at the outputs where that was measured, else its own."""

    path: str
    db: float


def worth_it(trials: Sequence[Trial], *, goal: Goal) -> list[Trial]:
    """The refused int8 candidates that would win if they were valid, best first. Pure."""
    best = min((cost(t.timing, goal=goal) for t in trials if is_valid(t) and t.timing), default=float("inf"))
    found = []
    for trial in trials:
        measured = trial.status == "refused" and trial.timing is not None and trial.timing.curve
        if (
            measured
            and trial.timing
            and precision_of(trial.recipe) == "int8"
            and not trial.recipe.options.get("exclude")
        ):
            price = cost(trial.timing, goal=goal)
            if price < best:
                found.append((price, trial))
    return [trial for _, trial in sorted(found, key=lambda item: item[0])][:_MOST_CANDIDATES]


def run(candidates: Sequence[Trial], layers: Sequence[Layer], *, course: Course, deadline: float) -> Iterator[Trial]:
    """Further trials of refused candidates: equalized where that applies, then with layers left out of int8.

    For each the worst 1, 2, 4 ... layers go back to float until the guard holds or half of them are float; then the
    fewest that still hold are looked for between the last two steps.
    """
    for candidate in candidates:
        changed = combine.equalized(candidate.recipe, model=course.model, hardware=course.hardware)
        if changed is not None and time.monotonic() < deadline:
            trial = race.attempt(changed, course=course, left=deadline - time.monotonic())
            yield trial
            if trial.status == "ok":
                continue
        if layers:
            yield from _attempts(candidate, layers, course, deadline)


def _attempts(candidate: Trial, layers: Sequence[Layer], course: Course, deadline: float) -> Iterator[Trial]:
    """Trials with more and more layers in float."""
    count, failed, before = 1, 0, candidate.verdict
    while count <= max(1, len(layers) // 2) and time.monotonic() < deadline:
        trial = _attempt(candidate.recipe, layers[:count], course, deadline)
        yield trial
        if trial.status == "ok":
            break
        if trial.status == "failed" or (trial.verdict and before and trial.verdict.error == before.error):
            return  # this backend cannot leave layers out
        failed, count, before = count, count * 2, trial.verdict
    else:
        return
    while count - failed > max(1, count // 4) and time.monotonic() < deadline:
        middle = (count + failed) // 2
        trial = _attempt(candidate.recipe, layers[:middle], course, deadline)
        yield trial
        if trial.status == "ok":
            count = middle
        else:
            failed = middle


def _attempt(recipe: Recipe, layers: Sequence[Layer], course: Course, deadline: float) -> Trial:
    options = {**recipe.options, "exclude": [layer.path for layer in layers]}
    changed = msgspec.structs.replace(recipe, options=options)
    trial = race.attempt(changed, course=course, left=max(30.0, deadline - time.monotonic()))
    return msgspec.structs.replace(trial, notes=(*trial.notes, describe(layers)))


def describe(layers: Sequence[Layer]) -> str:
    """Which layers were left out, for the report."""
    named = ", ".join(f"{layer.path or 'the module itself'} ({layer.db:.1f} dB)" for layer in layers[:_NAMED_LAYERS])
    more = f" and {len(layers) - _NAMED_LAYERS} more" if len(layers) > _NAMED_LAYERS else ""
    return f"kept in float, as the most sensitive to int8: {named}{more}"


def ranking(course: Course, *, seconds: float) -> tuple[Layer, ...]:
    """The layers of the model, the most sensitive first; from the cache, or by a child. Empty when that fails."""
    known = course.cache.root / "sensitivity" / f"{course.model_hash}.json"
    try:
        return msgspec.json.decode(known.read_bytes(), type=tuple[Layer, ...])
    except (FileNotFoundError, msgspec.MsgspecError):
        pass
    outcome = process.run(
        "torchship.optimize.rescue:rank_here",
        argument={"capsule": str(course.capsule), "seconds": seconds / 2},
        timeout=seconds,
        memory=course.limits.memory,
        threads=course.threads,
    )
    if outcome.fault:
        return ()
    found = msgspec.convert(outcome.value, tuple[Layer, ...])
    folders.write(known, msgspec.json.encode(found))
    return found


def rank_here(argument: Any) -> Any:
    """The child's side of `ranking`."""
    from torchship.optimize import capsule
    from torchship.optimize.sensitivity import sensitivity

    model = capsule.take(Path(argument["capsule"]))
    found = sensitivity(model, seconds=float(argument["seconds"]))
    return [{"path": layer.path, "db": layer.db} for layer in found]
