"""Finds out which axes are free: from the examples' shapes on the way in, by trying other lengths on the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from torchship.errors import CaptureFailed
from torchship.tensors import Axis, Free

Shape: TypeAlias = tuple[Axis, ...]
Call: TypeAlias = Sequence[torch.Tensor]
Run: TypeAlias = Callable[[Call], tuple[torch.Tensor, ...]]
_OURS = re.compile(r"n\d+")


@dataclass(frozen=True)
class Study:
    """What was found: shapes with free axes, whether axis 0 holds rows, the outputs of the first example.

    `moves` tells for each output which of its axes holds the rows; one that is not 0 is to be moved to the front.
    """

    inputs: tuple[Shape, ...]
    outputs: tuple[torch.Tensor, ...]
    output_shapes: tuple[Shape, ...]
    batched: bool
    moves: tuple[int, ...] = ()
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
    """Try other batch sizes and lengths, and see which axes of the outputs follow.

    Raises CaptureFailed when `batched` is asked for and not to be had.
    """
    notes: list[str] = []
    outputs = run(calls[0])
    moves: tuple[int, ...] = ()
    rows = batched is not False and _may_hold_rows(calls, shapes)
    if rows:
        moves = _moves(run, calls[0], outputs)
        run = moved(run, moves)
        outputs = run(calls[0])
        rows = _rows_kept(run, calls[0], notes)
    if batched and not rows:
        raise CaptureFailed("axis 0 is no batch axis: " + "; ".join(notes or ["inputs differ in their rows"]))
    if rows:
        shapes = [((axis if isinstance(axis := shape[0], Free) else Free()), *shape[1:]) for shape in shapes]
        notes += [f"output {i}: its batch axis {axis} was moved to the front" for i, axis in enumerate(moves) if axis]
    elif any(moves):
        run, moves = moved(run, _back(moves)), ()
        outputs = run(calls[0])
    shapes = _named(shapes, rows=rows)
    symbols = _symbols(shapes, rows=rows)
    probes = [(call, [tuple(out.shape) for out in run(call)]) for call in calls]
    for places in symbols.values():
        probes += _probe(run, calls[0], places, shapes)
    first = shapes[0][0] if rows else None
    found = tuple(_output_shape(i, outputs[i].dim(), probes, symbols=symbols, rows=first) for i in range(len(outputs)))
    return Study(tuple(_unnamed(shapes, found)), outputs, tuple(_unnamed(found, shapes)), rows, moves, notes)


def moved(run: Run, moves: Sequence[int]) -> Run:
    """`run` with one axis of each output moved to the front (a negative number moves the front there)."""

    def changed(call: Call) -> tuple[torch.Tensor, ...]:
        return tuple(
            out.movedim(axis, 0) if axis > 0 else out.movedim(0, -axis) if axis < 0 else out
            for out, axis in zip(run(call), moves, strict=True)
        )

    return changed if any(moves) else run


def _back(moves: Sequence[int]) -> tuple[int, ...]:
    return tuple(-axis for axis in moves)


def _moves(run: Run, call: Call, outputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The axis of each output that follows the number of rows, where it is one and not the first; else 0.

    The hidden state of a recurrent net is [layers, rows, width].
    """
    before = call[0].shape[0]
    after = before + 3
    try:
        others = run([_resized(tensor, {0: after}) for tensor in call])
    except Exception:  # whoever takes no other number of rows has no batch axis; that is told later
        return tuple(0 for _ in outputs)
    found = []
    for old, new in zip(outputs, others, strict=True):
        axes = [i for i in range(min(old.dim(), new.dim())) if (old.shape[i], new.shape[i]) == (before, after)]
        found.append(axes[0] if axes else 0)
    return tuple(found)


def _named(shapes: Sequence[Shape], *, rows: bool) -> list[Shape]:
    """The shapes with a name for every free axis but the rows, so that outputs can follow it."""
    taken = {axis.name for shape in shapes for axis in shape if isinstance(axis, Free)}
    fresh = (name for name in (f"n{number}" for number in range(1, 1000)) if name not in taken)

    def named(axis: Axis, position: int) -> Axis:
        if not isinstance(axis, Free) or axis.name or (rows and position == 0):
            return axis
        return Free(axis.min, axis.max, next(fresh))

    return [tuple(named(axis, position) for position, axis in enumerate(shape)) for shape in shapes]


def _unnamed(shapes: Sequence[Shape], others: Sequence[Shape]) -> list[Shape]:
    """The shapes without the names of ours that only one axis bears."""
    every = [axis.name for shape in (*shapes, *others) for axis in shape if isinstance(axis, Free)]

    def plain(axis: Axis) -> Axis:
        if isinstance(axis, Free) and _OURS.fullmatch(axis.name) and every.count(axis.name) < 2:
            return Free(axis.min, axis.max)
        return axis

    return [tuple(plain(axis) for axis in shape) for shape in shapes]


def _may_hold_rows(calls: Sequence[Call], shapes: Sequence[Shape]) -> bool:
    """Every input has an axis 0, equally long in each example, that no specification fixes."""
    if any(not shape for shape in shapes):
        return False
    return all(len({tensor.shape[0] for tensor in call}) == 1 for call in calls)


def _rows_kept(run: Run, call: Call, notes: list[str]) -> bool:
    """Whether three rows give three rows, and each row alone gives the same as among others."""
    three = [_resized(tensor, {0: 3}) for tensor in call]
    try:
        joined = run(three)
    except Exception as fault:
        notes.append(f"axis 0 is fixed: three rows fail ({type(fault).__name__}: {str(fault).splitlines()[0][:200]})")
        return False
    for index, whole in enumerate(joined):
        if whole.dim() == 0 or whole.shape[0] != 3:
            notes.append(f"not batched: output {index} has shape {list(whole.shape)} for three rows")
            return False
    # a row of the other sign leads astray whoever decides by all rows what to do with each
    for rows in (three, [_flipped(tensor) for tensor in three]):
        mixed = _mixes(run, rows)
        if mixed:
            notes.append(mixed)
            return False
    return True


def _mixes(run: Run, three: Call) -> str:
    """Which output of a row depends on the other rows; empty when none does, or when the module refuses the rows."""
    try:
        joined = run(three)
        parts = [run([tensor[i : i + 1] for tensor in three]) for i in (0, 2)]
    except Exception:
        return ""
    for index, whole in enumerate(joined):
        for row, part in zip((0, 2), parts, strict=True):
            if not _close(part[index], whole[row : row + 1]):
                return f"not batched: output {index} of a row depends on the other rows"
    return ""


def _flipped(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return torch.cat([tensor[:1], tensor[1:2] * 0.5, -3 * tensor[2:]])


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
