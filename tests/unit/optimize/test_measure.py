"""Measuring and the plots: what is counted, when a curve ends, and that pages hold what they should."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from torchship.optimize import measure, plots
from torchship.optimize.measure import Effort, curve, peak_memory, point, resized
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


@pytest.mark.parametrize(("limit", "sizes"), [(8, [1, 8, 2, 4]), (12, [1, 8, 2, 4]), (1, [1])])
def test_batches_double_up_to_the_limit(limit: int, sizes: list[int]) -> None:
    assert [each.batch for each in curve(Counting(max_batch=limit), X, batched=True, effort=QUICK)] == sizes


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


def test_a_curve_ends_when_more_rows_bring_no_more_speed_and_measures_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def sample(stage: Counting, rows: Tensors, *, effort: Effort) -> list[float]:
        taken.append(len(rows["x"]))
        return [0.001 * len(rows["x"])] * 3  # a row takes as long in any batch

    monkeypatch.setattr(measure, "sample", sample)
    found = curve(Counting(), X, batched=True, effort=QUICK)
    assert [next(found).batch for _ in range(2)] == taken == [1, 8]  # which tell most
    assert [each.batch for each in found] == [2, 4]
    assert taken == [1, 8, 2, 4]


def test_a_curve_goes_on_while_more_rows_bring_more_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(stage: Counting, rows: Tensors, *, effort: Effort) -> list[float]:
        return [0.001 * max(1, len(rows["x"]) / 16)] * 3  # up to 16 rows take as long as one

    monkeypatch.setattr(measure, "sample", sample)
    found = [each.batch for each in curve(Counting(max_batch=1024), X, batched=True, effort=QUICK)]
    assert found == [1, 8, 2, 4, 16, 32, 64]


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
        plots.plot(
            [plots.Mark("a<b", [(1, 2)], strong=True), plots.Mark("c", [(3, 1)], hollow=True)], x_title="x", y_title="y"
        ),
        plots.plot([plots.Mark("a", [(1, 10), (2, 30)], strong=True)], x_title="x", y_title="y", joined=True),
        plots.bars([("layer.0 & more", 12.0, True), ("layer.1", 40.0, False)], unit="dB"),
        plots.plot([plots.Mark("zero", [(1, 0)])], x_title="x", y_title="y"),
    ],
)
def test_plots_are_well_formed_and_finite(svg: str) -> None:
    ET.fromstring(svg)
    assert "nan" not in svg.lower()
    assert "inf" not in svg


def test_no_data_no_plot() -> None:
    assert plots.plot([], x_title="x", y_title="y") == ""
    assert plots.plot([plots.Mark("none", [])], x_title="x", y_title="y", joined=True) == ""
    assert plots.bars([], unit="dB") == ""


def test_values_over_time_are_stairs_with_round_ticks_and_names_on_hover() -> None:
    assert plots.stairs([(10, 5), (30, 2)], 40) == [(10, 5), (30, 5), (30, 2), (40, 2)]
    assert plots.stairs([(1, 5), (2, 2)], None) == [(1, 5), (2, 2)]
    assert plots.Scale.over([93.0, 142.0], 0, 100, even=True).ticks() == [0, 20, 40, 60, 80, 100, 120, 140]
    found = [plots.Scale.over([1.0, 3.0], 0, 63, even=True)(value) for value in (0.0, 1.0, 3.0)]
    assert found == [0, 20, 60]
    mark = plots.Mark("best", [(10, 5), (30, 2)], strong=True, names=["eager", "int8 <b>"])
    page = plots.plot([mark], x_title="s", y_title="ms", joined=True, until=40)
    titles = [title.text for title in ET.fromstring(f"<x>{page}</x>").iter("title")]  # our own page
    assert titles == ["eager: 5 at 10", "int8 <b>: 2 at 30"]
