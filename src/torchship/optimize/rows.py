"""Tries a module on other rows and values: whether axis 0 holds rows that it treats each by itself, what it answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from torchship.difference import is_close
from torchship.errors import CaptureFailed
from torchship.model import to_numpy
from torchship.tensors import Axis

Shape: TypeAlias = tuple[Axis, ...]
Call: TypeAlias = Sequence[torch.Tensor]
Run: TypeAlias = Callable[[Call], tuple[torch.Tensor, ...]]
PATIENCE = 5.0  # seconds; the least that a run on values of ours may take
_SLOWER = 20  # times as long as the caller's own example


@dataclass(frozen=True)
class Rows:
    """`follow`: another number of rows runs, and every output has as many. `alone`: and none touches another.
    `runs`: it runs, whatever the outputs do.

    `moves` tells for each output which of its axes holds the rows; one that is not 0 is to be moved to the front.
    `reason` says what is against it.
    """

    follow: bool = False
    alone: bool = False
    reason: str = ""
    moves: tuple[int, ...] = ()
    runs: bool = False


def look(run: Run, call: Call, *, names: Sequence[str]) -> Rows:
    """Try another number of rows, some of them alone, and neighbours that are large, turned round or zero."""
    for name, tensor in zip(names, call, strict=True):
        if not tensor.dim():
            return Rows(reason=f"not batched: input {name!r} has no axis 0")
    lengths = {tensor.shape[0] for tensor in call}
    if len(lengths) > 1 or 0 in lengths:
        return Rows(reason=f"not batched: the inputs differ in the length of axis 0: {sorted(lengths)}")
    before = lengths.pop()
    count, words = (3, "three") if before != 3 else (4, "four")
    several = [resized(tensor, {0: count}) for tensor in call]
    try:
        joined = run(several)
    except Exception as fault:
        said = f"{type(fault).__name__}: {(str(fault).splitlines() or [''])[0][:200]}"
        return Rows(reason=f"axis 0 is fixed: {words} rows fail ({said})")
    moves = []
    for old, new in zip(run(call), joined, strict=True):  # the hidden state of a recurrent net is [layers, rows, width]
        axes = [i for i in range(min(old.dim(), new.dim())) if (old.shape[i], new.shape[i]) == (before, count)]
        moves.append(axes[0] if axes else 0)
    for index, (whole, axis) in enumerate(zip(joined, moves, strict=True)):
        if whole.dim() == 0 or whole.shape[axis] != count:
            reason = f"not batched: output {index} has shape {list(whole.shape)} for {words} rows"
            return Rows(reason=reason, runs=True)
    reason = _mixes(moved(run, moves), several)
    return Rows(True, not reason, reason, tuple(moves), runs=True)


class _Deadline(TorchFunctionMode):
    """Raises TimeoutError at the first call of torch after a moment of `time.monotonic`."""

    def __init__(self, moment: float) -> None:
        super().__init__()
        self.moment = moment

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.moment:
            raise TimeoutError("the module does not come to an end on these values")
        return func(*args, **(kwargs or {}))


def bounded(run: Run, *, usual: float) -> Run:
    """`run`, given up with TimeoutError long after the `usual` seconds: a loop that ends by values may never end.

    For values that a caller did not give: zeros, infinities, large numbers.
    """

    def ended(call: Call) -> tuple[torch.Tensor, ...]:
        with _Deadline(time.monotonic() + max(PATIENCE, _SLOWER * usual)):
            return run(call)

    return ended


def moved(run: Run, moves: Sequence[int]) -> Run:
    """`run` with one axis of each output moved to the front."""

    def changed(call: Call) -> tuple[torch.Tensor, ...]:
        return tuple(out.movedim(axis, 0) for out, axis in zip(run(call), moves, strict=True))

    return changed if any(moves) else run


def _mixes(run: Run, several: Call) -> str:
    """Which output of a row depends on the other rows; empty when none does, or when the module refuses the rows."""
    try:
        run([tensor[:1] for tensor in several])
    except Exception as fault:
        return f"not batched: one row alone fails ({type(fault).__name__})"
    # a row of the other sign leads astray whoever decides by all rows what to do with each
    turned = [torch.cat([t[:1], t[1:2] * 0.5, -3 * t[2:]]) if t.is_floating_point() else t for t in several]
    # something rare in the middle: large, large with the other sign, zero
    odd = [[torch.cat([t[:1], _rare(t, factor), t[2:]]) for t in several] for factor in (100.0, -100.0, 0.0)]
    for rows, others in ((several, odd), (turned, [])):
        try:
            alone = {i: run([tensor[i : i + 1] for tensor in rows]) for i in (0, 2)}
            together = [run(call) for call in (rows, *others)]
        except Exception:  # noqa: S112  # a module may refuse values that it was not made for
            continue
        for index, (part, whole) in enumerate(zip(alone[0], together[0], strict=True)):
            if part.dim() != whole.dim():
                return (
                    f"not batched: output {index} has shape {list(part.shape)} for one row alone, and "
                    f"{list(whole.shape)} for {len(whole)}: squeeze(-1) leaves the axis of the rows, squeeze() does not"
                )
        for index, whole in ((index, whole) for joined in together for index, whole in enumerate(joined)):
            if any(
                whole.shape[:1] != rows[0].shape[:1] or not close(part[index], whole[i : i + 1])
                for i, part in alone.items()
            ):
                return f"not batched: output {index} of a row depends on the other rows"
    return ""


def _rare(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor[1:2] * factor
    if not tensor.numel():
        return tensor[1:2]
    # a number beyond those that the example shows may lie outside of a table
    value = tensor.max() if factor > 0 else tensor.min() if factor < 0 else torch.zeros_like(tensor.min())
    return torch.full_like(tensor[1:2], value.item())


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal but for rounding, and NaN and infinite in the same places.

    The spread of a single row is NaN: that is how a model tells that it looks at the others.
    """
    return is_close(to_numpy(b), to_numpy(a), tolerance=1e-2)


def resized(tensor: torch.Tensor, lengths: Mapping[int, int]) -> torch.Tensor:
    """The tensor with other lengths of some axes, repeated from the start; integers that never fall along an axis, as
    offsets and positions do, go on with their last."""
    for position, length in lengths.items():
        index = torch.arange(length, device=tensor.device)
        whole = not tensor.is_floating_point() and tensor.dtype != torch.bool and not tensor.is_complex()
        if whole and tensor.shape[position] > 1 and bool((tensor.diff(dim=position) >= 0).all()):
            index = index.clamp(max=tensor.shape[position] - 1)
        else:
            index = index % tensor.shape[position]
        tensor = tensor.index_select(position, index)
    return tensor


def other_values(call: Call) -> Iterator[list[torch.Tensor]]:
    """Calls of the same shapes with other values: turned round, small, zero, from back to front.

    Integers and truths stay within what the example shows: all as its smallest, all as its largest.
    """
    for factor, pick in ((-2.0, torch.clone), (0.01, torch.min), (0.0, torch.max)):
        yield [t * factor if t.is_floating_point() else pick(t).expand_as(t) if t.numel() else t for t in call]
    yield [tensor.flip(tuple(range(tensor.dim()))) for tensor in call]


def answers(run: Run, call: Call, *, values: bool = False) -> bool:
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


def odd_values(run: Run, call: Call, *, names: Sequence[str]) -> list[Call]:
    """Calls with values that narrower types lose, where the module answers them with finite numbers.

    64-bit integers beyond 2^31, where the answer depends on them (hashes, times); double precision far from zero; NaN
    and infinity, which some models take for missing values: every seventh number is.
    """
    found: list[Call] = []
    masks = [i for i, name in enumerate(names) if "mask" in name.lower()]
    wide = [i for i, t in enumerate(call) if t.dtype in (torch.int64, torch.uint64) and i not in masks]
    first, second, negative = (_changed(call, wide, partial(_wide, seed)) for seed in (1, 7, -3))
    taken = wide and answers(run, first, values=True) and answers(run, second, values=True)
    if taken and not all(map(close, run(first), run(second))):
        found += [other for other in (first, negative) if answers(run, other, values=True)]
    double = [i for i, t in enumerate(call) if t.dtype == torch.float64]
    floats = [i for i, t in enumerate(call) if t.is_floating_point() and t.numel()]
    nan, infinity = (partial(_missing, float(word)) for word in ("nan", "inf"))
    for places, change in ((double, lambda tensor: tensor + 2.0**30), (floats, nan), (floats, infinity)):
        other = _changed(call, places, change)
        found += [other] if places and answers(run, other, values=True) else []
    return found


def _changed(call: Call, places: Sequence[int], change: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    return [change(tensor) if i in places else tensor for i, tensor in enumerate(call)]


def _wide(seed: int, tensor: torch.Tensor) -> torch.Tensor:
    """Integers between 2^33 and 2^62, by a multiplicative sequence; negative for a negative seed."""
    steps = torch.arange(1, tensor.numel() + 1, dtype=torch.int64) * 2654435761 * abs(seed)
    made = (2**33 + (steps * steps) % 2**61).reshape(tensor.shape)
    return (made if seed > 0 or tensor.dtype == torch.uint64 else -made).to(tensor.dtype)


def _missing(value: float, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.masked_fill(torch.arange(tensor.numel()).reshape(tensor.shape) % 7 == 3, value)
