"""Anchors, the 5-point similarity, quality: against slow and obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from torchship_faces import geometry, quality

RANDOM = np.random.default_rng(5)


@given(st.floats(-3.1, 3.1), st.floats(0.05, 20), st.floats(-500, 500), st.floats(-500, 500))
def test_similarity_finds_turn_scale_and_shift(angle: float, scale: float, x: float, y: float) -> None:
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    target = geometry.TEMPLATE @ turn.T + [x, y]
    found = geometry.similarity(geometry.TEMPLATE, target.astype(np.float32))
    assert np.allclose(found[:, :2], turn, atol=2e-3 * scale)
    assert np.allclose(geometry.TEMPLATE @ found[:, :2].T + found[:, 2], target, atol=0.05 + 1e-3 * scale)


def test_similarity_never_mirrors_and_is_least_squares() -> None:
    source = RANDOM.normal(size=(5, 2)).astype(np.float32)
    target = (source * [-1, 1] + RANDOM.normal(size=(5, 2)) * 0.1).astype(np.float32)
    found = geometry.similarity(source, target)
    assert np.linalg.det(found[:, :2]) > 0
    design = np.zeros((10, 4))
    design[0::2] = np.stack([source[:, 0], -source[:, 1], np.ones(5), np.zeros(5)], 1)
    design[1::2] = np.stack([source[:, 1], source[:, 0], np.zeros(5), np.ones(5)], 1)
    a, b, x, y = np.linalg.lstsq(design, target.ravel(), rcond=None)[0]
    assert np.allclose(found, [[a, -b, x], [b, a, y]], atol=1e-4)


def test_a_chip_puts_the_points_where_the_template_wants_them() -> None:
    for scale, angle in ((0.6, 0.3), (2.5, -0.5), (7.0, 0.1)):
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points = (geometry.TEMPLATE - 56) @ turn.T + [600, 500]
        canvas = Image.new("RGB", (1200, 1000))
        pen = ImageDraw.Draw(canvas)
        for px, py in points:
            reach = 3.5 * scale
            pen.ellipse((px - reach, py - reach, px + reach, py + reach), fill="white")
        made = geometry.chip(np.asarray(canvas), points.astype(np.float32), side=112)[..., 0].astype(float)
        for x, y in geometry.TEMPLATE:
            left, top = int(x) - 8, int(y) - 8
            part = made[top : top + 17, left : left + 17]
            rows, columns = np.indices(part.shape)
            centre = (columns * part).sum() / part.sum() + left, (rows * part).sum() / part.sum() + top
            assert np.hypot(centre[0] + 0.5 - x, centre[1] + 0.5 - y) < 1.0, (scale, angle)


def test_a_face_at_the_border_is_filled_with_black() -> None:
    picture = np.full((40, 40, 3), 200, np.uint8)
    made = geometry.chip(picture, geometry.TEMPLATE - 80, side=112)
    assert made.shape == (112, 112, 3)
    assert (made == 0).any()
    assert made.max() == 200


def test_anchors_are_those_of_the_detector() -> None:
    found = geometry.anchors(640)
    assert found.shape == (16_800, 3)
    assert found[:3].tolist() == [[4, 4, 16], [4, 4, 32], [12, 4, 16]]
    assert found[-1].tolist() == [624, 624, 512]


def test_decoding_undoes_encoding() -> None:
    anchors = geometry.anchors(64)
    box = np.array([10.0, 12.0, 40.0, 50.0])
    points = RANDOM.uniform(12, 40, (5, 2))
    best = 5
    centre, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    loc = np.zeros((len(anchors), 4), np.float32)
    loc[best] = [*((centre - anchors[best, :2]) / anchors[best, 2] / 0.1), *(np.log(size / anchors[best, 2]) / 0.2)]
    marks = np.zeros((len(anchors), 10), np.float32)
    marks[best] = ((points - anchors[best, :2]) / anchors[best, 2] / 0.1).ravel()
    score = np.zeros(len(anchors), np.float32)
    score[best] = 0.9
    found = geometry.decode(loc, score, marks, side=64, min_score=0.5, overlap=0.4, most=9)
    assert np.allclose(found[0], [box], atol=1e-3)
    assert np.allclose(found[1], [0.9])
    assert np.allclose(found[2], [points], atol=1e-3)


def test_turn_reads_yaw_and_pitch() -> None:
    straight = geometry.TEMPLATE.copy()
    assert np.allclose(quality.turn(straight), 0, atol=0.2)
    right = straight.copy()
    right[2, 0] += 15
    assert quality.turn(right)[0] > 0.7
    low = straight.copy()
    low[2, 1] += 15
    assert quality.turn(low)[1] > 0.5
    spun = (straight - 56) @ np.array([[0, 1], [-1, 0]], np.float32)
    assert np.allclose(quality.turn(spun), quality.turn(straight), atol=1e-3)


@pytest.mark.parametrize(
    ("values", "score", "word"),
    [
        ((100, 400, 0, 0), 0.99, ""),
        ((100, 400, 0, 0), 0.5, "not sure"),
        ((30, 400, 0, 0), 0.99, "too small"),
        ((100, 4, 0, 0), 0.99, "blurred"),
        ((100, 400, 0.9, 0), 0.99, "right"),
        ((100, 400, -0.9, 0), 0.99, "left"),
        ((100, 400, 0, -0.9), 0.99, "up"),
    ],
)
def test_refusal_names_the_reason(values: tuple[float, ...], score: float, word: str) -> None:
    reason = quality.refusal(np.array(values, np.float32), score, gate=quality.Gate())
    assert bool(reason) == bool(word)
    assert word in reason
