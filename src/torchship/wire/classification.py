"""The classification extension: an output as its top classes, each `value:index[:label]`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchship.errors import BadInput
from torchship.tensors import Array, bytes_array


def classify(array: Array, *, top: int, labels: Sequence[str] = ()) -> Array:
    """The `top` largest values of each row as BYTES of shape [rows, top], largest first (one row: axis 0 is kept).

    Source: Triton's classification extension. Raises BadInput for an output that holds no numbers.
    """
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise BadInput("only an output of numbers can be asked for as classes")
    rows = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)
    if array.dtype.name == "bfloat16":
        rows = rows.astype(np.float32)
    top = min(top, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :top]
    texts = [
        _text(row[index], int(index), labels).encode()
        for row, places in zip(rows, order, strict=True)
        for index in places
    ]
    shape = (rows.shape[0], top) if array.ndim > 1 else (top,)
    return bytes_array(texts).reshape(shape)


def _text(value: np.generic, index: int, labels: Sequence[str]) -> str:
    number = f"{float(value.item()):f}" if value.dtype.kind == "f" else f"{value.item()}"
    label = labels[index] if index < len(labels) else ""
    return f"{number}:{index}:{label}" if label else f"{number}:{index}"
