"""The models that the protocols are tested with, as plain Python stages."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from torchship.stage import stage
from torchship.tensors import Array

ADD_SUB = "INPUT0:INT32[-1,16], INPUT1:INT32[-1,16] -> OUTPUT0:INT32[-1,16], OUTPUT1:INT32[-1,16]"


@stage(ADD_SUB, batched=True, max_batch=8)
def add_sub(first: Array, second: Array) -> tuple[Array, Array]:
    return first + second, first - second


@stage("x:FP32[-1,16] -> y:FP32[-1,16]", batched=True, max_batch=65536)
def echo(x: Array) -> Array:
    return x


@stage("x:FP16[-1,4] -> y:FP16[-1,4]", batched=True, max_batch=8)
def half(x: Array) -> Array:
    return x * np.float16(0.5)


@stage("image:BYTES[1] -> size:INT64[1]")
def picture(image: Array) -> Array:
    return np.array([len(image[0])])


@stage("text_input:BYTES[1] -> text_output:BYTES[1]")
def text(text_input: Array) -> Array:
    return np.array([text_input[0].upper()], object)


@stage("text_input:BYTES[1] -> text_output:BYTES[1]")
def again(text_input: Array, *, count: int = 1, wait: float = 0.0) -> Iterator[Array]:
    for _ in range(count):
        time.sleep(wait)
        yield np.array([text_input[0].upper()], object)


@stage("first:FP32[-1,3,8,8], last:UINT8[-1,8,8,3] -> size:INT64[-1]", batched=True, max_batch=8)
def photos(first: Array, last: Array) -> Array:
    return np.full(len(first), last[0].size)
