"""Range search: what each method covers, and that the careful ones err less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchship.errors import BadConfig
from torchship.lowering import ranges
from torchship.lowering.ranges import METHODS, Floats, ObservedRange


def seen_of(values: Floats) -> ObservedRange:
    seen = ObservedRange()
    seen.add(values, keep=100_000)
    return seen


def heavy_tailed() -> Floats:
    values = np.random.default_rng(0).normal(size=50_000).astype(np.float32)
    values[:3] = [60.0, -45.0, 80.0]
    return values


def test_minmax_covers_everything_and_zero() -> None:
    assert ranges.search(seen_of(np.array([2.0, 5.0], np.float32)), method="minmax") == (0.0, 5.0)
    assert ranges.search(seen_of(np.array([-2.0, -1.0], np.float32)), method="minmax") == (-2.0, 0.0)


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_the_careful_methods_cut_outliers_off(method: str) -> None:
    low, high = ranges.search(seen_of(heavy_tailed()), method=method)
    assert -45 <= low < 0 < high < 80


def rounding_error(values: Floats, low: float, high: float) -> float:
    """The mean squared error of `values` in 256 levels between `low` and `high`."""
    scale = (high - low) / 255
    zero = round(-low / scale)
    levels = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float(np.mean(np.square((levels - zero) * scale - values)))


def test_the_search_by_error_errs_least() -> None:
    values = heavy_tailed()
    errors = {m: rounding_error(values, *ranges.search(seen_of(values), method=m)) for m in METHODS}
    assert errors["mse"] <= min(errors.values()) * 1.001


def test_percentile_is_the_share_that_is_kept() -> None:
    values = np.linspace(0, 1, 10_001, dtype=np.float32)
    low, high = ranges.search(seen_of(values), method="percentile", percentile=90)
    assert low == 0
    assert high == pytest.approx(0.9, abs=1e-3)


@given(st.lists(st.floats(-1e6, 1e6, width=32), max_size=50), st.sampled_from(METHODS))
def test_an_interval_is_never_empty_and_holds_zero(values: list[float], method: str) -> None:
    low, high = ranges.search(seen_of(np.array(values, np.float32)), method=method)
    assert low <= 0 <= high
    assert low < high


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(BadConfig, match="magic"):
        ranges.search(seen_of(heavy_tailed()), method="magic")
