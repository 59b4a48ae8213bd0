"""A native winner is published with the best portable trial as its fallback."""

from __future__ import annotations

from torchship.optimize.publishing import portable
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe


def trial(backend: str) -> Trial:
    """A trial of a backend."""
    return Trial(Recipe(backend), "ok", artifact=backend)


def test_the_best_portable_trial_is_the_fallback_of_a_native_winner() -> None:
    native, other, data, more = map(trial, ("aoti", "torchscript", "openvino", "onnxruntime"))
    assert portable([native, other, data, more]) is data
    assert portable([native, other]) is None
    assert portable([data, native, more]) is None  # it opens anywhere itself
