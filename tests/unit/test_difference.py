"""How far arrays differ: the relative L2 error, and NaN and infinity treated alike everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from torchship import difference
from torchship.tensors import Array

NAN, INF = float("nan"), float("inf")


def of(*values: float) -> Array:
    return np.array(values, np.float32)


def test_the_error_is_relative_to_the_wanted_and_absolute_where_that_is_zero() -> None:
    assert difference.relative_error(of(3, 4), of(3, 4.5)) == pytest.approx(0.1)
    assert difference.relative_error(of(0, 0), of(0, 0.5)) == pytest.approx(0.5)
    assert difference.relative_error(of(), of()) == 0.0
    assert difference.relative_error(of(1, 2), of(1, 2, 3)) == INF


@pytest.mark.parametrize(
    ("wanted", "found", "odd"),
    [(NAN, NAN, False), (INF, INF, False), (INF, -INF, True), (NAN, INF, True), (1.0, NAN, True), (NAN, 1.0, True)],
)
def test_nan_and_infinity_must_stand_where_they_are_wanted_and_nowhere_else(
    wanted: float, found: float, odd: bool
) -> None:
    a, b = of(1, wanted), of(1, found)
    assert difference.odd_places(a, b).tolist() == [False, odd]
    assert difference.relative_error(a, b) == (INF if odd else 0.0)
    assert difference.is_close(a, b, tolerance=0.01) is not odd
    assert difference.row_errors(a, b).tolist() == [0.0, INF if odd else 0.0]


def test_a_quiet_row_is_not_hidden_by_a_loud_one() -> None:
    wanted = np.array([[1.0, 1.0], [1000.0, 1000.0]], np.float32)
    found = np.array([[2.0, 2.0], [1000.0, 1000.0]], np.float32)
    assert difference.relative_error(wanted, found) < 2e-3
    assert difference.row_errors(wanted, found).tolist() == pytest.approx([1.0, 0.0])
    assert difference.row_errors(wanted, found, floor=0.1)[0] == pytest.approx(2**0.5 / (0.1 * 500.5 * 2**0.5))


def test_bfloat16_and_integers_are_compared_too() -> None:
    import ml_dtypes

    half = of(1.0, 2.0).astype(ml_dtypes.bfloat16)
    assert difference.relative_error(half, half) == 0.0
    assert not difference.odd_places(np.array([1, 2]), np.array([1, 3])).any()
    assert difference.share_equal(np.array([1, 2]), np.array([1, 3])) == 0.5
    assert not difference.is_close(np.array([1, 2]), np.array([1, 3]), tolerance=0.5)


def test_the_cosine_of_two_zeros_is_one() -> None:
    assert difference.cosine(of(0, 0), of(0, 0)) == 1.0
    assert difference.cosine(of(1, 0), of(0, 1)) == 0.0
    assert difference.cosine(of(1, NAN), of(2, NAN)) == pytest.approx(1.0)
