"""Rescues int8 candidates that the guard refused: the most sensitive layers go back to float until it holds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from torchship import plugins, process
from torchship.artifact import folder as folders
from torchship.optimize import combine, race
from torchship.optimize.choose import Goal, cost, is_valid
from torchship.optimize.facts import left_in_float
from torchship.optimize.guard import precision_of
from torchship.optimize.race import Course
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe, Step

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
        if measured and trial.timing and precision_of(trial.recipe) == "int8" and not left_in_float(trial.recipe):
            price = cost(trial.timing, goal=goal)
            if price < best:
                found.append((price, trial))
    return [trial for _, trial in sorted(found, key=lambda item: item[0])][:_MOST_CANDIDATES]


def run(
    candidates: Sequence[Trial], layers: Sequence[Layer], *, tried: Sequence[Trial], course: Course, deadline: float
) -> Iterator[Trial]:
    """Further trials of refused candidates: equalized where that applies, then with other ranges, then with layers
    left out of int8, from the form that drifted least.

    For each the worst 1, 2, 4 ... layers go back to float until the guard holds or half of them are float; then the
    fewest that still hold are looked for between the last two steps.
    """
    keys = {trial.recipe.key for trial in tried}
    for candidate in candidates:
        forms = [candidate]
        for recipe in gentler(candidate.recipe, course=course):
            if recipe.key in keys or time.monotonic() > deadline:
                continue
            keys.add(recipe.key)
            forms.append(race.attempt(recipe, course=course, left=max(30.0, deadline - time.monotonic())))
            yield forms[-1]
            if forms[-1].status == "ok":
                break
        else:
            if layers:
                yield from _attempts(min(forms, key=_drift), layers, course, deadline)


def gentler(recipe: Recipe, *, course: Course) -> list[Recipe]:
    """Recipes that differ in what may mend int8 without leaving a layer out: equalized, then each other range search
    of the backend with biases corrected.
    """
    equal = combine.equalized(recipe, model=course.model, hardware=course.hardware)
    ranges: Sequence[str] = getattr(plugins.load("backends", name=recipe.backend), "RANGES", ())
    others = [word for word in ranges if word != recipe.options.get("range", ranges[0])]
    searched = [
        msgspec.structs.replace(recipe, options={**recipe.options, "range": word, "bias_correction": True})
        for word in others
        if recipe.options.get("precision") == "int8" and "bias_correction" not in recipe.options  # not searched before
    ]
    return [*([] if equal is None else [equal]), *searched]


def _drift(trial: Trial) -> tuple[float, float]:
    """How far a trial is from valid: by the user's metric where there is one, else by its outputs' error."""
    verdict = trial.verdict
    if verdict is None:
        return float("inf"), float("inf")
    return -verdict.metric if verdict.metric is not None else 0.0, verdict.error


def _attempts(candidate: Trial, layers: Sequence[Layer], course: Course, deadline: float) -> Iterator[Trial]:
    """Trials with more and more layers in float."""
    count, failed, before, most = 1, 0, candidate.verdict, max(1, len(layers) // 2)
    while failed < most and time.monotonic() < deadline:
        trial = _attempt(candidate.recipe, layers[:count], course, deadline)
        yield trial
        if trial.status == "ok":
            break
        if trial.status == "failed" or (trial.verdict and before and trial.verdict.error == before.error):
            return  # this backend cannot leave layers out
        failed, count, before = count, min(count * 2, most), trial.verdict
    else:
        return
    while count - failed > max(1, count // 8) and time.monotonic() < deadline:
        middle = (count + failed) // 2
        trial = _attempt(candidate.recipe, layers[:middle], course, deadline)
        yield trial
        if trial.status == "ok":
            count = middle
        else:
            failed = middle


def _attempt(recipe: Recipe, layers: Sequence[Layer], course: Course, deadline: float) -> Trial:
    changed = _without(recipe, [layer.path for layer in layers])
    trial = race.attempt(changed, course=course, left=max(30.0, deadline - time.monotonic()))
    return msgspec.structs.replace(trial, notes=(*trial.notes, describe(layers)))


def _without(recipe: Recipe, layers: list[str]) -> Recipe:
    """The recipe with layers left out of int8, by the step that quantizes: a transform of torch's, or the backend."""
    steps = tuple(
        Step(step.transform, {**step.options, "exclude": layers}) if step.transform == "quantize" else step
        for step in recipe.transforms
    )
    if steps != recipe.transforms:
        return msgspec.structs.replace(recipe, transforms=steps)
    return msgspec.structs.replace(recipe, options={**recipe.options, "exclude": layers})


def describe(layers: Sequence[Layer]) -> str:
    """Which layers were left out, for the report."""
    named = ", ".join(f"{layer.path or 'the module itself'} ({layer.db:.1f} dB)" for layer in layers[:_NAMED_LAYERS])
    more = f" and {len(layers) - _NAMED_LAYERS} more" if len(layers) > _NAMED_LAYERS else ""
    return f"kept in float, as the most sensitive to int8: {named}{more}"


def ranking(course: Course, *, recipe: Recipe, seconds: float) -> tuple[Layer, ...]:
    """The layers of the model, those first that suffer most from the int8 of `recipe`; from the cache, or by a child.

    Empty when that fails.
    """
    per_channel = recipe.options.get("per_channel") is not False
    scheme = "" if per_channel else "-by-tensor"
    known = course.cache.root / "sensitivity" / f"{course.model_hash}{scheme}.json"
    try:
        return msgspec.json.decode(known.read_bytes(), type=tuple[Layer, ...])
    except (FileNotFoundError, msgspec.MsgspecError):
        pass
    outcome = process.run(
        "torchship.optimize.rescue:rank_here",
        argument={"capsule": str(course.capsule), "seconds": seconds / 2, "per_channel": per_channel},
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
    found = sensitivity(model, seconds=float(argument["seconds"]), per_channel=bool(argument["per_channel"]))
    return [{"path": layer.path, "db": layer.db} for layer in found]
