"""The models that other people's clients are tried on, as plain Python stages."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from torchship.stage import stage
from torchship.tensors import Array


@stage("x:FP32[-1,16] -> y:FP32[-1,16]", batched=True, max_batch=8)
def echo(x: Array) -> Array:
    return x


@stage("text_input:BYTES[1] -> text_output:BYTES[1]")
def upper(text: Array) -> Array:
    return np.array([text[0].upper()], object)


@stage("text_input:BYTES[1] -> text_output:BYTES[1]")
def again(text: Array, *, count: int = 1) -> Iterator[Array]:
    for number in range(count):
        yield np.array([b"%d %b" % (number, text[0])], object)


@stage("x:INT32[1] -> total:INT32[1]")
class Accumulator:
    """What an earlier request of the same sequence left behind."""

    def __init__(self) -> None:
        self._total = 0

    def __call__(self, x: Array) -> Array:
        self._total += int(x[0])
        return np.array([self._total], np.int32)


@stage("x:FP32[-1,2], by?:FP32[-1,2] -> y:FP32[-1,2]", batched=True, max_batch=8)
def scaled(x: Array, by: Array | None = None) -> Array:
    return x if by is None else x * by
