"""What a candidate costs: measured by what the outputs are, on each row and channel, with a bound that covers."""

from __future__ import annotations

import numpy as np
import pytest

from torchship.artifact.manifest import Evidence, Verdict
from torchship.optimize.guard import Guard, judge
from torchship.optimize.judge import bounded, compare
from torchship.optimize.yardstick import softmax, study, told
from torchship.recipe import Recipe
from torchship.tensors import Array, Signature

DRAW = np.random.default_rng(0)
SCORES = Signature.parse("x:FP32[-1,4] -> y:FP32[-1,5]")
LOGITS = (3 * DRAW.normal(size=(64, 5))).astype(np.float32)


def measured(candidate: Array, reference: Array = LOGITS, signature: Signature = SCORES) -> Verdict:
    yards = study([{"y": reference}], signature=signature)
    return compare([{"y": reference}], [{"y": candidate}], signature=signature, yards=yards)


def evidence(candidate: Array, reference: Array = LOGITS, signature: Signature = SCORES) -> Evidence:
    found = measured(candidate, reference, signature)
    assert found.passed, found.reason
    assert found.evidence is not None
    return found.evidence


def test_class_scores_cost_what_the_reference_would_lose() -> None:
    flipped = LOGITS.copy()
    first, second = np.argsort(LOGITS[0])[::-1][:2]
    flipped[0, [first, second]] = LOGITS[0, [second, first]]
    chances = softmax(LOGITS)
    found = evidence(flipped)
    assert found.measure == "top-1"
    assert found.cost == pytest.approx((chances[0, first] - chances[0, second]) / 64)
    assert measured(flipped).top1 == 63 / 64
    assert evidence(LOGITS).cost == 0
    assert evidence(LOGITS).bound > 0, "64 rows without a flip do not prove that there is none"


def test_probabilities_are_not_softened_again() -> None:
    chances = softmax(LOGITS).astype(np.float32)
    swapped = chances[:, ::-1].copy()
    expected = (chances.max(1) - chances[np.arange(64), swapped.argmax(1)]).mean()
    assert evidence(swapped, chances).cost == pytest.approx(expected, rel=1e-6)
    assert list(told(study([{"y": chances}], signature=SCORES))) == [
        "output 'y' is judged as class scores (probabilities)"
    ]


def test_scores_that_cannot_tell_good_from_bad_are_judged_as_values() -> None:
    flat = (0.01 * DRAW.normal(size=(64, 5))).astype(np.float32)
    assert evidence(np.zeros_like(flat), flat).measure == "variation"
    assert evidence(np.zeros_like(flat), flat).cost > 0.99


def test_a_level_does_not_hide_that_the_movement_is_lost() -> None:
    signature = Signature.parse("x:FP32[-1,4] -> y:FP32[-1,3,24]")
    moves = (1e6 + 100 * DRAW.normal(size=(32, 3, 24)).cumsum(-1)).astype(np.float32)
    halved = (moves.view(np.uint32) & 0xFFFF0000).view(np.float32)  # 8 bits of mantissa
    found = measured(halved, moves, signature)
    assert found.error < 0.01
    assert found.evidence is not None
    assert found.evidence.cost > 1.0
    assert "a row is off by" in found.evidence.broken


def test_quiet_series_beside_loud_ones_are_judged_by_themselves() -> None:
    signature = Signature.parse("x:FP32[-1,4] -> y:FP32[-1,2,12]")
    levels = np.repeat([1e6, 10.0], [10, 30])[:, None, None]
    series = (levels + levels * 1e-3 * DRAW.normal(size=(40, 2, 12))).astype(np.float32)
    wrong = series.copy()
    wrong[10:] = levels[10:]
    found = evidence(wrong, series, signature)
    assert found.cost < 0.01, "in the mean over rows nothing shows"
    assert "a row is off" in found.broken


def test_box_coordinates_do_not_hide_that_scores_vanish() -> None:
    signature = Signature.parse("x:FP32[-1,4] -> y:FP32[-1,50,10]")
    boxes, scores = DRAW.uniform(0, 300, (16, 50, 4)), DRAW.uniform(0, 1, (16, 50, 6)) ** 4
    both = np.concatenate([boxes, scores], -1).astype(np.float32)
    gone = both.copy()
    gone[..., 4:] = 0
    found = measured(gone, both, signature)
    assert found.error < 0.01
    assert found.evidence is not None
    assert found.evidence.cost > 0.5
    assert "channel" in found.evidence.broken
    assert evidence(both + 0.001, both, signature).cost < 1e-3


def test_answers_that_hardly_vary_over_rows_are_judged_by_how_their_columns_do() -> None:
    still = (DRAW.normal(size=(1, 100)) + 1e-3 * DRAW.normal(size=(32, 100))).astype(np.float32)
    signature = Signature.parse("x:FP32[-1,4] -> y:FP32[-1,100]")
    off = (still + 0.01 * DRAW.normal(size=still.shape)).astype(np.float32)
    assert evidence(off, still, signature).cost == pytest.approx(1e-4, rel=0.3)


def test_embeddings_are_judged_by_their_neighbours() -> None:
    signature = Signature.parse("x:FP32[-1,4] -> y:FP32[-1,16]")
    unit = DRAW.normal(size=(64, 16))
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float32)
    turned = np.linalg.qr(DRAW.normal(size=(16, 16)))[0].astype(np.float32)
    assert evidence(unit @ turned, unit, signature).cost == pytest.approx(0, abs=1e-5), "a turn keeps all neighbours"
    shuffled = evidence(unit[::-1].copy(), unit, signature)
    assert shuffled.measure == "neighbours"
    assert shuffled.cost > 0.3


def test_labels_are_equal_or_not_however_far_apart_they_are() -> None:
    signature = Signature.parse("x:FP32[-1,4] -> y:INT64[-1]")
    labels = np.arange(40)
    changed = labels.copy()
    changed[:2] = 39
    found = evidence(changed, labels, signature)
    assert (found.measure, found.cost) == ("equality", 2 / 40)


def test_rows_that_are_few_measure_nothing_but_the_drift() -> None:
    found = evidence(LOGITS[:4] * 1.1, LOGITS[:4])
    assert found.measure == ""
    assert found.drift == pytest.approx(0.1, rel=1e-4)


def test_a_wrong_row_is_not_hidden_by_loud_rows() -> None:
    signature = Signature.parse("x:FP32[-1,4] -> y:FP32[-1]")
    values = np.concatenate([np.ones(4), np.full(8, 1e5)]).astype(np.float32)
    wrong = values.copy()
    wrong[:4] = 88
    found = measured(wrong, values, signature)
    assert found.error < 1e-2
    yards = study([{"y": values[:4]}], signature=signature)
    real = compare([{"y": values[:4]}], [{"y": wrong[:4]}], signature=signature, yards=yards)
    assert real.evidence is not None
    assert real.evidence.drift == pytest.approx(87)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stand_where_the_reference_has_them_and_nowhere_else(bad: float) -> None:
    odd = LOGITS.copy()
    odd[3, 2] = bad
    assert "NaN or infinity in 1 of 320 places where the reference has none" in measured(odd).reason
    assert measured(odd, odd).passed
    assert "fewer than the reference" in measured(LOGITS, odd).reason


def test_wrong_shape_dtype_or_name_refuses() -> None:
    assert "shape" in measured(LOGITS[:, :4]).reason
    assert "float64" in measured(LOGITS.astype(np.float64)).reason
    yards = study([{"y": LOGITS}], signature=SCORES)
    assert "missing" in compare([{"y": LOGITS}], [{"z": LOGITS}], signature=SCORES, yards=yards).reason


def test_sums_run_over_batches() -> None:
    yards = study([{"y": LOGITS[:20]}, {"y": LOGITS[20:]}], signature=SCORES)
    parts = [{"y": LOGITS[:20]}, {"y": LOGITS[20:]}]
    moved = [{"y": part["y"][:, ::-1].copy()} for part in parts]
    halves = compare(parts, moved, signature=SCORES, yards=yards)
    whole = measured(LOGITS[:, ::-1].copy())
    assert halves.error == pytest.approx(whole.error, rel=1e-6)
    assert (halves.top1, halves.evidence) == (whole.top1, whole.evidence)


@pytest.mark.parametrize("share", [0.002, 0.01, 0.1])
@pytest.mark.parametrize("groups", [None, 40])
def test_the_bound_lies_above_the_true_cost_nineteen_times_in_twenty(share: float, groups: int | None) -> None:
    draw, covered = np.random.default_rng(1), 0
    for _ in range(200):
        if groups:  # rows of a group flip together, half of the time
            odd = draw.random(groups) < share
            flips = (np.repeat(odd, 10) & (draw.random(groups * 10) < 0.5)) | (draw.random(groups * 10) < share / 2)
            true = 0.3 * (1 - (1 - share / 2) * (1 - share / 2))
        else:
            flips, true = draw.random(400) < share, 0.3 * share
        members = None if groups is None else np.repeat(np.arange(groups), 10)
        covered += bounded(0.3 * flips, groups=members, event=0.3).bound >= true * 0.98
    assert covered >= (186 if groups is None else 170)


@pytest.mark.parametrize(("seen", "limit"), [(1, 4.74), (3, 7.75)])
def test_rows_of_one_group_that_flip_together_are_one_event(seen: int, limit: float) -> None:
    costs = np.repeat([0.3] * seen + [0.0] * (40 - seen), 10)
    found = bounded(costs, groups=np.repeat(np.arange(40), 10), event=0.3)
    assert found.bound == pytest.approx(0.3 * limit / 40, rel=0.02), "the 95 % limit of a Poisson mean, of groups"
    assert (found.events, found.groups, found.rows) == (seen, 40, 400)


def test_the_bound_covers_what_a_reference_with_a_skewed_class_costs() -> None:
    draw = np.random.default_rng(3)
    truth = (2 * draw.normal(size=(2000, 5))).astype(np.float32)
    reference, candidate = truth.copy(), truth.copy()
    reference[:, 0] += 0.4  # it is too sure of class 0: flips towards it look like near ties
    candidate[:, 0] += 0.6
    chances, every = softmax(truth), np.arange(len(truth))
    true = (chances[every, reference.argmax(1)] - chances[every, candidate.argmax(1)]).mean()
    found = evidence(candidate, reference)
    assert found.cost < true / 2, "by the reference's own probabilities the flips are cheap"
    assert true <= found.bound <= 5 * true


def test_an_output_that_is_always_the_same_proves_nothing() -> None:
    same = np.ones((64, 5), np.float32)
    found = evidence(same, same)
    assert found.measure == ""
    assert list(told(study([{"y": same}], signature=SCORES))) == [
        "output 'y' is the same for all rows: it proves nothing"
    ]


def test_one_answer_of_a_model_without_rows_is_no_proof_of_sameness() -> None:
    signature = Signature.parse("x:FP32[4] -> y:FP32[2,3]")
    assert not list(told(study([{"y": np.arange(1, 7, dtype=np.float32).reshape(2, 3)}], signature=signature)))
    still = list(told(study([{"y": np.ones((2, 3), np.float32)}], signature=signature)))
    assert still == ["output 'y' is the same for all rows: it proves nothing"]
    alone = Signature.parse("x:FP32[4] -> y:FP32[1]")
    assert not list(told(study([{"y": np.ones(1, np.float32)}], signature=alone)))


def test_a_few_rows_of_other_integers_are_no_equal_ones() -> None:
    signature = Signature.parse("x:FP32[-1,4] -> y:UINT8[-1,4]")
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 4)
    assert evidence(pixels, pixels, signature).drift == 0
    other = np.array([[0, 1, 2, 3], [4, 9, 9, 9]], np.uint8)
    assert evidence(other, pixels, signature).drift == 0.75
    found = judge(measured(pixels[:, ::-1].copy(), pixels, signature), guard=Guard(), recipe=Recipe("openvino"))
    assert not found.passed
    same = np.zeros((64, 4), np.uint8)  # a reference that always says the same is no licence to say something else
    assert evidence(same + np.uint8(1), same, signature).drift == 1
