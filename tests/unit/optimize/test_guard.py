"""The guard: agreement is measured right, limits fit the precision, NaN and wrong shapes never pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchship.artifact.manifest import Verdict
from torchship.optimize.guard import Guard, agreement, clearly_decided, judge, precision_of
from torchship.recipe import Recipe, Step
from torchship.tensors import Array, Signature

SCORES = Signature.parse("x:FP32[-1,4] -> y:FP32[-1,5]")
REFERENCE = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)


def measured(candidate: Array, reference: Array = REFERENCE, signature: Signature = SCORES) -> Verdict:
    return agreement([{"y": reference}], [{"y": candidate}], signature=signature)


def test_equal_outputs_agree_fully() -> None:
    found = measured(REFERENCE)
    assert (found.passed, found.error, found.top1) == (True, 0.0, 1.0)
    assert found.cosine == pytest.approx(1.0)


def test_the_error_is_relative_l2() -> None:
    assert measured(REFERENCE * 1.1).error == pytest.approx(0.1, rel=1e-4)
    assert measured(-REFERENCE).cosine == pytest.approx(-1.0)
    assert measured(-REFERENCE).top1 == 0.0


def test_sums_run_over_batches() -> None:
    whole = measured(REFERENCE + 0.05)
    halves = agreement(
        [{"y": REFERENCE[:20]}, {"y": REFERENCE[20:]}],
        [{"y": REFERENCE[:20] + 0.05}, {"y": REFERENCE[20:] + 0.05}],
        signature=SCORES,
    )
    assert halves.error == pytest.approx(whole.error, rel=1e-6)
    assert halves.top1 == whole.top1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_where_the_reference_has_none_refuses(bad: float) -> None:
    candidate = REFERENCE.copy()
    candidate[3, 2] = bad
    found = measured(candidate)
    assert not found.passed
    assert "NaN or infinity in 1 of 320 places" in found.reason
    assert not judge(found, guard=Guard(enabled=False), recipe=Recipe("x")).passed


def test_infinity_in_both_is_no_fault() -> None:
    masked = REFERENCE.copy()
    masked[:, 0] = -np.inf
    assert measured(masked, masked).passed


def test_wrong_shape_dtype_or_name_refuses() -> None:
    assert "shape" in measured(REFERENCE[:, :4]).reason
    assert "float64" in measured(REFERENCE.astype(np.float64)).reason
    assert "missing" in agreement([{"y": REFERENCE}], [{"z": REFERENCE}], signature=SCORES).reason


def test_embeddings_of_unit_length_are_no_class_scores() -> None:
    unit = REFERENCE / np.linalg.norm(REFERENCE, axis=1, keepdims=True)
    assert measured(unit, unit).top1 is None


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        (Recipe("eager"), "fp32"),
        (Recipe("openvino", {"precision": "bf16"}), "half"),
        (Recipe("onnxruntime", {"precision": "int8"}), "int8"),
        (Recipe("eager", transforms=(Step("precision", {"modules": {"*": "fp16"}}),)), "half"),
        (Recipe("inductor", {"precision": "bf16"}, (Step("int8_dynamic"),)), "int8"),
    ],
)
def test_limits_follow_the_coarsest_precision(recipe: Recipe, precision: str) -> None:
    assert precision_of(recipe) == precision


def test_int8_may_drift_where_fp32_may_not() -> None:
    drifted = Verdict(True, 0.05, 0.998, 0.98)
    assert not judge(drifted, guard=Guard(), recipe=Recipe("onnxruntime")).passed
    assert judge(drifted, guard=Guard(), recipe=Recipe("onnxruntime", {"precision": "int8"})).passed
    assert not judge(drifted, guard=Guard(error=0.01), recipe=Recipe("x", {"precision": "int8"})).passed


def test_one_odd_row_of_a_few_is_forgiven_two_are_not() -> None:
    one = Verdict(True, 0.0, 1.0, 7 / 8, clear_top1=7 / 8, clear_rows=8)
    assert judge(one, guard=Guard(), recipe=Recipe("x")).passed
    two = Verdict(True, 0.0, 1.0, 6 / 8, clear_top1=6 / 8, clear_rows=8)
    assert "top-1 agreement 0.750 on the 8 rows" in judge(two, guard=Guard(), recipe=Recipe("x")).reason


def test_a_swap_of_two_classes_that_are_tied_counts_in_the_table_but_not_against() -> None:
    reference = np.array([[5.0, 4.99, 0.0], [5.0, 1.0, 0.0]], np.float32)
    assert clearly_decided(reference).tolist() == [False, True]
    signature = Signature.parse("x:FP32[-1,4] -> y:FP32[-1,3]")
    found = measured(np.array([[4.99, 5.0, 0.0], [5.0, 1.0, 0.0]], np.float32), reference, signature)
    assert (found.top1, found.clear_top1, found.clear_rows) == (0.5, 1.0, 1)
    assert judge(found, guard=Guard(error=0.1), recipe=Recipe("x")).passed


def test_rows_of_infinities_are_no_clear_decision() -> None:
    assert not clearly_decided(np.array([[-np.inf, -np.inf, -np.inf]], np.float32)).any()


def test_the_users_metric_decides() -> None:
    far = Verdict(True, 0.4, 0.9, 0.5, metric=0.912, reference_metric=0.92)
    assert judge(far, guard=Guard(max_drop=0.01), recipe=Recipe("x")).passed
    found = judge(far, guard=Guard(max_drop=0.003), recipe=Recipe("x"))
    assert "fell by 0.008 (0.92 to 0.912), more than 0.003" in found.reason
    strict = judge(far, guard=Guard(max_drop=0.01, error=0.1), recipe=Recipe("x"))
    assert "output error" in strict.reason


@given(st.floats(0, 1), st.floats(-1, 1))
def test_a_verdict_passes_exactly_when_it_has_no_reason(error: float, cosine: float) -> None:
    found = judge(Verdict(True, error, cosine), guard=Guard(), recipe=Recipe("x"))
    assert found.passed == (not found.reason)
    assert found.passed == (error <= 2e-3 and cosine >= 0.9999)
