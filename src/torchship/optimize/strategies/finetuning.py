"""Fine-tuning: int8 that the guard refused, with weights from the user's own training loop."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from torchship.optimize import cache as caching
from torchship.optimize import capsule, finetune
from torchship.optimize.attempt import SearchContext
from torchship.optimize.strategies import Asked
from torchship.optimize.strategies.mixed_precision import worth_it
from torchship.optimize.trial import Trial
from torchship.recipe import Step


class FineTuning:
    """Asks, once, for the refused int8 candidates with tuned weights, where there is a loop to tune them."""

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        self._waiting: list[Asked] | None = None

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """The best candidate first. Trains in a child before the first is asked for."""
        if self._waiting is None:
            self._waiting = self._tuned(results)
        else:
            self._waiting = self._waiting[1:]
        return self._waiting

    def _tuned(self, results: Sequence[Trial]) -> list[Asked]:
        context, config = self._context, self._context.config
        candidates = worth_it(results, goal=config.goal)
        if not candidates or config.finetune is None:
            return []
        key = caching.digest(context.model_hash, source_hash(config.finetune))
        capsule.put(context.work / "loop.pkl", config.finetune, what="the fine-tuning loop")
        fault = finetune.in_child(
            work=context.work,
            weights=context.cache.root / "tuned" / f"{key}.safetensors",
            timeout=max(30.0, context.deadline - time.monotonic()),
            memory=config.limits.memory,
            threads=config.threads,
        )
        failure = f"fine-tuning: {fault}" if fault else ""
        recipes = [
            msgspec.structs.replace(trial.recipe, transforms=(Step(finetune.STEP), *trial.recipe.transforms))
            for trial in candidates
        ]
        return [Asked(recipe, failure=failure, tuned=key) for recipe in recipes]


def source_hash(function: Callable[..., Any]) -> str:
    """A hash of a function's source and defaults, or of its pickle where it has no source."""
    try:
        return caching.digest(inspect.getsource(function), repr(getattr(function, "__defaults__", None)))
    except (OSError, TypeError):
        import cloudpickle

        data: bytes = cloudpickle.dumps(function)
        return caching.digest(data)
