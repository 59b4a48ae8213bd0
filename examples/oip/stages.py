"""What the examples of `tritonclient` call: sums, strings, sequences, and a stream of answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from torchship.errors import BadInput
from torchship.stage import stage
from torchship.tensors import Array


@stage(
    "INPUT0:INT32[-1,16], INPUT1:INT32[-1,16] -> OUTPUT0:INT32[-1,16], OUTPUT1:INT32[-1,16]",
    batched=True,
    max_batch=8,
)
def add_sub(first: Array, second: Array) -> tuple[Array, Array]:
    """The sum and the difference."""
    return first + second, first - second


@stage(
    "INPUT0:INT8[-1,16], INPUT1:INT8[-1,16] -> OUTPUT0:INT8[-1,16], OUTPUT1:INT8[-1,16]",
    batched=True,
    max_batch=8,
)
def add_sub_int8(first: Array, second: Array) -> tuple[Array, Array]:
    """The same for bytes."""
    return first + second, first - second


@stage(
    "INPUT0:BYTES[-1,16], INPUT1:BYTES[-1,16] -> OUTPUT0:BYTES[-1,16], OUTPUT1:BYTES[-1,16]",
    batched=True,
    max_batch=8,
)
def add_sub_strings(first: Array, second: Array) -> tuple[Array, Array]:
    """The same for numbers that are written out, such as `b"12"`."""
    try:
        one, two = first.astype(np.int64), second.astype(np.int64)
    except (ValueError, OverflowError) as fault:
        raise BadInput(f"the strings are no numbers: {fault}") from None
    return written(one + two), written(one - two)


def written(numbers: Array) -> Array:
    """Numbers as their digits."""
    found = np.empty(numbers.shape, object)
    found.ravel()[:] = [b"%d" % number for number in numbers.ravel().tolist()]
    return found


@stage("INPUT0:BYTES[-1,-1] -> OUTPUT0:BYTES[-1,-1]", batched=True, max_batch=8)
def identity(text: Array) -> Array:
    """Strings, given back."""
    return text


@stage("INPUT:INT32[-1,1] -> OUTPUT:INT32[-1,1]", batched=True, max_batch=1)
def sequence(number: Array, *, sequence_id: str = "", sequence_start: bool = False) -> Array:
    """The number, and one more at the start of a sequence."""
    return number + int(sequence_start)


@stage("INPUT:INT32[-1,1] -> OUTPUT:INT32[-1,1]", batched=True, max_batch=1)
def dyna_sequence(
    number: Array, *, sequence_id: str = "", sequence_start: bool = False, sequence_end: bool = False
) -> Array:
    """The same, and the id of the sequence added at its end."""
    return number + int(sequence_start) + (as_number(sequence_id) if sequence_end else 0)


def as_number(sequence_id: str) -> int:
    """An id of digits. Raises BadInput for any other: the caller is told, and nothing is taken for a fault of ours."""
    if not (sequence_id.isascii() and sequence_id.isdigit() and int(sequence_id) < 2**31):
        raise BadInput(f"sequence_id is {sequence_id[:40]!r}, expected a number below 2**31")
    return int(sequence_id)


@stage("INPUT:INT32[-1,1] -> OUTPUT:INT32[-1,1]", batched=True, max_batch=1)
class Accumulator:
    """The sum of a sequence so far, and its id added at its end: what one request leaves behind, the next one finds."""

    def __init__(self) -> None:
        self._sums: dict[str, Array] = {}

    def __call__(
        self, number: Array, *, sequence_id: str = "", sequence_start: bool = False, sequence_end: bool = False
    ) -> Array:
        total = number + (0 if sequence_start else self._sums.get(sequence_id, 0))
        self._sums[sequence_id] = total
        if sequence_end:
            del self._sums[sequence_id]
            return total + as_number(sequence_id)
        return total


@stage("IN:INT32[-1], DELAY:UINT32[-1], WAIT:UINT32[1] -> OUT:INT32[1], IDX:UINT32[1]")
def repeat(numbers: Array, delays: Array, wait: Array) -> Iterator[tuple[Array, Array]]:
    """One answer for each number, after its delay in milliseconds."""
    if len(numbers) != len(delays):
        raise BadInput(f"IN has {len(numbers)} elements, DELAY {len(delays)}")
    for index, (number, delay) in enumerate(zip(numbers, delays, strict=True)):
        time.sleep(min(int(delay) / 1e3, 10.0))
        yield np.array([number]), np.array([index], np.uint32)
