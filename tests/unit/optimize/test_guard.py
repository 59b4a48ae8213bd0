"""The guard: what a candidate costs is held to what may be lost, in three verdicts and one sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchship.artifact.manifest import Evidence, Verdict
from torchship.optimize.guard import Guard, judge, precision_of
from torchship.optimize.judge import rows_needed
from torchship.recipe import Recipe, Step

FP32, HALF, INT8 = Recipe("x"), Recipe("x", {"precision": "bf16"}), Recipe("x", {"precision": "int8"})


def found(error: float = 0.01, cosine: float = 1.0, metric: float | None = None, **evidence: Any) -> Verdict:
    given = {"measure": "top-1", "output": "y", "rows": 512, "groups": 512, **evidence}
    reference = None if metric is None else 0.92
    return Verdict(True, error, cosine, metric=metric, reference_metric=reference, evidence=Evidence(**given))


def state(verdict: Verdict, *, recipe: Recipe = INT8, **limits: Any) -> str:
    judged = judge(verdict, guard=Guard(**limits), recipe=recipe)
    assert judged.evidence is not None
    assert judged.passed == (judged.evidence.state != "refused")
    assert judged.reason
    return judged.evidence.state


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        (Recipe("eager"), "fp32"),
        (Recipe("openvino", {"precision": "bf16"}), "half"),
        (Recipe("onnxruntime", {"precision": "int8"}), "int8"),
        (Recipe("eager", transforms=(Step("precision", {"modules": {"*": "fp16"}}),)), "half"),
        (Recipe("inductor", {"precision": "bf16"}, (Step("quantize"),)), "int8"),
    ],
)
def test_limits_follow_the_coarsest_precision(recipe: Recipe, precision: str) -> None:
    assert precision_of(recipe) == precision


def test_proved_where_the_bound_is_within_the_drop_plausible_where_the_estimate_is_else_refused() -> None:
    assert state(found(cost=0.004, bound=0.008)) == "proved"
    assert state(found(cost=0.004, bound=0.012)) == "plausible"
    assert state(found(cost=0.012, bound=0.02)) == "refused"
    assert state(found(cost=0.012, bound=0.02), max_drop=0.03) == "proved"


def test_few_groups_prove_nothing_however_many_rows_they_have() -> None:
    assert state(found(cost=0.0, bound=0.001, rows=900, groups=9)) == "plausible"


def test_strict_demands_proof() -> None:
    assert state(found(cost=0.004, bound=0.012), strict=True) == "refused"
    assert state(found(cost=0.004, bound=0.008), strict=True) == "proved"


def test_the_sentence_says_what_it_costs_at_most_and_on_how_many_rows() -> None:
    def told(verdict: Verdict) -> str:
        return judge(verdict, guard=Guard(), recipe=INT8).reason

    assert (
        told(found(cost=0.004, bound=0.008)) == "costs at most 0.8 points of top-1, proved on 512 rows without labels"
    )
    grouped = found(cost=0.004, bound=0.008, rows=400, groups=25)
    assert told(grouped) == "costs at most 0.8 points of top-1, proved on 400 rows in 25 groups without labels"
    few = told(found(cost=0.004, bound=0.02, rows=64, groups=64, spread=0.05))
    assert few.startswith("costs about 0.4 points of top-1 and at most 2 points of top-1 on 64 rows: plausible; about ")
    assert few.endswith(" rows like these would prove it")
    assert "64 rows of real data or more would prove it" in told(found(measure="", rows=2, groups=2, drift=0.01))
    assert "more than 1 points of top-1" in told(found(cost=0.012, bound=0.02))


def test_rows_that_would_prove_it_do() -> None:
    few = Evidence(measure="top-1", cost=0.004, bound=0.02, rows=64, groups=64, spread=0.05)
    needed = rows_needed(few, most=0.01)
    assert 64 < needed < 1000
    assert 0.004 + 1.645 * 0.05 / math.sqrt(needed) <= 0.01
    assert rows_needed(few, most=0.003) == 0, "no number of rows proves less than the estimate"


def test_an_answer_that_is_the_same_to_the_last_bit_is_proved_on_any_rows() -> None:
    assert state(found(error=0.0, measure="", rows=1, groups=1), recipe=FP32, strict=True) == "proved"


def test_another_computation_is_refused_whatever_it_costs() -> None:
    assert state(found(drift=0.01, value_drift=0.0), recipe=FP32) == "refused"
    assert state(found(drift=0.2, value_drift=0.0), recipe=HALF) == "proved", "class scores are judged by their cost"
    assert state(found(drift=0.2, value_drift=0.2), recipe=HALF) == "refused"
    assert state(found(drift=0.2, value_drift=0.2), recipe=INT8) == "proved"
    assert state(found(made=0.5), recipe=INT8) == "proved", "noise may leave the ranges that int8 was calibrated on"
    assert state(found(made=0.5, measure="", rows=2), recipe=INT8) == "refused", "where there is real data"
    assert state(found(made=0.7), recipe=INT8) == "refused"


def test_a_broken_law_refuses_even_where_the_users_metric_holds() -> None:
    assert state(found(broken="a loud row changes its neighbours")) == "refused"
    assert state(found(broken="a loud row changes its neighbours", metric=0.92)) == "refused"
    assert state(found(broken="a loud row changes its neighbours"), enabled=False) == "proved"


def test_what_could_not_be_compared_stays_refused() -> None:
    bad = Verdict(False, 1e9, 0.0, reason="output 'y' is missing")
    assert judge(bad, guard=Guard(enabled=False), recipe=FP32) is bad


def test_the_users_metric_decides() -> None:
    far: dict[str, Any] = {"error": 0.4, "drift": 0.5, "value_drift": 0.5, "measure": ""}
    assert state(found(metric=0.912, **far)) == "plausible"
    refused = judge(found(metric=0.912, **far), guard=Guard(max_drop=0.003), recipe=INT8)
    assert "fell by 0.008 (0.92 to 0.912), more than 0.003" in refused.reason
    strict = judge(found(metric=0.912, **far), guard=Guard(error=0.1), recipe=INT8)
    assert "output error 0.4 is above 0.1" in strict.reason


def test_a_metric_by_rows_has_an_interval() -> None:
    sure = judge(found(metric=0.916, measure="metric", cost=0.004, bound=0.007), guard=Guard(), recipe=INT8)
    assert sure.reason == "your metric falls by 0.004, at most by 0.007, proved on 512 rows"
    noisy = judge(found(metric=0.919, measure="metric", cost=0.001, bound=0.02), guard=Guard(), recipe=INT8)
    assert noisy.reason.startswith("your metric falls by 0.001 (less than the noise of these rows), at most by 0.02 on")
    assert noisy.evidence is not None
    assert noisy.evidence.state == "plausible"


def test_limits_of_ones_own_hold_beside_the_cost() -> None:
    assert state(found(cosine=0.9), cosine=0.95) == "refused"
    assert state(Verdict(True, 0.1, 1.0, 0.9, evidence=Evidence(measure="top-1", groups=99)), top1=0.95) == "refused"


@given(st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0, 0.1))
def test_a_verdict_passes_exactly_when_it_is_not_refused(cost: float, more: float, drift: float) -> None:
    expected = "refused" if cost > 0.01 + 1e-12 else "proved" if cost + more <= 0.01 + 1e-12 else "plausible"
    assert state(found(cost=cost, bound=cost + more, drift=drift)) == expected
