"""Which versions are wanted, and which batch a measured curve advises."""

from __future__ import annotations

import pytest

from torchship.artifact.manifest import BatchPoint
from torchship.serve.catalog import best_batch


def curve(*points: tuple[int, float]) -> list[BatchPoint]:
    """Points of (batch, milliseconds)."""
    return [BatchPoint(batch, ms, ms, ms, batch / ms * 1e3) for batch, ms in points]


@pytest.mark.parametrize(
    ("points", "most", "target", "expected"),
    [
        ([(1, 18), (4, 72), (8, 150)], 64, 0.0, 1),  # batches gain nothing: take single rows
        ([(1, 5), (8, 10), (32, 20), (64, 41)], 64, 0.0, 32),
        ([(1, 5), (8, 10), (32, 20)], 256, 0.0, 256),  # still rising where the measurement ended
        ([(1, 5), (8, 10), (32, 20)], 8, 0.0, 8),
        ([(1, 5), (8, 10), (32, 40)], 64, 0.03, 8),
        ([(1, 50), (8, 90)], 64, 0.01, 1),  # nothing keeps to it: the quickest
        ([], 16, 0.0, 16),
    ],
)
def test_the_batch_follows_the_curve(points: list[tuple[int, float]], most: int, target: float, expected: int) -> None:
    assert best_batch(curve(*points), most=most, target=target) == expected
