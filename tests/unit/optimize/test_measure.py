"""Measuring and the plots: what is counted, when a curve ends, and that pages hold what they should."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from torchship.artifact.manifest import BatchPoint
from torchship.optimize import plots
from torchship.optimize.measure import Effort, batch_sizes, curve, peak_memory, point, resized
from torchship.stage import Parameter, Parameters
from torchship.tensors import Signature, Tensors

QUICK = Effort(seconds=0.001, calls=3, fewest=2, warm_up=0.0, max_batch=64)


class Counting:
    """A stage that remembers the rows of its calls."""

    signature = Signature.parse("x:FP32[-1,2] -> y:FP32[-1,2]")
    parameters: tuple[Parameter, ...] = ()

    def __init__(self, max_batch: int = 64) -> None:
        self.max_batch = max_batch
        self.rows: list[int] = []

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        self.rows.append(len(tensors["x"]))
        return {"y": tensors["x"]}

    def close(self) -> None:
        """Nothing is open."""


X = {"x": np.arange(6, dtype=np.float32).reshape(3, 2)}


def test_batches_double_up_to_the_limit() -> None:
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(12) == [1, 2, 4, 8]
    assert batch_sizes(1) == [1]


def test_rows_are_repeated_or_cut() -> None:
    assert resized(X, rows=5)["x"][:, 0].tolist() == [0, 2, 4, 0, 2]
    assert resized(X, rows=1)["x"].tolist() == [[0, 1]]


def test_a_curve_calls_with_each_batch_and_keeps_to_the_stages_limit() -> None:
    stage = Counting(max_batch=4)
    found = list(curve(stage, X, batched=True, effort=QUICK))
    assert [each.batch for each in found] == [1, 2, 4]
    assert set(stage.rows) == {1, 2, 4}


def test_a_stage_without_a_batch_axis_has_one_point() -> None:
    stage = Counting()
    assert [each.batch for each in curve(stage, X, batched=False, effort=QUICK)] == [1]
    assert set(stage.rows) == {3}


def test_a_curve_ends_when_more_rows_bring_no_more_speed_and_measures_nothing_twice() -> None:
    flat = tuple(BatchPoint(b, 1.0 * b, 1.0, 1.0, 1000.0) for b in (1, 2, 4, 8, 16))
    stage = Counting()
    assert list(curve(stage, X, batched=True, effort=QUICK, after=flat)) == []
    assert stage.rows == []


def test_a_point_holds_percentiles_in_milliseconds() -> None:
    found = point([0.001] * 98 + [0.003, 0.005], batch=4)
    assert found.p50_ms == pytest.approx(1.0)
    assert found.p99_ms > found.p90_ms == pytest.approx(1.0)
    assert found.rows_per_s == pytest.approx(4 / (0.106 / 100))


def test_peak_memory_is_this_process() -> None:
    assert 10e6 < peak_memory() < 64e9


def test_the_pareto_front() -> None:
    assert plots.front([(1, 5), (2, 3), (3, 4), (4, 1), (2, 9)]) == [(1, 5), (2, 3), (4, 1)]


@pytest.mark.parametrize(
    "svg",
    [
        plots.scatter(
            [plots.Dot(1, 2, "a<b", strong=True), plots.Dot(3, 1, "c", hollow=True)], x_title="x", y_title="y"
        ),
        plots.lines([plots.Series("a", [(1, 10), (2, 30)], strong=True)], x_title="x", y_title="y"),
        plots.bars([("layer.0 & more", 12.0, True), ("layer.1", 40.0, False)], unit="dB"),
        plots.scatter([plots.Dot(1, 0, "zero")], x_title="x", y_title="y"),
    ],
)
def test_plots_are_well_formed_and_finite(svg: str) -> None:
    ET.fromstring(svg)
    assert "nan" not in svg.lower()
    assert "inf" not in svg


def test_no_data_no_plot() -> None:
    assert plots.scatter([], x_title="x", y_title="y") == ""
    assert plots.lines([], x_title="x", y_title="y") == ""
    assert plots.bars([], unit="dB") == ""
