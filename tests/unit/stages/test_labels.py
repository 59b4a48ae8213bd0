"""Names for scores: order, probabilities, bounds, and where labels come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from torchship.errors import BadConfig, BadInput, NotFound
from torchship.stage import FunctionStage
from torchship.stages.labels import TopK, activate, read_labels, top


def test_the_best_come_first_with_their_names() -> None:
    stage = FunctionStage(TopK, options={"labels": ["ant", "bee", "cat"]})
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], np.float32))
    answer = stage({"logits": logits}, {"top_k": 2})
    assert answer["labels"].tolist() == [[b"bee", b"cat"], [b"ant", b"cat"]]
    np.testing.assert_allclose(answer["scores"], [[0.5, 0.3], [0.7, 0.2]], rtol=1e-5)
    assert answer["indices"].tolist() == [[1, 2], [0, 2]]
    assert stage({"logits": logits})["labels"].shape == (2, 3)  # no more than there are


@pytest.mark.parametrize("value", [0, 1001, 2.5, "5", True])
def test_top_k_has_bounds(value: float) -> None:
    with pytest.raises(BadInput, match="'top_k'"):
        FunctionStage(TopK)({"logits": np.zeros((1, 3), np.float32)}, {"top_k": value})


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_top_agrees_with_sorting(classes: int) -> None:
    scores = np.random.default_rng(1).permutation(7 * classes).reshape(7, classes).astype(np.float32)
    np.testing.assert_array_equal(top(scores, 5), np.argsort(-scores, axis=1)[:, :5])


def test_activations_are_safe_for_large_numbers() -> None:
    huge = np.array([[1e4, -1e4, 0]], np.float32)
    np.testing.assert_allclose(activate(huge, "softmax"), [[1, 0, 0]])
    np.testing.assert_allclose(activate(huge, "sigmoid"), [[1, 0, 0.5]], atol=1e-6)
    assert activate(huge, "none") is huge
    assert activate(huge, "sigmoid").dtype == np.float32


def test_where_labels_come_from(tmp_path: Path) -> None:
    assert read_labels("imagenet")[281] == "tabby"
    assert len(read_labels("imagenet")) == 1000
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "a.json").write_text('["one", "two"]')
    assert read_labels(str(tmp_path / "a.txt")) == read_labels(str(tmp_path / "a.json")) == ["one", "two"]
    assert read_labels(()) == []
    with pytest.raises(NotFound):
        read_labels(str(tmp_path / "nope"))
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(BadConfig):
        read_labels(str(tmp_path / "a.json"))
    with pytest.raises(BadConfig):
        TopK(activation="relu")  # type: ignore[arg-type]


def test_without_labels_the_index_is_the_name() -> None:
    answer = FunctionStage(TopK, options={"labels": ["zero"]})({"logits": np.array([[0, 1]], np.float32)})
    assert answer["labels"].tolist() == [[b"1", b"zero"]]


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\n", "cat \r\ndog\r\n\r\n", "\ufeffcat\ndog", "0: cat\n1: dog\n", "1 dog\n0 cat\n", "0\tcat\n1\tdog",
        '["cat", "dog"]', '\ufeff["cat", "dog"]', '{"0": "cat", "1": "dog"}',
        '{"1": ["n02", "dog"], "0": ["n01", "cat"]}',
        '{"cat": 0, "dog": 1}', '{"model": "x", "id2label": {"0": "cat", "1": "dog"}}',
    ],
)  # fmt: skip
def test_labels_as_people_keep_them(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text, newline="")
    assert read_labels(str(tmp_path / "labels")) == ["cat", "dog"]


def test_numbers_that_are_not_those_of_the_lines_belong_to_the_names(tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("911 turbo\n3 series\n")
    assert read_labels(str(tmp_path / "labels")) == ["911 turbo", "3 series"]
    (tmp_path / "labels").write_text('{"1": "cat", "3": "dog"}')
    assert read_labels(str(tmp_path / "labels")) == ["0", "cat", "2", "dog"]


@pytest.mark.parametrize(
    "text", ["{", '{"cat": "dog"}', '{"0": 1.5}', '{"99999999999": "x"}', '[["a"]]', '{"-1": "x"}']
)
def test_json_without_names_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(BadConfig, match="labels: "):
        read_labels(str(tmp_path / "labels"))
