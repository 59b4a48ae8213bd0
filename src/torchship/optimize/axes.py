"""Finds out which axes are free: from the examples' shapes on the way in, by trying other lengths on the way out.

A model's own examples rarely show both ends of a free axis, or odd lengths: candidates are judged on them, and never
fitted to them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from torchship.errors import CaptureFailed
from torchship.optimize import rows
from torchship.optimize.places import Place, is_installed
from torchship.optimize.rows import Call, Rows, Run, Shape
from torchship.tensors import Axis, Free

Probes: TypeAlias = list[tuple[Call, list[tuple[int, ...]]]]
Symbols: TypeAlias = Mapping[str, Sequence[tuple[int, int]]]  # free axes by name: number of the input, and position
_PATIENCE = 4.0  # seconds that one run may be expected to take
_MOST = 1 << 24  # numbers in all inputs of one call
_STEP, _FARTHEST = 4, 256  # an unbounded axis is tried in steps of 4 times, up to 256 times the example's
_QUICK = 0.25  # seconds of one run that every candidate can be asked for, too
UNSTEADY = "two runs on the same input differ: forward draws random numbers, or remembers earlier calls"
_OURS = re.compile(r"n\d+|rows")


@dataclass(frozen=True)
class Study:
    """What was found: shapes with free axes, whether axis 0 holds rows, the outputs of the first example.

    `moves` tells for each output which of its axes holds the rows; one that is not 0 is to be moved to the front.
    `steady`: two runs on the same input agree. `tried`: calls of other lengths, and of other values where those decide.
    `edges`: calls at the ends of what a caller may send.
    """

    inputs: Sequence[Shape]
    outputs: tuple[torch.Tensor, ...]
    output_shapes: Sequence[Shape]
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
    if len({tuple(t.dim() for t in call) for call in calls}) > 1:
        raise CaptureFailed("the examples differ in their number of axes", hint="give examples of the same rank")
    lengths = {
        (i, axis): tuple(call[i].shape[axis] for call in calls)
        for i in range(len(names))
        for axis in range(calls[0][i].dim())
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
            axis_told = Free(name=told) if isinstance(told, str) else told
            _check_seen(axis_told, lengths[i, axis], name=names[i], axis=axis)
            return axis_told
        return Free(name=named.get((i, axis), "")) if len(set(lengths[i, axis])) > 1 else lengths[i, axis][0]

    return [tuple(axis_of(i, a) for a in range(calls[0][i].dim())) for i in range(len(names))]


def _check_seen(told: Free, seen: Sequence[int], *, name: str, axis: int) -> None:
    """Raises CaptureFailed where an example is shorter or longer than the user said the axis could be."""
    for length in seen:
        if length < told.min or (told.max is not None and length > told.max):
            raise CaptureFailed(
                f"example inputs: axis {axis} of {name!r} is {length}, but it is said to be {told}",
                hint="give examples within the range, or widen it",
            )


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
    rows.answers(odd, next(rows.other_values(calls[0])), values=True)  # what is remembered of it may change the answer
    steady = all(map(rows.close, outputs, run(calls[0])))
    found = _rows(odd, calls, names=names, batched=batched, decided=decided) if steady else Rows(reason=UNSTEADY)
    if batched and not found.alone:
        raise CaptureFailed(f"axis 0 is no batch axis: {found.reason}")
    notes = [found.reason] if found.reason else []
    alone = found.alone and batched is not False
    moves = found.moves if alone else ()
    if any(moves):
        run, odd = rows.moved(run, moves), rows.moved(odd, moves)
        outputs = run(calls[0])
        notes += [f"output {i}: its batch axis {axis} was moved to the front" for i, axis in enumerate(moves) if axis]
    follows = (found.follow or (decided and found.runs)) and not any(found.moves) and batched is None
    if alone or follows:
        shapes = [(_any_number(shape[0], together=not alone), *shape[1:]) for shape in shapes]
    lengths = Lengths(run, calls, _named(shapes, rows=alone), batched=alone)
    probes = [(call, [tuple(out.shape) for out in run(call)]) for call in calls]
    for name in lengths.tied:
        probes += _probe(lengths, name)
    probes += _others(odd, calls[0], notes) if decided else []
    notes = list(dict.fromkeys(notes))
    first = lengths.shapes[0][0] if alone else None
    tried = [call for call, _ in probes[len(calls) :]]
    shapes, beyond = _edges(lengths, names=names, notes=notes)
    ranks = [out.dim() for out in outputs]  # at a length of one, some squeeze an axis away
    farther = [(call, [tuple(out.shape) for out in run(call)]) for call in beyond]
    probes += [(call, seen) for call, seen in farther if list(map(len, seen)) == ranks]
    ends = [_output_shape(i, rank, probes, places=lengths.places, rows=first) for i, rank in enumerate(ranks)]
    beyond += rows.odd_values(odd, calls[0], names=names)
    shapes, ends = _unnamed(shapes, ends)
    return Study(shapes, outputs, ends, alone, moves, steady, notes, tried, beyond)


def _rows(
    run: Run, calls: Sequence[Call], *, names: Sequence[str], batched: bool | None, decided: Sequence[Place]
) -> Rows:
    """What trying says about the rows, and what forward's own decisions say against it, unless the caller vouches."""
    if batched is False:
        return Rows()
    found = rows.look(run, calls[0], names=names)
    uneven = next((i for i, call in enumerate(calls) if len({t.shape[0] for t in call if t.dim()}) > 1), None)
    if uneven is not None and found.follow:
        return Rows(reason=f"not batched: the inputs of example {uneven} differ in the length of axis 0")
    own = [place for place in decided if not is_installed(place.file)]  # packages take short cuts that change nothing
    if not own:
        return found
    where = "; ".join(f"{place}: {place.code}" for place in own[:3])
    if not found.alone:
        return replace(found, reason=f"{found.reason} (values decide in forward: {where})")
    if batched:
        return replace(found, reason=f"batched as told, though values decide in forward: {where}")
    reason = f"not batched: values decide in forward, so rows could change one another: {where} (batched=True vouches)"
    return replace(found, alone=False, reason=reason)


def _any_number(axis: Axis, *, together: bool) -> Free:
    """An axis 0 of any length: rows that belong `together`, or the batch axis, for which a name of ours says nothing,
    for all inputs have it.
    """
    free = axis if isinstance(axis, Free) else Free()
    return Free(free.min, free.max, "rows" if together else "" if _OURS.fullmatch(free.name) else free.name)


def _named(shapes: Sequence[Shape], *, rows: bool) -> list[Shape]:
    """The shapes with a name for every free axis but the rows, so that outputs can follow it."""
    taken = {axis.name for shape in shapes for axis in shape if isinstance(axis, Free)}
    fresh = (name for name in (f"n{number}" for number in range(1, 1000)) if name not in taken)

    def named(axis: Axis, position: int) -> Axis:
        if not isinstance(axis, Free) or axis.name or (rows and position == 0):
            return axis
        return Free(axis.min, axis.max, next(fresh))

    return [tuple(named(axis, position) for position, axis in enumerate(shape)) for shape in shapes]


def _unnamed(inputs: Sequence[Shape], outputs: Sequence[Shape]) -> Iterator[list[Shape]]:
    """The shapes of inputs, and of outputs, without the names of ours that only one axis bears."""
    every = [axis.name for shape in (*inputs, *outputs) for axis in shape if isinstance(axis, Free)]

    def plain(axis: Axis) -> Axis:
        if isinstance(axis, Free) and _OURS.fullmatch(axis.name) and every.count(axis.name) < 2:
            return Free(axis.min, axis.max)
        return axis

    for shapes in (inputs, outputs):
        yield [tuple(map(plain, shape)) for shape in shapes]


def _edges(lengths: Lengths, *, names: Sequence[str], notes: list[str]) -> tuple[list[Shape], list[Call]]:
    """The shapes within the bounds that the module has of its own, and calls at the edge of what may be sent."""
    bounds: dict[str, tuple[int, int | None]] = {}
    made = [list(shape) for shape in lengths.shapes]
    for symbol in lengths.tied:
        (i, position), *_ = places = lengths.places[symbol]
        told = f"axis {position} of {names[i]!r}" if _OURS.fullmatch(symbol) else symbol
        least, most = bounds[symbol] = lengths.bounds(symbol)
        axis = lengths.axes[symbol]
        if any(not tensor.is_floating_point() for tensor in lengths.call):
            least = axis.min  # too short for the values that the example has, perhaps
        if (least, most) != (max(axis.min, 1), axis.max):
            notes.append(f"{told} is {least}..{most or ''}: the module refuses other lengths")
            for j, p in places:
                made[j][p] = Free(least, most, axis.name)
    return [tuple(shape) for shape in made], lengths.ends(bounds)


def _probe(lengths: Lengths, name: str) -> Probes:
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


def _output_shape(index: int, rank: int, probes: Probes, *, places: Symbols, rows: Axis | None) -> Shape:
    """The shape of an output: an axis that is not always as long follows the free axis that it is as long as."""
    ranks = {len(seen[index]) for _, seen in probes}
    if len(ranks) > 1:
        raise CaptureFailed(f"output {index} changes its number of axes with the input's shape: {sorted(ranks)}")
    shape: list[Axis] = []
    for position in range(rank):
        lengths = [seen[index][position] for _, seen in probes]
        same = (n for n, ((i, p), *_) in places.items() if lengths == [call[i].shape[p] for call, _ in probes])
        if rows is not None and position == 0:
            shape.append(rows)
        elif len(set(lengths)) == 1:
            shape.append(lengths[0])
        else:
            name = next(same, None)
            shape.append(Free(min=0) if name is None else Free(name=name))
    return tuple(shape)


class Lengths:
    """Tries a module on other lengths of its free axes, within patience.

    `shapes` have a name for each free axis; `batched`: axis 0 holds rows, and is no free axis here. Axes that differ by
    the same number in all of the caller's examples, as a mask is one longer than the tokens before, are `tied` and go
    together.
    """

    def __init__(self, run: Run, calls: Sequence[Call], shapes: Sequence[Shape], *, batched: bool) -> None:
        self.run, self.shapes, self.batched, self.call = run, shapes, batched, calls[0]
        self.axes: dict[str, Free] = {}
        self.places: dict[str, list[tuple[int, int]]] = {}
        for i, shape in enumerate(shapes):
            for p, axis in enumerate(shape):
                if isinstance(axis, Free) and not (batched and p == 0):
                    self.axes.setdefault(axis.name, axis)
                    self.places.setdefault(axis.name, []).append((i, p))
        seen = {name: [call[i].shape[p] for call in calls] for name, ((i, p), *_) in self.places.items()}
        self.now = {name: lengths[0] for name, lengths in seen.items()}
        self._longest = {name: max(lengths) for name, lengths in seen.items()}
        self.tied: dict[str, dict[str, int]] = {}  # to each free axis those that go with it, and how much longer
        for name, own in seen.items():
            longer = {other: {a - b for a, b in zip(own, seen[other], strict=True)} for other in self.tied}
            first = next((other for other, more in longer.items() if len(more) == 1 and len(set(own)) > 1), None)
            if first is None:
                self.tied[name] = {}
            else:
                self.tied[first][name] = longer[first].pop()
        self._slowest: dict[str, float] = {}
        self._farthest: dict[str, int] = {}  # the longest that was answered quickly

    def resized(self, lengths: Mapping[str, int], *, count: int = 0) -> Call:
        """The first example with other lengths, and `count` rows; integers that stood for a length follow it."""
        found = []
        lengths = dict(lengths)
        for name, length in tuple(lengths.items()):
            lengths |= {other: length + more for other, more in self.tied[name].items()}
        for i, tensor in enumerate(self.call):
            wanted = {p: max(length, 1) for name, length in lengths.items() for j, p in self.places[name] if j == i}
            if self.batched and count:
                wanted[0] = count
            other = rows.resized(tensor, wanted)
            for name, length in lengths.items():
                old = self.now[name]
                whole = not tensor.is_floating_point() and tensor.dtype != torch.bool and bool(other.numel())
                if whole and int(other.max()) == old:  # what reaches exactly as far as an axis is long holds lengths
                    other = torch.where(other == old, torch.full_like(other, length), other.clamp(max=length))
            found.append(other)
        return found

    def accepts(self, name: str, length: int) -> bool:
        """Whether the module runs with this length of an axis; a run that would take too long is not tried."""
        known = self._slowest.get(name, 0.0)
        call = self.resized({name: length}, count=1)
        if known > _PATIENCE or sum(tensor.numel() for tensor in call) > _MOST:
            raise TimeoutError
        started = time.monotonic()
        if not rows.answers(self.run, call):
            return False
        took = time.monotonic() - started
        self._slowest[name] = took * _STEP**2  # attention takes the square
        if took < _QUICK:
            self._farthest[name] = max(length, self._farthest.get(name, 0))
        return True

    def bounds(self, name: str) -> tuple[int, int | None]:
        """The shortest and the longest length that the module takes, as far as was tried; None: no end was seen."""
        axis, now = self.axes[name], self.now[name]
        least = max(axis.min, 1)
        try:
            least = least if self.accepts(name, least) else self._last(name, now, least)
            top, refused = now, 0
            farthest = axis.max or now * _FARTHEST
            while top < farthest:
                after = min(top * _STEP, farthest)
                if not self.accepts(name, after):
                    refused = after
                    break
                top = after
            if not refused:
                return least, axis.max
            most = self._last(name, top, refused)
            # what the caller's own example exceeds was refused for its values, not for its length
            believed = most >= self._longest[name] and (most == 1 or self.accepts(name, most - 1))
            return (least, most) if believed else (least, axis.max)
        except TimeoutError:
            return least, axis.max

    def _last(self, name: str, good: int, bad: int) -> int:
        """The last length on the way from one that is taken to one that is refused."""
        while abs(bad - good) > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self.accepts(name, middle) else (good, middle)
        return good

    def ends(self, bounds: Mapping[str, tuple[int, int | None]]) -> list[Call]:
        """Calls at the low end, at the high end, and odd lengths between: all axes at once, else each by itself.

        Where an axis has no end, one row as long as the module answers quickly: forward may cut what is longer than
        this or that, or go another way there.
        """
        if not bounds:
            return []
        low = {name: least if most else max(least, self.now[name] // 8) for name, (least, most) in bounds.items()}
        high = {name: most or self.now[name] * _STEP for name, (_, most) in bounds.items()}
        odd = {
            name: min(high[name], (low[name] + (high[name] - low[name]) // (3 + number)) | 1)
            for number, name in enumerate(bounds)
        }
        found: list[Call] = []
        for lengths, count in ((low, 2), (odd, 3), (high, 1)):
            whole = self._tried(lengths, count)
            parts = [self._tried({name: length}, count) for name, length in lengths.items()] if whole is None else []
            found += [call for call in (whole, *parts) if call is not None]
        for name, (_, most) in bounds.items():
            told = self.axes[name].min  # what was only found by trying is no promise, and exporters round it up
            more = {told if told > 1 else 0, self._farthest.get(name, 0)} if most is None else set()
            others = (self._tried({name: length}, 1) for length in sorted(more - {0, low[name], high[name]}))
            found += [call for call in others if call is not None]
        return found

    def _tried(self, lengths: Mapping[str, int], count: int) -> Call | None:
        call = self.resized(lengths, count=count)
        scale = max((length / self.now[name] for name, length in lengths.items()), default=1.0)
        slow = any(self._slowest.get(name, 0.0) > _PATIENCE * _STEP**2 for name in lengths)
        if sum(tensor.numel() for tensor in call) > _MOST or (scale > _STEP and slow):
            return None
        return call if rows.answers(self.run, call) else None
