"""Rows of varying lengths share a batch where a stage declares buckets, and come back as long as they were."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import uvloop

from tests.serving import LENGTHS, planned
from torchship.errors import BadConfig
from torchship.serve.engine.line import Line
from torchship.serve.engine.padding import Padding
from torchship.tensors import Array, Signature

STAGE = {"run": "lengths", "buckets": {"n": [16, 8]}}


def given(length: int, *, rows: int = 1) -> dict[str, Array]:
    return {
        "x": np.full((rows, length), length, np.float32),
        "name": np.full((rows, length), b"a", object),
    }


def test_different_lengths_share_a_batch_and_come_back_as_they_were() -> None:
    async def work() -> None:
        line = await Line(planned(STAGE)).open()
        try:
            asked = [3, 8, 5, 1, 9, 16, 11, 40] * 4
            found = await asyncio.gather(*(line.submit(given(length)) for length in asked))
            for length, answer in zip(asked, found, strict=True):
                assert np.array_equal(answer["y"], given(length)["x"] * 2)
                assert answer["width"] == [8 if length <= 8 else 16 if length <= 16 else length]
            assert line.nodes[0].station.meter.calls < len(asked)
            many = await line.submit(given(5, rows=20))  # more than a batch
            assert many["y"].shape == (20, 5)
            assert set(many["width"]) == {8}
        finally:
            await line.close(grace=1.0)

    uvloop.run(work())


def test_buckets_must_belong_to_a_named_axis() -> None:
    signature = Signature.parse(LENGTHS)
    with pytest.raises(BadConfig, match=r"buckets for axis 'm', but its inputs' named axes are n"):
        Padding({"m": [8]}, signature=signature, stage="s")
    with pytest.raises(BadConfig, match=r"buckets \[65\] of axis 'n' are not within n:1\.\.64"):
        Padding({"n": [8, 65]}, signature=signature, stage="s")
    with pytest.raises(BadConfig, match="are not within"):
        Padding({"n": []}, signature=signature, stage="s")


def test_what_fits_is_not_copied() -> None:
    padding = Padding({"n": [8]}, signature=Signature.parse(LENGTHS), stage="s")
    tensors = list(given(8).values())
    wide, lengths_before = padding.widen(tensors)
    assert wide[0] is tensors[0]
    assert lengths_before == {"n": 8}
    wide, lengths_before = padding.widen(list(given(3).values()))
    assert wide[0].tolist() == [[3, 3, 3, 0, 0, 0, 0, 0]]
    assert wide[1].tolist() == [[b"a"] * 3 + [b""] * 5]


def test_an_absent_input_is_not_padded() -> None:
    signature = Signature.parse("x:FP32[-1,4], w?:INT8[-1,n:1..64] -> y:INT8[-1,n:1..64]")
    padding = Padding({"n": [8]}, signature=signature, stage="s")
    x, w = np.zeros((1, 4), np.float32), np.ones((1, 3), np.int8)
    wide, known = padding.widen([x, None])
    assert (wide[0] is x, wide[1], known) == (True, None, {})
    kept = padding.narrow([np.zeros((1, 5), np.int8)], known)
    assert kept[0].shape == (1, 5)  # the stage alone knows how long it is
    wide, known = padding.widen([x, w])
    assert wide[1].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert known == {"n": 3}
