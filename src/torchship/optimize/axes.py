"""Finds out which axes are free: from the examples' shapes on the way in, by trying other lengths on the way out."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from torchship.errors import CaptureFailed
from torchship.optimize import decisions, edges, rows
from torchship.optimize.places import Place
from torchship.optimize.rows import Call, Rows, Run, Shape
from torchship.tensors import Axis, Free

Probes: TypeAlias = list[tuple[Call, list[tuple[int, ...]]]]
UNSTEADY = "two runs on the same input differ: forward draws random numbers, or remembers earlier calls"
_OURS = re.compile(r"n\d+|rows")


@dataclass(frozen=True)
class Study:
    """What was found: shapes with free axes, whether axis 0 holds rows, the outputs of the first example.

    `moves` tells for each output which of its axes holds the rows; one that is not 0 is to be moved to the front.
    `steady`: two runs on the same input agree. `tried`: calls of other lengths, and of other values where those decide.
    `edges`: calls at the ends of what a caller may send.
    """

    inputs: tuple[Shape, ...]
    outputs: tuple[torch.Tensor, ...]
    output_shapes: tuple[Shape, ...]
    batched: bool
    moves: tuple[int, ...] = ()
    steady: bool = True
    notes: list[str] = field(default_factory=list)
    tried: list[Call] = field(default_factory=list)
    edges: list[Call] = field(default_factory=list)


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
        if len(set(seen)) > 1:
            groups.setdefault(seen, []).append(place)
    shared = [places for places in groups.values() if len(places) > 1]
    shared.sort(key=lambda places: any(axis == 0 for _, axis in places))  # the rows have no name in the end
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
    run: Run,
    calls: Sequence[Call],
    shapes: Sequence[Shape],
    *,
    names: Sequence[str],
    batched: bool | None,
    decided: Sequence[Place] = (),
) -> Study:
    """Try other batch sizes and lengths, and see which axes of the outputs follow.

    Where values decide in the user's own code (`decided`), a trial on a few rows proves nothing: rows are then only
    taken for independent when `batched` vouches for it. Raises CaptureFailed when `batched` is not to be had.
    """
    started = time.monotonic()
    outputs = run(calls[0])
    odd = rows.bounded(run, usual=time.monotonic() - started)
    steady = all(map(rows.close, outputs, run(calls[0])))
    found = _rows(odd, calls, names=names, batched=batched, decided=decided) if steady else Rows(False, False, UNSTEADY)
    if batched and not found.alone:
        raise CaptureFailed(f"axis 0 is no batch axis: {found.reason}")
    notes = [found.reason] if found.reason else []
    alone = found.alone and batched is not False
    if alone and any(found.moves):
        run, odd = rows.moved(run, found.moves), rows.moved(odd, found.moves)
        outputs = run(calls[0])
        notes += [
            f"output {i}: its batch axis {axis} was moved to the front" for i, axis in enumerate(found.moves) if axis
        ]
    if alone:
        shapes = [(_row(shape[0]), *shape[1:]) for shape in shapes]
    elif (found.follow or (decided and found.runs)) and not any(found.moves) and batched is None:
        shapes = [_following(shape) for shape in shapes]
    shapes = _named(shapes, rows=alone)
    symbols = _symbols(shapes, rows=alone)
    probes = [(call, [tuple(out.shape) for out in run(call)]) for call in calls]
    lengths = edges.Lengths(run, calls, shapes, symbols, batched=alone)
    for name in lengths.symbols:
        probes += _probe(lengths, name)
    probes += _others(odd, calls[0], notes) if decided else []
    notes = list(dict.fromkeys(notes))
    first = shapes[0][0] if alone else None
    ends = tuple(_output_shape(i, outputs[i].dim(), probes, symbols=symbols, rows=first) for i in range(len(outputs)))
    moves = found.moves if alone else ()
    tried = [call for call, _ in probes[len(calls) :]]
    shapes, beyond = _edges(lengths, shapes, names=names, notes=notes)
    beyond += edges.values(odd, calls[0], names=names)
    inputs = tuple(_unnamed(shapes, ends))
    return Study(inputs, outputs, tuple(_unnamed(ends, shapes)), alone, moves, steady, notes, tried, beyond)


def _edges(
    lengths: edges.Lengths, shapes: Sequence[Shape], *, names: Sequence[str], notes: list[str]
) -> tuple[list[Shape], list[Call]]:
    """The shapes within the bounds that the module has of its own, and calls at the edge of what may be sent."""
    bounds: dict[str, tuple[int, int | None]] = {}
    made = [list(shape) for shape in shapes]
    for symbol, places in lengths.symbols.items():
        i, position = places[0]
        told = f"axis {position} of {names[i]!r}" if symbol.startswith("?") or _OURS.fullmatch(symbol) else symbol
        least, most = bounds[symbol] = lengths.bounds(symbol)
        axis = lengths.axes[symbol]
        if any(not tensor.is_floating_point() for tensor in lengths.call):
            least = axis.min  # too short for the values that the example has, perhaps
        if (least, most) == (max(axis.min, 1), axis.max):
            continue
        notes.append(f"{told} is {least}..{most or ''}: the module refuses other lengths")
        for j, p in places:
            made[j][p] = Free(least, most, axis.name)
    return [tuple(shape) for shape in made], lengths.ends(bounds)


def _rows(
    run: Run, calls: Sequence[Call], *, names: Sequence[str], batched: bool | None, decided: Sequence[Place]
) -> Rows:
    """What trying says about the rows, and what forward's own decisions say against it, unless the caller vouches."""
    if batched is False:
        return Rows(False, False)
    found = rows.look(run, calls[0], names=names)
    uneven = next((i for i, call in enumerate(calls) if len({t.shape[0] for t in call if t.dim()}) > 1), None)
    if uneven is not None and found.follow:
        return Rows(False, False, f"not batched: the inputs of example {uneven} differ in the length of axis 0")
    own = decisions.own(decided)
    if not own:
        return found
    where = "; ".join(f"{place}: {place.code}" for place in own[:3])
    if not found.alone:
        return replace(found, reason=f"{found.reason} (values decide in forward: {where})")
    if batched:
        return replace(found, reason=f"batched as told, though values decide in forward: {where}")
    reason = f"not batched: values decide in forward, so rows could change one another: {where} (batched=True vouches)"
    return replace(found, alone=False, reason=reason)


def _row(axis: Axis) -> Axis:
    """The batch axis: all inputs have it, so a name of ours says nothing."""
    if not isinstance(axis, Free):
        return Free()
    return Free(axis.min, axis.max) if _OURS.fullmatch(axis.name) else axis


def _following(shape: Shape) -> Shape:
    """Any number of rows, but those of one call belong together."""
    axis = shape[0]
    return (Free(axis.min, axis.max, "rows") if isinstance(axis, Free) else Free(name="rows"), *shape[1:])


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


def _symbols(shapes: Sequence[Shape], *, rows: bool) -> dict[str, list[tuple[int, int]]]:
    """The free axes but the rows: places by their name, an unnamed one by itself."""
    found: dict[str, list[tuple[int, int]]] = {}
    for i, shape in enumerate(shapes):
        for position, axis in enumerate(shape):
            if isinstance(axis, Free) and not (rows and position == 0):
                found.setdefault(axis.name or f"?{i}.{position}", []).append((i, position))
    return found


def _probe(lengths: edges.Lengths, name: str) -> Probes:
    """Run with other lengths of one free axis; a length that the module refuses is no evidence."""
    now, axis = lengths.now[name], lengths.axes[name]
    for wanted in (now + 1, now * 2, now - 1, now + 32, now // 2):
        if wanted < max(axis.min, 1) or wanted == now or (axis.max is not None and wanted > axis.max):
            continue
        other = lengths.resized({name: wanted})
        try:
            return [(other, [tuple(out.shape) for out in lengths.run(other)])]
        except CaptureFailed:
            raise
        except Exception:  # noqa: S112  # strides and windows allow only some lengths
            continue
    return []


def _others(run: Run, call: Call, notes: list[str]) -> Probes:
    """The outputs' shapes for other values; a note on outputs that come and go with them."""
    found: Probes = []
    for other in rows.other_values(call):
        try:
            found.append((other, [tuple(out.shape) for out in run(other)]))
        except CaptureFailed as fault:
            notes.append(f"{fault}: only the first are kept")
        except Exception:  # noqa: S112  # a module may refuse values that it was not made for
            continue
    return found


def _output_shape(
    index: int,
    rank: int,
    probes: Probes,
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
