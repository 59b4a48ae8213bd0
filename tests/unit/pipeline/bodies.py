"""Small stages that the pipeline tests put together."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np

from torchship.stage import stage
from torchship.tensors import Array


@stage("text:BYTES[1] -> numbers:FP32[0..,2], size:INT64[1,2]")
def parse(text: Array) -> tuple[Array, Array]:
    """One row for each comma-separated number: it and its square. `size` is the text's length, twice."""
    values = [float(part) for part in text[0].decode().split(",") if part]
    rows = np.asarray([[value, value * value] for value in values], np.float32).reshape(len(values), 2)
    return rows, np.full((1, 2), len(text[0]), np.int64)


@stage("x:FP32[-1,2] -> y:FP32[-1,2]", batched=True, max_batch=2)
def double(x: Array) -> Array:
    """A row stage that refuses more rows than it declared."""
    if not 0 < len(x) <= 2:
        raise AssertionError(f"called with {len(x)} rows")
    return x * 2


@stage("x:FP32[-1,2] -> total:FP32[-1]", batched=True, max_batch=4)
def add_up(x: Array) -> Array:
    """The sum of each row."""
    return np.asarray(x.sum(1), np.float32)


@stage("y:FP32[0..,2], size:INT64[1,2] -> score:FP32[1], rows:INT64[1]")
def score(
    y: Array,
    size: Array,
    *,
    weight: Annotated[float, msgspec.Meta(ge=0, le=10, description="of the size")] = 1.0,
    top: Annotated[int, msgspec.Meta(ge=1, le=5)] = 3,
) -> tuple[Array, Array]:
    """Uses a tensor that was carried past the row stage."""
    total = y[:top].sum() + weight * size[0, 0]
    return np.asarray([total], np.float32), np.asarray([len(y)], np.int64)


@stage("y:FP32[1..,2] -> first:FP32[2]")
def needs_rows(y: Array) -> Array:
    """A job stage that says it needs at least one row."""
    return np.asarray(y[0])


@stage("x:FP32[-1,2] -> y:FP32[-1,2]", batched=True)
def loses_rows(x: Array) -> Array:
    """Breaks the promise of a row stage."""
    return x[1:]


@stage("x:FP32[-1,2] -> y:FP32[-1,2]", batched=True)
def wrong_dtype(x: Array) -> Array:
    """Declares FP32 and gives FP64."""
    return x.astype(np.float64)


@stage("x:FP32[-1,2] -> y:FP32[-1,2]", batched=True)
def raises(x: Array) -> Array:
    """Fails as user code fails."""
    raise ZeroDivisionError("the user's own mistake")


@stage("y:FP32[0..,2] -> y:FP32[2], turn:INT64[1]")
def one_by_one(y: Array, *, most: int = 3) -> Iterator[tuple[Array, Array]]:
    """Streams the rows."""
    for turn, row in enumerate(y[:most]):
        yield row, np.asarray([turn], np.int64)


@stage("y:FP32[0..,2] -> name:BYTES[0..]")
class Name:
    """Names the larger column of each row; takes the labels of the artifact before it."""

    def __init__(self, labels: Sequence[str] = ("a", "b"), prefix: str = "") -> None:
        self.labels = [f"{prefix}{label}".encode() for label in labels]
        self.open = True

    def __call__(self, y: Array) -> dict[str, Any]:
        names = np.empty(len(y), object)
        names[:] = [self.labels[i] for i in y.argmax(1)] if len(y) else []
        return {"name": names}

    def close(self) -> None:
        self.open = False


class Meeting:
    """Two stages that only go on when both are running."""

    barrier = threading.Barrier(2)


@stage("x:FP32[-1,2] -> left:FP32[-1,2]", batched=True)
def left(x: Array) -> Array:
    """Waits for `right`."""
    Meeting.barrier.wait(10)
    return x + 1


@stage("x:FP32[-1,2] -> right:FP32[-1,2]", batched=True)
def right(x: Array) -> Array:
    """Waits for `left`."""
    Meeting.barrier.wait(10)
    return x - 1


@stage("left:FP32[-1,2], right:FP32[-1,2] -> both:FP32[-1,2]", batched=True)
def both(left: Array, right: Array) -> Array:
    """Takes the outputs of two branches."""
    return left * right


def undeclared(x: Array) -> Array:
    """No stage."""
    return x


@stage("x:FP32[-1,2], bias?:FP32[-1,2] -> y:FP32[-1,2]", batched=True)
def biased(x: Array, bias: Array | None = None) -> Array:
    """A row stage with an optional input."""
    return x if bias is None else x + bias


@stage("y:FP32[-1,2], bias:FP32[-1,2] -> z:FP32[-1,2]", batched=True)
def needs_bias(y: Array, bias: Array) -> Array:
    """A row stage that needs what `biased` does not."""
    return y * bias


@stage("x?:FP32[1], text?:BYTES[1] -> seen:INT64[1]")
def either(x: Array | None = None, text: Array | None = None) -> Array:
    """How many inputs are there."""
    return np.array([(x is not None) + (text is not None)])
