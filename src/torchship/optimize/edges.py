"""Inputs at the edge of what a caller may send: both ends of every free axis, odd lengths, values at a type's limits.

A model's own examples rarely show them; candidates are judged on them, and never fitted to them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from torchship.errors import CaptureFailed
from torchship.optimize import rows
from torchship.optimize.rows import Call, Run, Shape
from torchship.tensors import Free

Places: TypeAlias = Sequence[tuple[int, int]]
Symbols: TypeAlias = Mapping[str, Places]
_PATIENCE = 4.0  # seconds that one run may be expected to take
_MOST = 1 << 24  # numbers in all inputs of one call
_STEP, _FARTHEST = 4, 256  # an unbounded axis is tried in steps of 4 times, up to 256 times the example's


class Lengths:
    """Tries a module on other lengths of its free axes, within patience.

    `batched`: axis 0 holds rows, and is no free axis here. Axes that differ by the same number in all of the caller's
    examples, as a mask is one longer than the tokens before, are tied and go together.
    """

    def __init__(
        self, run: Run, calls: Sequence[Call], shapes: Sequence[Shape], symbols: Symbols, *, batched: bool
    ) -> None:
        self.run, self.batched, self.call = run, batched, calls[0]
        call, self.places = calls[0], symbols
        seen = {name: [c[i].shape[p] for c in calls] for name, ((i, p), *_) in symbols.items()}
        self.tied: dict[str, dict[str, int]] = {}  # to each free axis those that go with it, and how much longer
        for name, own in seen.items():
            first = next((other for other in self.tied if _apart(own, seen[other]) is not None), "")
            if first:
                self.tied[first][name] = _apart(own, seen[first]) or 0
            else:
                self.tied[name] = {}
        self.symbols = {name: symbols[name] for name in self.tied}
        self.axes = {name: _axis(shapes, places) for name, places in symbols.items()}
        self.now = {name: call[places[0][0]].shape[places[0][1]] for name, places in symbols.items()}
        self._slowest: dict[str, float] = {}

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
                other = _following(other, self.now[name], length)
            found.append(other)
        return found

    def accepts(self, name: str, length: int) -> bool:
        """Whether the module runs with this length of an axis; a run that would take too long is not tried."""
        known = self._slowest.get(name, 0.0)
        call = self.resized({name: length}, count=1)
        if known > _PATIENCE or sum(tensor.numel() for tensor in call) > _MOST:
            raise TimeoutError
        started = time.monotonic()
        if not _runs(self.run, call):
            return False
        self._slowest[name] = (time.monotonic() - started) * _STEP**2  # attention takes the square
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
            return (least, most) if most == 1 or self.accepts(name, most - 1) else (least, axis.max)
        except TimeoutError:
            return least, axis.max

    def _last(self, name: str, good: int, bad: int) -> int:
        """The last length on the way from one that is taken to one that is refused."""
        while abs(bad - good) > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if self.accepts(name, middle) else (good, middle)
        return good

    def ends(self, bounds: Mapping[str, tuple[int, int | None]]) -> list[Call]:
        """Calls at the low end, at the high end, and odd lengths between: all axes at once, else each by itself."""
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
        return found

    def _tried(self, lengths: Mapping[str, int], count: int) -> Call | None:
        call = self.resized(lengths, count=count)
        scale = max((length / self.now[name] for name, length in lengths.items()), default=1.0)
        if sum(tensor.numel() for tensor in call) > _MOST or (scale > _STEP and self._too_slow(lengths)):
            return None
        return call if _runs(self.run, call) else None

    def _too_slow(self, lengths: Mapping[str, int]) -> bool:
        return any(self._slowest.get(name, 0.0) > _PATIENCE * _STEP**2 for name in lengths)


def _apart(one: Sequence[int], other: Sequence[int]) -> int | None:
    """By how much one axis is longer than another, where that is the same in several different examples."""
    found = {a - b for a, b in zip(one, other, strict=True)}
    return found.pop() if len(found) == 1 and len(set(one)) > 1 else None


def _axis(shapes: Sequence[Shape], places: Places) -> Free:
    axis = shapes[places[0][0]][places[0][1]]
    assert isinstance(axis, Free)  # noqa: S101  # only free axes are symbols
    return axis


def _following(tensor: torch.Tensor, old: int, new: int) -> torch.Tensor:
    """An integer input that reaches exactly as far as an axis is long holds lengths of it."""
    if tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel() or int(tensor.max()) != old:
        return tensor
    return torch.where(tensor == old, torch.full_like(tensor, new), tensor.clamp(max=new))


def _runs(run: Run, call: Call, *, values: bool = False) -> bool:
    """Whether the module answers with numbers: what it answers NaN to proves nothing, nor infinity to odd `values`."""
    try:
        answers = run(call)
        return not any(bool((torch.isnan(out) if not values else ~torch.isfinite(out)).any()) for out in answers)
    except CaptureFailed:
        if values:
            return False
        raise
    except Exception:  # strides, windows and tables allow only some lengths and values
        return False


def values(run: Run, call: Call, *, names: Sequence[str]) -> list[Call]:
    """Calls with values that narrower types lose, where the module answers them with finite numbers.

    64-bit integers beyond 2^31, where the answer depends on them (hashes, times); double precision far from zero; NaN
    and infinity, which some models take for missing values.
    """
    found: list[Call] = []
    masks = [i for i, name in enumerate(names) if "mask" in name.lower()]
    wide = [i for i, t in enumerate(call) if t.dtype in (torch.int64, torch.uint64) and i not in masks]
    first, second, negative = (_changed(call, wide, change) for change in (_wide(1), _wide(7), _wide(-3)))
    taken = wide and _runs(run, first, values=True) and _runs(run, second, values=True)
    if taken and not all(map(rows.close, run(first), run(second))):
        found += [call for call in (first, negative) if _runs(run, call, values=True)]
    double = [i for i, t in enumerate(call) if t.dtype == torch.float64]
    floats = [i for i, t in enumerate(call) if t.is_floating_point() and t.numel()]
    for places, change in ((double, _far), (floats, _missing(float("nan"))), (floats, _missing(float("inf")))):
        other = _changed(call, places, change)
        found += [other] if places and _runs(run, other, values=True) else []
    return found


def _changed(call: Call, places: Sequence[int], change: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    return [change(tensor) if i in places else tensor for i, tensor in enumerate(call)]


def _wide(seed: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Integers between 2^33 and 2^62, by a multiplicative sequence; negative for a negative seed."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(1, tensor.numel() + 1, dtype=torch.int64) * 2654435761 * abs(seed)
        made = (2**33 + (steps * steps) % 2**61).reshape(tensor.shape)
        return (made if seed > 0 or tensor.dtype == torch.uint64 else -made).to(tensor.dtype)

    return change


def _far(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 2.0**30


def _missing(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Every seventh number is missing."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tensor.numel()).reshape(tensor.shape) % 7 == 3
        return tensor.masked_fill(places, value)

    return change
