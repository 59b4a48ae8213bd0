"""Finds out which axes are free: from the examples' shapes on the way in, by trying other lengths on the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from torchship.errors import CaptureFailed
from torchship.tensors import Axis, Free

Shape: TypeAlias = tuple[Axis, ...]
Call: TypeAlias = Sequence[torch.Tensor]
Run: TypeAlias = Callable[[Call], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Study:
    """What was found: shapes with free axes, whether axis 0 holds rows, the outputs of the first example."""

    inputs: tuple[Shape, ...]
    outputs: tuple[torch.Tensor, ...]
    output_shapes: tuple[Shape, ...]
    batched: bool
    notes: list[str] = field(default_factory=list)


def input_shapes(
    names: Sequence[str], calls: Sequence[Call], *, free: Mapping[str, Mapping[int, Free | str]]
) -> list[Shape]:
    """The inputs' shapes: an axis is Free where it is told to be, or where its length differs between examples."""
    unknown = sorted(set(free).difference(names))
    if unknown:
        raise CaptureFailed(f"free axes are given for unknown inputs {unknown}", hint=f"inputs: {', '.join(names)}")
    lengths = {
        (i, axis): tuple(call[i].shape[axis] for call in calls)
        for i in range(len(names))
        for axis in range(calls[0][i].dim())
        if all(call[i].dim() == calls[0][i].dim() for call in calls)
    }
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for place, seen in lengths.items():
        if len(set(seen)) > 1 and place[1] > 0:
            groups.setdefault(seen, []).append(place)
    shared = [places for places in groups.values() if len(places) > 1]
    named = {place: f"n{number}" for number, places in enumerate(shared, 1) for place in places}

    def axis_of(i: int, axis: int) -> Axis:
        told = free.get(names[i], {}).get(axis)
        if told is not None:
            return Free(name=told) if isinstance(told, str) else told
        return Free(name=named.get((i, axis), "")) if len(set(lengths[i, axis])) > 1 else lengths[i, axis][0]

    if len({tuple(t.dim() for t in call) for call in calls}) > 1:
        raise CaptureFailed("the examples differ in their number of axes", hint="give examples of the same rank")
    return [tuple(axis_of(i, a) for a in range(calls[0][i].dim())) for i in range(len(names))]


def study(
    run: Run, calls: Sequence[Call], shapes: Sequence[Shape], *, names: Sequence[str], batched: bool | None
) -> Study:
    """Try other batch sizes and lengths, and see which axes of the outputs follow."""
    notes: list[str] = []
    outputs = run(calls[0])
    rows = (
        _rows_kept(run, calls[0], outputs, notes) if batched is not False and _may_hold_rows(calls, shapes) else False
    )
    if batched and not rows:
        raise CaptureFailed("axis 0 is no batch axis: " + "; ".join(notes or ["inputs differ in their rows"]))
    if rows:
        shapes = [((axis if isinstance(axis := shape[0], Free) else Free()), *shape[1:]) for shape in shapes]
    probes = [(call, [tuple(out.shape) for out in run(call)]) for call in calls[1:]]
    probes.insert(0, (calls[0], [tuple(out.shape) for out in outputs]))
    symbols = _symbols(shapes, rows=rows)
    for places in symbols.values():
        probes += _probe(run, calls[0], places, shapes)
    found = tuple(
        _output_shape(i, outputs[i].dim(), probes, symbols=symbols, rows=shapes[0][0] if rows else None)
        for i in range(len(outputs))
    )
    return Study(tuple(shapes), outputs, found, rows, notes)


def _may_hold_rows(calls: Sequence[Call], shapes: Sequence[Shape]) -> bool:
    """Every input has an axis 0, equally long in each example, that no specification fixes."""
    if any(not shape for shape in shapes):
        return False
    return all(len({tensor.shape[0] for tensor in call}) == 1 for call in calls)


def _rows_kept(run: Run, call: Call, outputs: Sequence[torch.Tensor], notes: list[str]) -> bool:
    """Whether three rows give three rows, and each row alone gives the same as among others."""
    three = [_resized(tensor, {0: 3}) for tensor in call]
    try:
        joined = run(three)
        parts = [run([tensor[i : i + 1] for tensor in three]) for i in (0, 2)]
    except Exception as fault:
        notes.append(f"axis 0 is fixed: three rows fail ({type(fault).__name__}: {str(fault).splitlines()[0][:200]})")
        return False
    for index, whole in enumerate(joined):
        if whole.dim() == 0 or whole.shape[0] != 3:
            notes.append(f"not batched: output {index} has shape {list(whole.shape)} for three rows")
            return False
        for row, part in zip((0, 2), parts, strict=True):
            if not _close(part[index], whole[row : row + 1]):
                notes.append(f"not batched: output {index} of a row depends on the other rows")
                return False
    return True


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool((a == b).float().mean() > 0.99) if a.numel() else True
    a, b = a.double(), b.double()
    seen = torch.isfinite(a) & torch.isfinite(b)
    return bool((a[seen] - b[seen]).norm() <= 1e-2 * b[seen].norm() + 1e-6)


def _symbols(shapes: Sequence[Shape], *, rows: bool) -> dict[str, list[tuple[int, int]]]:
    """The free axes but the rows: places by their name, an unnamed one by itself."""
    found: dict[str, list[tuple[int, int]]] = {}
    for i, shape in enumerate(shapes):
        for position, axis in enumerate(shape):
            if isinstance(axis, Free) and not (rows and position == 0):
                found.setdefault(axis.name or f"?{i}.{position}", []).append((i, position))
    return found


def _probe(
    run: Run, call: Call, places: Sequence[tuple[int, int]], shapes: Sequence[Shape]
) -> list[tuple[Call, list[tuple[int, ...]]]]:
    """Run with other lengths of one free axis; a length that the module refuses is no evidence."""
    first, position = places[0]
    now = call[first].shape[position]
    axis = shapes[first][position]
    assert isinstance(axis, Free)  # noqa: S101  # places come from _symbols
    for wanted in (now + 1, now * 2, now - 1, now + 32, now // 2):
        if wanted < max(axis.min, 1) or wanted == now or (axis.max is not None and wanted > axis.max):
            continue
        other = [_resized(t, {p: wanted for j, p in places if j == i}) for i, t in enumerate(call)]
        try:
            return [(other, [tuple(out.shape) for out in run(other)])]
        except Exception:  # noqa: S112  # strides and windows allow only some lengths
            continue
    return []


def _resized(tensor: torch.Tensor, lengths: Mapping[int, int]) -> torch.Tensor:
    for position, length in lengths.items():
        index = torch.arange(length, device=tensor.device) % tensor.shape[position]
        tensor = tensor.index_select(position, index)
    return tensor


def _output_shape(
    index: int,
    rank: int,
    probes: Sequence[tuple[Call, list[tuple[int, ...]]]],
    *,
    symbols: Mapping[str, Sequence[tuple[int, int]]],
    rows: Axis | None,
) -> Shape:
    ranks = {len(seen[index]) for _, seen in probes}
    if len(ranks) > 1:
        raise CaptureFailed(f"output {index} changes its number of axes with the input's shape: {sorted(ranks)}")

    def axis_of(position: int) -> Axis:
        if rows is not None and position == 0:
            return rows
        lengths = [seen[index][position] for _, seen in probes]
        if len(set(lengths)) == 1:
            return lengths[0]
        for name, places in symbols.items():
            i, p = places[0]
            if not name.startswith("?") and lengths == [call[i].shape[p] for call, _ in probes]:
                return Free(name=name)
        return Free(min=0)

    return tuple(axis_of(position) for position in range(rank))
