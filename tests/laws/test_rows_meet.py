"""Law of batches: rows of several requests, made by a job stage, go through a row stage as one batch, and come home."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.serving import Background
from torchship.pipeline.config import convert
from torchship.pipeline.planning import plan
from torchship.serve.engine.line import Line
from torchship.serve.engine.spec import LineLimits
from torchship.stage import stage
from torchship.tensors import Array, Tensors

HERE = "tests.laws.test_rows_meet"
FACES = [7, 0, 1, 5, 2, 4, 3, 1]


@stage("picture:INT32[1], count:INT32[1] -> face:FP32[0..,2]")
def detect(picture: Array, count: Array) -> Array:
    """As many faces as the picture has, each with the picture's number and its own."""
    found = np.arange(count[0], dtype=np.float32)
    return np.stack([np.full(count[0], picture[0], np.float32), found], 1)


@stage("face:FP32[-1,2] -> same:FP32[-1,2], batch:INT64[-1]", batched=True, max_batch=64)
def embed(face: Array) -> tuple[Array, Array]:
    """Tells each row how many there were in its batch."""
    return face.copy(), np.full(len(face), len(face))


@pytest.mark.timeout(60)
def test_23_faces_of_8_pictures_are_one_batch() -> None:
    stages = [{"run": f"{HERE}:{name}", "copies": copies} for name, copies in (("detect", 2), ("embed", 1))]
    background = Background()

    async def asked() -> list[Tensors]:
        line = await Line(plan(convert({"name": "p", "stages": stages})), limits=LineLimits(max_wait=2.0)).open()
        try:
            pictures = (
                line.submit({"picture": np.array([n], np.int32), "count": np.array([count], np.int32)})
                for n, count in enumerate(FACES)
            )
            return list(await asyncio.gather(*pictures))
        finally:
            await line.close()

    try:
        answers = background.run(asked())
    finally:
        background.close()
    for number, (count, answer) in enumerate(zip(FACES, answers, strict=True)):
        assert answer["same"].tolist() == [[number, face] for face in range(count)]
        assert answer["batch"].tolist() == [sum(FACES)] * count
