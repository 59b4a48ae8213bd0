"""What the reference's own answers say about how to judge others: which outputs are class scores, embeddings, labels or
plain values, and by how much each channel and each row varies.

An error means something only beside that variation: a forecast of a million plus or minus a hundred is lost by an
error of a thousandth, and a score from 0 to 1 beside box coordinates up to 300 disappears in one common scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from torchship.tensors import FLOATS, Array, Signature, Tensors, TensorSpec

Kind: TypeAlias = Literal["scores", "embedding", "values", "labels"]
FEWEST_ROWS = 8  # fewer say nothing about how answers vary
_APART = 10.0  # channels whose spreads differ by more than this have other units
_MOST_CHANNELS = 4096
_FAINT = 1e-6
_POWER = 0.2  # what a random answer must cost for class scores to prove anything


class Channels(msgspec.Struct, frozen=True):
    """The channels along one axis of an output (axis 0 are the rows; None: everything is one channel): by how much
    each varies over all rows and places, and which of them have the same units.
    """

    axis: int | None
    scales: tuple[float, ...]
    units: tuple[int, ...]

    def split(self, rows: Array) -> Array:
        """[rows, ...] as [rows, places, channels]."""
        if self.axis is None:
            return rows.reshape(len(rows), -1, 1)
        return np.moveaxis(rows, self.axis, -1).reshape(len(rows), -1, len(self.scales))


class Yardstick(msgspec.Struct, frozen=True):
    """How one output is to be judged. `norm` and `spread`: the median row's root mean square, as it is and about the
    row's own mean. `softmax`: whether class scores are logits. `varies`: whether the reference's answers differ at all.
    """

    name: str
    kind: Kind
    channels: tuple[Channels, ...] = ()
    norm: float = 0.0
    spread: float = 0.0
    softmax: bool = False
    varies: bool = True

    def probabilities(self, scores: Array) -> Array:
        """Class scores [rows, classes] as probabilities."""
        return softmax(scores) if self.softmax else scores.astype(np.float64)


def softmax(logits: Array) -> Array:
    """Along the last axis, in FP64; NaN counts as minus infinity."""
    wide = np.nan_to_num(logits.astype(np.float64), nan=-1e30, posinf=1e30, neginf=-1e30)
    raised = np.exp(wide - wide.max(-1, keepdims=True))
    return np.asarray(raised / raised.sum(-1, keepdims=True))


def rows_first(array: Array, *, batched: bool) -> Array:
    """The array with its rows along axis 0: one row where the signature has none."""
    return array if batched else array[None]


def study(outputs: Sequence[Tensors], *, signature: Signature) -> list[Yardstick]:
    """A yardstick for each output, from the reference's answers to real rows."""
    return [
        _of(spec, [rows_first(a[spec.name], batched=signature.batched) for a in outputs], signature.batched)
        for spec in signature.outputs
    ]


def _of(spec: TensorSpec, parts: Sequence[Array], batched: bool) -> Yardstick:
    rows = sum(len(part) for part in parts)
    lone = sum(part.size for part in parts) == 1  # one number can differ from nothing
    if spec.dtype not in FLOATS:
        first = parts[0].ravel()[:1] if parts else np.zeros(1)
        return Yardstick(spec.name, "labels", varies=lone or any(bool((part != first).any()) for part in parts))
    floats = [np.nan_to_num(part.astype(np.float64), posinf=0.0, neginf=0.0) for part in parts]
    norms = np.concatenate([size_of(part) for part in floats]) if floats else np.zeros(1)
    spreads = np.concatenate([size_of(centred(part)) for part in floats]) if floats else np.zeros(1)
    kind: Kind = "values"
    soft = False
    if batched and rows >= FEWEST_ROWS and parts[0].ndim == 2 and parts[0].shape[1] > 1:
        joined = np.concatenate(parts).astype(np.float64)
        kind, soft = _kind(joined)
    # channels may lie along the first and the last axis of fixed length, counted with the rows in front
    shape = spec.shape[1:] if batched else spec.shape
    fixed = [i + 1 for i, axis in enumerate(shape) if isinstance(axis, int) and 1 < axis <= _MOST_CHANNELS]
    axes: list[int | None] = [*sorted({fixed[0], fixed[-1]})] if fixed else [None]
    found = tuple(_channels(axis, floats) for axis in axes) if rows else ()
    # answers of other lengths differ, too
    first = floats[0][:1] if rows > 1 else np.ravel(floats[:1])[:1]  # a single row can only be compared with itself
    varies = lone or any(p.shape[1:] != floats[0].shape[1:] or bool((p != first).any()) for p in floats)
    return Yardstick(spec.name, kind, found, float(np.median(norms)), float(np.median(spreads)), soft, varies)


def _kind(joined: Array) -> tuple[Kind, bool]:
    """Whether [rows, columns] of floats are embeddings of unit length, or class scores that can tell good from bad:
    softmax of them, or they themselves, must hold a random class to be clearly worse than the best.
    """
    finite = joined[np.isfinite(joined).all(1)]
    if len(finite) and np.allclose(np.linalg.norm(finite, axis=1), 1.0, atol=1e-3) and bool((finite < 0).any()):
        return "embedding", False
    whole = bool(len(finite)) and bool((finite >= -1e-6).all()) and np.allclose(finite.sum(1), 1.0, atol=1e-2)
    chances = np.nan_to_num(joined if whole else softmax(joined))
    top = chances.argmax(1)
    often = np.bincount(top, minlength=chances.shape[1]) / len(top)
    power = float((chances.max(1) - chances @ often).mean())
    return ("scores" if power >= _POWER else "values"), not whole


def _channels(axis: int | None, parts: Sequence[Array]) -> Channels:
    count = 1 if axis is None else parts[0].shape[axis]
    empty = Channels(axis, (1.0,) * count, (0,) * count)
    flat = [empty.split(part).reshape(-1, count) for part in parts]
    places = max(1, sum(len(part) for part in flat))
    means = sum((part.sum(0) for part in flat), np.zeros(count)) / places
    spreads = np.sqrt(sum((np.square(part - means).sum(0) for part in flat), np.zeros(count)) / places)
    spreads[spreads <= 1e-9 * np.abs(means)] = 0.0
    # channels whose spreads are linked without a gap of ten times have the same units
    order = np.argsort(spreads)
    jumps = spreads[order][1:] > _APART * spreads[order][:-1]
    units = np.empty(count, int)
    units[order] = np.cumsum([False, *jumps])
    scales = spreads.copy()
    for unit in set(units.tolist()):
        same = units == unit
        scales[same] = np.hypot(spreads[same], means[same].std())
    still = scales == 0
    level = np.abs(means[still])
    scales[still] = np.where(level > 0, level, scales.max() if (scales > 0).any() else 0.0)
    return Channels(axis, tuple(scales.tolist()), tuple(units.tolist()))


def size_of(rows: Array) -> Array:
    """The root mean square of each row; 0 for empty ones."""
    flat = rows.reshape(len(rows), -1)
    return np.asarray(np.sqrt(np.square(flat).mean(1)) if flat.shape[1] else np.zeros(len(rows)))


def centred(rows: Array) -> Array:
    """Each row without its own mean."""
    return rows - rows.mean(tuple(range(1, rows.ndim)), keepdims=True) if rows[:1].size else rows


def told(yards: Sequence[Yardstick]) -> Iterator[str]:
    """Notes for the report: how outputs are read, and which of them prove nothing."""
    floats = [yard.norm for yard in yards if yard.kind != "labels"]
    if floats and max(floats) < _FAINT:
        yield f"answers of the model itself are below {_FAINT:g}: its weights look untrained, int8 may not hold them"
    for yard in yards:
        if yard.kind == "scores":
            form = "logits, through softmax" if yard.softmax else "probabilities"
            yield f"output {yard.name!r} is judged as class scores ({form})"
        if not yard.varies:
            yield f"output {yard.name!r} is the same for all rows: it proves nothing"
