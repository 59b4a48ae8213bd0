"""Batch sizes on a card and what happens when its memory ends; the card itself is a stand-in here."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from torchship.errors import Unavailable
from torchship.lowering.cuda import CudaStage, batch_sizes
from torchship.tensors import Signature


def test_batch_sizes_are_powers_of_two_and_the_limit() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert batch_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]


class Small(CudaStage):
    """A stage on a card that holds `room` rows at once; it doubles them."""

    def __init__(self, signature: Signature, room: int) -> None:
        super().__init__(lambda x: (x * 2,), signature=signature, device="cuda")
        self.room, self.ran = room, list[int]()

    def _run(self, arrays: Sequence[Any]) -> list[torch.Tensor]:
        rows = arrays[0].shape[0]
        if rows > self.room:
            raise torch.OutOfMemoryError("Tried to allocate 596.05 GiB. Process 4711 has 3.1 GiB memory in use.")
        self.ran.append(rows)
        return [torch.from_numpy(arrays[0]) * 2]


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


SIGNATURE = Signature.parse("x:FP32[n,3] -> y:FP32[n,3]")


def test_a_batch_without_memory_is_halved_and_the_limit_is_remembered() -> None:
    stage = Small(SIGNATURE, room=20)
    x = np.arange(64 * 3, dtype=np.float32).reshape(64, 3)
    np.testing.assert_array_equal(stage({"x": x})["y"], x * 2)
    assert stage.ran == [16, 16, 16, 16]
    stage.ran.clear()
    np.testing.assert_array_equal(stage({"x": x[:40]})["y"], x[:40] * 2)
    assert stage.ran == [16, 16, 8], "no larger batch is tried again"


def test_one_row_without_memory_says_so_and_nothing_about_others() -> None:
    stage = Small(SIGNATURE, room=0)
    with pytest.raises(Unavailable) as caught:
        stage({"x": np.zeros((4, 3), np.float32)})
    assert "4711" not in caught.value.line
    assert "no memory left" in caught.value.line
    stage.room = 4
    assert stage({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[2.0, 2.0, 2.0]], "it lives on"


def test_a_closed_stage_refuses() -> None:
    stage = Small(SIGNATURE, room=4)
    stage.close()
    stage.close()
    with pytest.raises(Unavailable, match="closed"):
        stage({"x": np.zeros((1, 3), np.float32)})
