"""Boxes: the same results as torchvision's operators, and the way back to the original picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms, box_convert, box_iou

from torchship.errors import BadConfig
from torchship.stage import FunctionStage
from torchship.stages.boxes import Detections, Nms, Predictions, convert, nms, overlaps, scale_back, soft_nms
from torchship.stages.images import Letterbox
from torchship.tensors import Array


def some(count: int, seed: int = 0) -> tuple[Array, Array, Array]:
    """Boxes that overlap a lot, their scores and classes."""
    random = np.random.default_rng(seed)
    low = random.uniform(0, 60, (count, 2))
    boxes = np.concatenate([low, low + random.uniform(1, 40, (count, 2))], 1).astype(np.float32)
    return boxes, random.permutation(count).astype(np.float32) / max(count, 1), random.integers(0, 3, count)


@pytest.mark.parametrize("source", ["xyxy", "xywh", "cxcywh"])
@pytest.mark.parametrize("target", ["xyxy", "xywh", "cxcywh"])
def test_formats_as_in_torchvision(source: Any, target: Any) -> None:
    boxes = some(20)[0]
    start = box_convert(torch.from_numpy(boxes), "xyxy", source)
    found = convert(start.numpy(), given=source, wanted=target)
    np.testing.assert_allclose(found, box_convert(start, source, target).numpy(), rtol=1e-4, atol=1e-4)


def test_overlaps_as_in_torchvision() -> None:
    first, second = some(20)[0], some(30, 1)[0]
    wanted = box_iou(torch.from_numpy(first), torch.from_numpy(second)).numpy()
    np.testing.assert_allclose(overlaps(first, second), wanted, atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 60) | st.just(700), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]))
def test_the_same_boxes_stay_as_in_torchvision(count: int, seed: int, overlap: float) -> None:
    boxes, scores, classes = some(count, seed)
    wanted = batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(classes), overlap)
    assert nms(boxes, scores, groups=classes, overlap=overlap).tolist() == wanted.tolist()


def test_soft_suppression_lowers_scores() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]], np.float32)
    scores = np.array([0.9, 0.8, 0.5], np.float32)
    order, lowered = soft_nms(boxes, scores, overlap=0.3, how="linear")
    assert order.tolist() == [0, 2, 1]
    np.testing.assert_allclose(lowered, [0.9, 0.5, 0.4])  # the overlap is a half
    order, lowered = soft_nms(boxes, scores, overlap=0.3, how="gaussian", sigma=0.5)
    np.testing.assert_allclose(sorted(lowered), sorted([0.9, 0.5, 0.8 * np.exp(-0.25 / 0.5)]), rtol=1e-5)
    order, lowered = soft_nms(boxes, scores, overlap=0.3, groups=np.array([0, 1, 2]), how="linear")
    np.testing.assert_allclose(lowered, scores)


def request(boxes: Array, scores: Array) -> dict[str, Array]:
    """One picture's boxes as a model gives them."""
    return {"boxes": boxes[None], "scores": scores[None]}


def test_thresholds_are_parameters() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]], np.float32)
    scores = np.array([[0.9, 0.0], [0.8, 0.7], [0.0, 0.3]], np.float32)
    stage = FunctionStage(Nms, options={"labels": ["cat", "dog"]})
    found = stage(request(boxes, scores))
    assert found["labels"].tolist() == [b"cat", b"dog", b"dog"]
    np.testing.assert_allclose(found["scores"], [0.9, 0.7, 0.3])
    assert found["classes"].tolist() == [0, 1, 1]
    assert len(stage(request(boxes, scores), {"iou_threshold": 1.0})["scores"]) == 4
    assert len(stage(request(boxes, scores), {"score_threshold": 0.75, "iou_threshold": 0.9})["scores"]) == 2 - 0
    assert stage(request(boxes, scores), {"max_boxes": 1})["boxes"].tolist() == [[0, 0, 10, 10]]
    together = FunctionStage(Nms, options={"together": True})(request(boxes, scores))
    assert together["labels"].tolist() == [b"0", b"1"]


@pytest.mark.parametrize("options", [{}, {"soft": "gaussian"}, {"soft": "linear"}])
def test_nothing_found_is_an_answer(options: dict[str, Any]) -> None:
    found = FunctionStage(Nms, options=options)(request(*(np.zeros((5, n), np.float32) for n in (4, 2))))
    assert found["boxes"].shape == (0, 4)
    assert found["labels"].shape == found["scores"].shape == (0,)


@pytest.mark.parametrize("units", ["pixels", "parts"])
def test_boxes_come_back_to_the_original_picture(units: str) -> None:
    height, width = 300, 500
    _, frame = Letterbox(size=[320, 640])(np.zeros((1, height, width, 3), np.uint8))
    ratio, left, top = frame[0, :3]
    original = np.array([[10, 20, 200, 120], [400, 250, 600, 400]], np.float32)  # the second leaves the picture
    inside = original * ratio + np.array([left, top, left, top], np.float32)
    given_boxes = inside / np.array([640, 320, 640, 320], np.float32) if units == "parts" else inside
    stage = FunctionStage(Detections, options={"size": [320, 640], "units": units})
    tensors = request(given_boxes.astype(np.float32), np.array([[0.9], [0.8]], np.float32)) | {"frame": frame}
    wanted = [[10, 20, 200, 120], [400, 250, 500, 300]]
    np.testing.assert_allclose(stage(tensors)["boxes"], wanted, atol=1e-2)
    np.testing.assert_allclose(scale_back(inside, frame[0]), wanted, atol=1e-2)


def test_predictions_are_split() -> None:
    rows = np.random.default_rng(0).uniform(0, 1, (1, 6, 4 + 1 + 3)).astype(np.float32)
    boxes, scores = Predictions(objectness=True)(rows)
    np.testing.assert_array_equal(boxes, rows[..., :4])
    np.testing.assert_allclose(scores, rows[..., 4:5] * rows[..., 5:])
    columns = np.ascontiguousarray(rows.transpose(0, 2, 1))
    boxes, scores = Predictions(columns=True, activation="sigmoid")(columns)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-rows[..., 4:])), rtol=1e-5)
    assert boxes.shape == (1, 6, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Nms(format="abcd"),  # type: ignore[arg-type]
        lambda: Nms(soft="hard"),  # type: ignore[arg-type]
        lambda: Nms(sigma=0),
        lambda: Detections(units="miles"),  # type: ignore[arg-type]
        lambda: Predictions(activation="relu"),  # type: ignore[arg-type]
    ],
)
def test_wrong_options_are_refused(make: Any) -> None:
    with pytest.raises(BadConfig):
        make()


GOOD = np.array([[10, 10, 50, 50], [11, 11, 51, 51], [10, 10, 50, 51], [200, 200, 260, 260]], np.float32)
GOOD_SCORES = [0.9, 0.8, 0.7, 0.6]


@pytest.mark.parametrize("options", [{}, {"soft": "linear"}, {"together": True}, {"candidates": 4}])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e30, -3e38])
def test_one_odd_box_spoils_nothing_else(odd: float, options: dict[str, Any]) -> None:
    if np.isfinite(odd) and "candidates" in options:
        options = {"candidates": 5}  # a large box is one of them
    boxes = np.vstack([GOOD, np.array([[100, 100, odd, 120], [300, 300, 320, 320]], np.float32)])
    scores = np.zeros((6, 2), np.float32)
    scores[range(4), [1, 1, 1, 0]] = GOOD_SCORES
    scores[4:, 0] = 0.95, np.nan
    stage = FunctionStage(Nms, options=options)
    found, wanted = stage(request(boxes, scores)), stage(request(GOOD, scores[:4]))
    assert np.isfinite(found["boxes"]).all()
    assert np.isfinite(found["scores"]).all()
    rest = found["scores"] < 0.95
    np.testing.assert_array_equal(found["boxes"][rest], wanted["boxes"])
    np.testing.assert_array_equal(found["scores"][rest], wanted["scores"])
    scores[4, 0] = np.inf
    found = stage(request(boxes, scores))
    np.testing.assert_array_equal(found["boxes"], wanted["boxes"])


@pytest.mark.parametrize("count", [1, 300])  # one block, and a block for each class
@pytest.mark.parametrize("size", [1e-5, 1e-12, 1.0, 1e25])
def test_suppression_does_not_depend_on_the_unit(count: int, size: float) -> None:
    boxes = np.repeat(np.array([[1, 1, 3, 3], [1, 1, 3, 3], [2.5, 2.5, 9, 9]], np.float32) * np.float32(size), count, 0)
    scores = np.linspace(0.9, 0.5, 3 * count, dtype=np.float32)
    found = nms(boxes, scores, groups=np.zeros(3 * count, np.int64), overlap=0.5)
    assert found.tolist() == [0, 2 * count]


def test_degenerate_boxes_suppress_nothing_as_in_torchvision() -> None:
    boxes = np.array([[5, 5, 5, 5], [5, 5, 5, 5], [9, 9, 1, 1], [9, 9, 1, 1], [0, 0, 9, 9]], np.float32)
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5], np.float32)
    wanted = batched_nms(torch.from_numpy(boxes), torch.from_numpy(scores), torch.zeros(5), 0.5)
    assert nms(boxes, scores, overlap=0.5).tolist() == wanted.tolist() == [0, 1, 2, 3, 4]
    assert overlaps(boxes[:2], boxes[:2]).tolist() == [[0, 0], [0, 0]]


def test_a_head_that_ends_with_score_and_class() -> None:
    rows = np.array([[[0, 0, 9, 9, 0.9, 7], [0, 0, 9, 9, 0.8, 0], [5, 5, 6, 6, 0.7, 7], [0, 0, 0, 0, 0, -1]]])
    rows = rows.astype(np.float32)
    boxes, scores = Predictions(end_to_end=True)(rows)
    found = Nms()(boxes, scores, iou_threshold=1.0)
    np.testing.assert_allclose(found["scores"], [0.9, 0.8, 0.7])
    assert found["classes"].tolist() == [7, 0, 7]
    assert found["boxes"].tolist() == rows[0, :3, :4].tolist()
    boxes, scores = Predictions(end_to_end=True, columns=True)(rows.transpose(0, 2, 1))
    assert scores.shape == (1, 4, 8)
    with pytest.raises(BadConfig, match="score and whole numbers") as caught:
        Predictions()(rows)
    assert "end_to_end" in caught.value.hint
    for wrong in (rows[..., :5], rows + np.float32(0.5), rows * np.float32(1e6)):
        with pytest.raises(BadConfig):
            Predictions(end_to_end=True)(wrong)
    two = np.random.default_rng(0).random((1, 20, 6), np.float32)
    assert Predictions()(two)[1].shape == (1, 20, 2)  # a detector of two classes is not taken for one
