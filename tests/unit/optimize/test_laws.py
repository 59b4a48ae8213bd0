"""The laws: what the reference keeps is asked of candidates, and what it does not keep is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from torchship.optimize import laws
from torchship.tensors import Array, Signature, Tensors

Answer = Callable[[Tensors], Tensors]
SIGNATURE = Signature.parse("x:FP32[-1,6] -> y:FP32[-1,3]")
WORDS = Signature.parse("ids:INT64[-1,n], mask:INT64[-1,n] -> y:FP32[-1,3]")
WEIGHT = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
TABLE = np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32)


def broken(reference: Answer, candidate: Answer, base: Tensors, signature: Signature) -> str:
    own = candidate(base)
    for probe in laws.probes(base, signature=signature, answer=reference):
        fault = laws.broken(
            probe.law,
            wanted=probe.outputs,
            found=candidate(probe.inputs),
            base=own,
            signature=signature,
            limit=0.04,
        )
        if fault:
            return fault
    return ""


def plain(tensors: Tensors) -> Tensors:
    return {"y": tensors["x"] @ WEIGHT}


def one_scale(tensors: Tensors) -> Tensors:
    """Dynamic int8 with one scale for the whole batch."""
    x = tensors["x"]
    scale = np.nanmax(np.abs(x)) / 127
    return {"y": (np.round(x / scale) * scale).astype(np.float32) @ WEIGHT}


def a_scale_a_row(tensors: Tensors) -> Tensors:
    x = tensors["x"]
    scale = np.abs(x).max(1, keepdims=True) / 127
    return {"y": (np.round(x / scale) * scale).astype(np.float32) @ WEIGHT}


def rows(count: int = 4) -> Tensors:
    return {"x": np.random.default_rng(2).normal(size=(count, 6)).astype(np.float32)}


def test_one_scale_for_the_batch_lets_a_loud_row_change_its_neighbours() -> None:
    assert "a loud row changes its neighbours" in broken(plain, one_scale, rows(), SIGNATURE)
    assert broken(plain, a_scale_a_row, rows(), SIGNATURE) == ""
    assert broken(plain, plain, rows(), SIGNATURE) == ""


def test_a_law_that_the_reference_breaks_is_asked_of_nobody() -> None:
    def centred(tensors: Tensors) -> Tensors:
        return {"y": (tensors["x"] - tensors["x"].mean(0)) @ WEIGHT}

    assert broken(centred, one_scale, rows(), SIGNATURE) == ""


def pooled(tensors: Tensors, *, blind: bool = False, padding_counts: bool = False) -> Array:
    mask = tensors["mask"].astype(np.float32)[..., None]
    read = TABLE[tensors["ids"]]
    if padding_counts:
        scale = 1.0 + tensors["ids"].shape[1] / 10
        read = np.round(read * 4 / scale) * scale / 4
    with np.errstate(invalid="ignore", divide="ignore"):
        total = mask.sum(1) if blind else np.maximum(mask.sum(1), 1)
        found: Array = (read * mask).sum(1) / total
    return found.astype(np.float32)


@pytest.fixture
def sentences() -> Tensors:
    mask = (np.arange(6)[None] < np.array([6, 3, 5, 2])[:, None]).astype(np.int64)
    return {"ids": np.random.default_rng(3).integers(1, 10, (4, 6)) * mask, "mask": mask}


def test_padding_that_the_reference_ignores_is_ignored(sentences: Tensors) -> None:
    fault = broken(lambda t: {"y": pooled(t)}, lambda t: {"y": pooled(t, padding_counts=True)}, sentences, WORDS)
    assert "padding changes the answer" in fault
    assert broken(lambda t: {"y": pooled(t)}, lambda t: {"y": pooled(t)}, sentences, WORDS) == ""


def test_a_row_without_a_place_to_look_at_gives_numbers_where_the_reference_does(sentences: Tensors) -> None:
    fault = broken(lambda t: {"y": pooled(t)}, lambda t: {"y": pooled(t, blind=True)}, sentences, WORDS)
    assert "a row whose mask leaves out everything gives NaN or infinity" in fault
    assert broken(lambda t: {"y": pooled(t, blind=True)}, lambda t: {"y": pooled(t)}, sentences, WORDS) == ""


def test_a_made_up_mask_that_leaves_out_everything_is_recognized(sentences: Tensors) -> None:
    assert not laws.masks_all(sentences, batched=True)
    assert laws.masks_all({**sentences, "mask": np.zeros_like(sentences["mask"])}, batched=True)
    assert not laws.masks_all({"x": np.zeros((2, 3), np.float32)}, batched=True)
