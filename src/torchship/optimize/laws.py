"""The laws that the reference keeps, and every candidate with it: a row's answer does not depend on its neighbours, on
the size of its batch, or on padding that a mask leaves out; a row that is masked throughout gives numbers.

Whether the reference keeps a law is found out by trying, on one base batch; only what it keeps is asked of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from torchship import difference
from torchship.optimize.measure import resized
from torchship.optimize.yardstick import rows_first
from torchship.tensors import Array, Free, Signature, Tensors

BASE_ROWS = 4
_CROWD = 16
_LOUD = 100.0
_PADDED = 4  # times the length
_KEPT = 1e-3  # relative error of a row up to which the reference keeps a law
_FLOOR = 0.1

Answer = Callable[[Tensors], Tensors]


class Law(msgspec.Struct, frozen=True):
    """What must hold of the answers to one probe. `pairs`: row here, and the row of the base batch that it must equal,
    for `outputs`. `rows` must be as finite as the reference's.
    """

    words: str
    pairs: tuple[tuple[int, int], ...] = ()
    outputs: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()


class Probe(msgspec.Struct, frozen=True):
    """A law, the input that tries it, and what the reference answers."""

    law: Law
    inputs: Tensors
    outputs: Tensors


def probes(base: Tensors, *, signature: Signature, answer: Answer) -> list[Probe]:
    """What the reference, asked by `answer`, keeps beside the base batch. A probe that it refuses is none."""
    found, expected = [], answer(base)
    tried = [*_neighbours(base, signature), *_padded(base, signature), *_masked(base, signature)]
    for law, inputs in tried:
        try:
            outputs = answer(inputs)
        except Exception:  # noqa: S112  # values or lengths that it was not made for
            continue
        kept = _kept(law, outputs, expected, signature)
        if kept is not None:
            found.append(Probe(kept, inputs, outputs))
    return found


def _kept(law: Law, outputs: Tensors, base: Tensors, signature: Signature) -> Law | None:
    """The law for the outputs and rows that the reference keeps it in; None where that is nothing."""
    names = tuple(
        spec.name
        for spec in signature.outputs
        if law.pairs and _apart(law.pairs, base[spec.name], outputs[spec.name], signature) <= _KEPT
    )
    firsts = [rows_first(array, batched=signature.batched) for array in outputs.values()]
    rows = tuple(row for row in law.rows if all(np.isfinite(a[row].astype(np.float64)).all() for a in firsts))
    return msgspec.structs.replace(law, outputs=names, rows=rows) if names or rows else None


def _neighbours(base: Tensors, signature: Signature) -> Iterator[tuple[Law, Tensors]]:
    count = len(next(iter(base.values()))) if signature.batched else 0
    if count < BASE_ROWS:
        return
    for row in (0, count - 1):
        alone = {name: array[row : row + 1] for name, array in base.items()}
        yield Law("a row alone is answered otherwise than among others", ((0, row),)), alone
    crowd = min(_CROWD, signature.max_rows)
    same = tuple((row, row % count) for row in range(crowd))
    yield Law("another batch size changes a row", same), resized(base, rows=crowd)
    others = tuple((row, row) for row in range(count) if row != 1)
    yield Law("a loud row changes its neighbours", others), {n: _loud(n, a) for n, a in base.items()}


def _loud(name: str, array: Array) -> Array:
    """Row 1 a hundred times as large; of integers the largest that the rows hold."""
    changed = array.copy()
    if array.dtype.kind == "f" or array.dtype.name == "bfloat16":
        changed[1] = (array[1].astype(np.float64) * _LOUD).astype(array.dtype)
    elif array.dtype.kind in "iu" and array.size and not is_mask(name, array):
        changed[1] = array.max()
    return changed


def is_mask(name: str, array: Array) -> bool:
    """Whether an input looks like one that says which places count."""
    return array.dtype.kind == "b" or "mask" in name.lower()


def masks_all(tensors: Tensors, *, batched: bool) -> bool:
    """Whether a mask leaves out every place of a row: what comes out there is the convention of one kernel."""
    return any(
        is_mask(name, array) and array.ndim > 1 and bool((~rows_first(array, batched=batched).any(-1)).any())
        for name, array in tensors.items()
    )


def _padded(base: Tensors, signature: Signature) -> Iterator[tuple[Law, Tensors]]:
    """Longer by zeros along an axis that a mask shares; by ones in the mask, where that means left out."""
    count = len(next(iter(base.values()))) if signature.batched else 1
    law = Law("padding changes the answer", tuple((row, row) for row in range(count)))
    axes = {a.name: a for spec in signature.inputs for a in spec.shape[1:] if isinstance(a, Free) and a.name}
    for name, axis in axes.items():
        sharing = {
            spec.name: [p for p, own in enumerate(spec.shape) if p and isinstance(own, Free) and own.name == name]
            for spec in signature.inputs
        }
        sharing = {tensor: places for tensor, places in sharing.items() if places}
        if len(sharing) < 2 or not any(is_mask(tensor, base[tensor]) for tensor in sharing):
            continue
        for fill in (0, 1):
            longer = dict(base)
            for tensor, places in sharing.items():
                array = base[tensor]
                width = [(0, 0)] * array.ndim
                for p in places:
                    long = array.shape[p] * _PADDED
                    width[p] = (0, min(long, axis.max or long) - array.shape[p])
                longer[tensor] = np.pad(array, width, constant_values=fill if is_mask(tensor, array) else 0)
            yield law, longer


def _masked(base: Tensors, signature: Signature) -> Iterator[tuple[Law, Tensors]]:
    """A row whose mask leaves out everything."""
    if not signature.batched or len(next(iter(base.values()))) < BASE_ROWS:
        return
    masks = [name for name, array in base.items() if is_mask(name, array) and array.ndim > 1]
    if masks:
        empty = {name: array.copy() for name, array in base.items()}
        for name in masks:
            empty[name][1] = 0
        yield Law("a row whose mask leaves out everything gives NaN or infinity", rows=(1,)), empty


def broken(law: Law, *, wanted: Tensors, found: Tensors, base: Tensors, signature: Signature, limit: float) -> str:
    """Which law a candidate's answers break, in words; empty when it keeps it.

    `wanted`: the reference's answers to the probe; `base`: the candidate's own to the base batch; `limit` of the
    relative error of a row.
    """
    for name in law.outputs:
        error = _apart(law.pairs, base[name], found[name], signature)
        if not error <= limit:
            return f"{law.words} (output {name!r} by {error:.2g})"
    if not law.rows:
        return ""
    for spec in signature.outputs:
        a, b = (rows_first(side[spec.name], batched=signature.batched)[list(law.rows)] for side in (wanted, found))
        odd = difference.odd_places(a, b)
        if odd.any():
            return f"{law.words} (output {spec.name!r} in {int(odd.sum())} places)"
    return ""


def _apart(pairs: Sequence[tuple[int, int]], base: Array, found: Array, signature: Signature) -> float:
    """The largest error of a row here against its row of the base batch; infinite where the shapes differ."""
    ours, theirs = (rows_first(side, batched=signature.batched) for side in (base, found))
    if max(here for here, _ in pairs) >= len(theirs):
        return float("inf")
    a, b = ours[[there for _, there in pairs]], theirs[[here for here, _ in pairs]]
    if a.shape != b.shape:
        return float("inf")
    if a.dtype.kind in "biuO":
        return 0.0 if difference.share_equal(a, b) > 0.95 else float("inf")
    return float(difference.row_errors(a, b, floor=_FLOOR).max(initial=0.0))
