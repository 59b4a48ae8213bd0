"""Padding: rows of varying lengths are filled up to declared ones, so that different callers' rows share a batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchship.errors import BadConfig
from torchship.tensors import Array, Free, Signature, TensorSpec


class Padding:
    """Widens inputs to the next bucket of their named axes, and cuts outputs back to the lengths that came in.

    What is filled in are zeros (empty strings for BYTES): the model must not mind them, as one with a mask does.
    """

    def __init__(self, buckets: Mapping[str, Sequence[int]], *, signature: Signature, stage: str) -> None:
        """`buckets`: lengths by the name of an axis. Raises BadConfig for a name or a length that no input has."""
        self._buckets = {name: sorted(set(lengths)) for name, lengths in buckets.items()}
        self._inputs = [_named(spec, self._buckets) for spec in signature.inputs]
        self._outputs = [_named(spec, self._buckets) for spec in signature.outputs]
        known = {name: axis for axes in self._inputs for _, name, axis in axes}
        for name, lengths in self._buckets.items():
            axis = known.get(name)
            if axis is None:
                axes = [axis for spec in signature.inputs for axis in spec.shape[1:] if isinstance(axis, Free)]
                there = ", ".join(sorted({axis.name for axis in axes} - {""})) or "none"
                raise BadConfig(
                    f"stage {stage!r}: buckets for axis {name!r}, but its inputs' named axes are {there}",
                    hint="name an axis in the signature, as in ids:INT64[-1,seq:1..512]",
                )
            wrong = [length for length in lengths if length < axis.min or (axis.max and length > axis.max)]
            if wrong or not lengths:
                raise BadConfig(f"stage {stage!r}: buckets {wrong} of axis {name!r} are not within {axis}")

    def widen(self, arrays: Sequence[Any]) -> tuple[list[Any], dict[str, int]]:
        """The inputs, filled up, and the lengths that were: one longer than all buckets stays as it is."""
        lengths: dict[str, int] = {}
        found: list[Any] = []
        for array, axes in zip(arrays, self._inputs, strict=True):
            if array is None:  # an optional input that this call does not bring
                found.append(None)
                continue
            wider = list(array.shape)
            for place, name, _ in axes:
                lengths[name] = length = array.shape[place]
                index = bisect_left(self._buckets[name], length)
                wider[place] = self._buckets[name][index] if index < len(self._buckets[name]) else length
            found.append(array if tuple(wider) == array.shape else _filled(array, wider))
        return found, lengths

    def narrow(self, outputs: Sequence[Array], lengths: Mapping[str, int]) -> list[Array]:
        """The outputs, cut back."""
        return [_cut(array, axes, lengths) for array, axes in zip(outputs, self._outputs, strict=True)]


def _named(spec: TensorSpec, buckets: Mapping[str, Any]) -> list[tuple[int, str, Free]]:
    """Place, name and bounds of the axes that have buckets; axis 0 holds the rows."""
    axes = enumerate(spec.shape)
    return [(at, axis.name, axis) for at, axis in axes if at and isinstance(axis, Free) and axis.name in buckets]


def _filled(array: Array, shape: Sequence[int]) -> Array:
    wide = np.full(shape, b"", object) if array.dtype.hasobject else np.zeros(shape, array.dtype)
    wide[tuple([slice(length) for length in array.shape])] = array
    return wide


def _cut(array: Array, axes: Sequence[tuple[int, str, Free]], lengths: Mapping[str, int]) -> Array:
    cuts = [slice(None)] * array.ndim
    for place, name, _ in axes:
        cuts[place] = slice(lengths.get(name))  # nothing is cut where no input of the call has this axis
    return array[tuple(cuts)] if axes else array
