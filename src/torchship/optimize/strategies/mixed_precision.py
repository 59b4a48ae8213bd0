"""Mixed precision: int8 that the guard refused, with its most sensitive layers back in float until it holds."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from torchship import plugins, process
from torchship.optimize import workspace
from torchship.optimize.attempt import SearchContext
from torchship.optimize.choose import Goal, cost, is_valid
from torchship.optimize.facts import left_in_float
from torchship.optimize.guard import precision_of
from torchship.optimize.sensitivity import LayerNoise, sensitivity
from torchship.optimize.strategies import Asked
from torchship.optimize.strategies.proposals import equalized
from torchship.optimize.trial import Trial
from torchship.recipe import Option, Recipe, Step

_MOST_CANDIDATES = 3
_NAMED_LAYERS = 6


def worth_it(trials: Sequence[Trial], *, goal: Goal) -> list[Trial]:
    """The refused int8 candidates that would win if they were valid, best first. Pure."""
    best = min((cost(trial, goal=goal) for trial in trials if is_valid(trial)), default=float("inf"))
    found = [
        trial
        for trial in trials
        if trial.status == "refused"
        and cost(trial, goal=goal) < best
        and precision_of(trial.recipe) == "int8"
        and not left_in_float(trial.recipe)
        and not trial.recipe.weights
    ]
    return sorted(found, key=lambda trial: cost(trial, goal=goal))[:_MOST_CANDIDATES]


class MixedPrecision:
    """Asks for further forms of int8 candidates that the guard refused: equalized where that applies, then with other
    ranges, then with layers left out of int8, from the form that drifted least.

    For each the worst 1, 2, 4 ... layers go back to float until the guard holds or half of them are float; then the
    fewest that still hold are looked for between the last two steps. `layers` is the ranking they go by.
    """

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        self._steps: Generator[Asked, Trial, None] | None = None
        self.layers: tuple[LayerNoise, ...] = ()

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """The next form, which depends on what became of the last."""
        try:
            if self._steps is not None:
                return [self._steps.send(results[-1])]
            candidates = worth_it(results, goal=self._context.config.goal)
            if not candidates:
                return []
            seconds = min(120.0, self._context.deadline - time.monotonic())
            self.layers = ranking(self._context, recipe=candidates[0].recipe, seconds=seconds)
            self._steps = self._forms(candidates, {trial.recipe.key for trial in results})
            return [next(self._steps)]
        except StopIteration:
            return []

    def _forms(self, candidates: Sequence[Trial], keys: set[str]) -> Generator[Asked, Trial, None]:
        for candidate in candidates:
            forms = [candidate]
            for recipe in gentler(candidate.recipe, context=self._context):
                if recipe.key in keys:
                    continue
                keys.add(recipe.key)
                forms.append((yield Asked(recipe)))
                if forms[-1].status == "ok":
                    break
            else:
                if self.layers:
                    yield from _with_layers(min(forms, key=_drift), self.layers)


def _with_layers(candidate: Trial, layers: Sequence[LayerNoise]) -> Generator[Asked, Trial, None]:
    """Forms with more and more layers in float, then with fewer again."""
    count, failed, before, most = 1, 0, candidate.verdict, max(1, len(layers) // 2)
    while failed < most:
        trial = yield _without(candidate.recipe, layers[:count])
        if trial.status == "ok":
            break
        if trial.status != "refused" or (trial.verdict and before and trial.verdict.error == before.error):
            return  # this backend cannot leave layers out
        failed, count, before = count, min(count * 2, most), trial.verdict
    else:
        return
    while count - failed > max(1, count // 8):
        middle = (count + failed) // 2
        trial = yield _without(candidate.recipe, layers[:middle])
        if trial.status == "ok":
            count = middle
        else:
            failed = middle


def gentler(recipe: Recipe, *, context: SearchContext) -> list[Recipe]:
    """Recipes that differ in what may mend int8 without leaving a layer out: equalized, then each other range search
    of the backend with biases corrected.
    """
    equal = equalized(recipe, model=context.model, hardware=context.hardware)
    found = [] if equal is None else [equal]
    if recipe.options.get("precision") == "int8" and "bias_correction" not in recipe.options:  # not searched before
        ranges: Sequence[str] = plugins.fact("backends", recipe.backend, "RANGES", ())
        for word in ranges:
            if word != recipe.options.get("range", ranges[0]):
                options = {**recipe.options, "range": word, "bias_correction": True}
                found.append(msgspec.structs.replace(recipe, options=options))
    return found


def _drift(trial: Trial) -> tuple[float, float]:
    """How far a trial is from valid: by the user's metric where there is one, else by its outputs' error."""
    verdict = trial.verdict
    if verdict is None:
        return float("inf"), float("inf")
    return -verdict.metric if verdict.metric is not None else 0.0, verdict.error


def _without(recipe: Recipe, layers: Sequence[LayerNoise]) -> Asked:
    """The recipe with layers left out of int8, by the step that quantizes: a transform of torch's, or the backend."""
    left: Option = [layer.path for layer in layers]
    quantizes = [plugins.fact("transforms", step.transform, "PRECISION") == "int8" for step in recipe.transforms]
    steps = tuple(
        Step(step.transform, {**step.options, "exclude": left}) if its else step
        for step, its in zip(recipe.transforms, quantizes, strict=True)
    )
    options = recipe.options if any(quantizes) else {**recipe.options, "exclude": left}
    return Asked(Recipe(recipe.backend, options, steps), note=describe(layers))


def describe(layers: Sequence[LayerNoise]) -> str:
    """Which layers were left out, for the report."""
    named = ", ".join(f"{layer.path or 'the module itself'} ({layer.db:.1f} dB)" for layer in layers[:_NAMED_LAYERS])
    more = f" and {len(layers) - _NAMED_LAYERS} more" if len(layers) > _NAMED_LAYERS else ""
    return f"kept in float, as the most sensitive to int8: {named}{more}"


def ranking(context: SearchContext, *, recipe: Recipe, seconds: float) -> tuple[LayerNoise, ...]:
    """The layers of the model, those first that suffer most from the int8 of `recipe`; from the cache, or by a child.

    Empty when that fails.
    """
    per_channel = recipe.options.get("per_channel") is not False
    key = context.model_hash if per_channel else f"{context.model_hash}-by-tensor"
    known = context.cache.kept("sensitivity", key, tuple[LayerNoise, ...])
    if known is not None:
        return known
    outcome = process.run(
        "torchship.optimize.strategies.mixed_precision:rank_here",
        argument={"model": str(context.model_file), "seconds": seconds / 2, "per_channel": per_channel},
        timeout=seconds,
        memory=context.config.limits.memory,
        threads=context.config.threads,
    )
    if outcome.fault:
        return ()
    found = msgspec.convert(outcome.value, tuple[LayerNoise, ...])
    context.cache.keep("sensitivity", key, found)
    return found


def rank_here(argument: Any) -> list[LayerNoise]:
    """The child's side of `ranking`."""
    model = workspace.take(Path(argument.pop("model")))
    return sensitivity(model, **argument)
