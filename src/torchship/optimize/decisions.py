"""Watches one forward for places where values decide: a branch on a tensor, a number taken out, a length by a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchship.optimize.places import Place, place_now

_LEAVES = ("numpy", "tolist", "__array__")  # they read the memory past the dispatcher
_SHOWN = ("__format__", "__repr__")  # printing decides nothing
_UNTAGGED = ("aten._pack_padded_sequence", "torchvision.nms")


def decisions(
    run: Callable[[Sequence[torch.Tensor]], object], tensors: Sequence[torch.Tensor], *, outside: Place | None = None
) -> list[Place]:
    """The lines where `run(tensors)` lets a value that stems from `tensors` decide what runs or how long a result is.

    The innermost line that is not torch's own. A value that only picks between finished results (torch.where) decides
    nothing, and an assertion neither. What the run raises is swallowed: the lines up to there are the answer.
    `outside` stands for what runs without a line of Python.
    """
    watch = _Watch(outside)
    given = [tensor.clone() for tensor in tensors]
    watch.mark(given)
    try:
        with torch.no_grad(), _Leaving(watch), _Deciding(watch):
            run(given)
    except Exception:  # noqa: S110  # higher-order operators do not run under a mode; a trial says the rest
        pass
    return [place for place in watch.places if not place.code.startswith("assert")]


def drawn(run: Callable[[Sequence[torch.Tensor]], object], tensors: Sequence[torch.Tensor]) -> list[Place]:
    """The lines where `run(tensors)` draws random numbers, as `decisions` finds those where values decide."""
    seen = _Drawing()
    try:
        with torch.no_grad(), seen:
            run([tensor.clone() for tensor in tensors])
    except Exception:  # noqa: S110  # as above
        pass
    return seen.places


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that takes numbers from a generator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: list[Place] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = place_now() if torch.Tag.nondeterministic_seeded in func.tags else None
        if place is not None and place not in self.places:
            self.places.append(place)
        return func(*args, **(kwargs or {}))


class _Watch:
    """Which storages hold values that stem from the inputs, and where such a value decided."""

    def __init__(self, outside: Place | None) -> None:
        self.places: list[Place] = []
        self.outside = outside
        self.paused = False
        self._marked: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being used again

    def mark(self, value: object) -> None:
        """The tensors in `value` hold such values."""
        for storage in _storages(value):
            found = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._marked.setdefault(found.cdata, found)

    def holds(self, value: object) -> bool:
        """Whether a tensor in `value` holds such values."""
        return any(storage._cdata in self._marked for storage in _storages(value))

    def decided(self) -> None:
        """Note the line that runs now."""
        if not self.paused and (place := place_now() or self.outside) is not None and place not in self.places:
            self.places.append(place)


class _Deciding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        answer = func(*args, **(kwargs or {}))
        if self.watch.holds(given):
            if _decides(func, args):
                self.watch.decided()
            self.watch.mark((answer, given) if func._schema.is_mutable else answer)
        return answer


class _Leaving(TorchFunctionMode):
    """Sees the calls that never reach an operator."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LEAVES and self.watch.holds(args):
            self.watch.decided()
        if func is torch.cond and len(args) >= 3:  # no mode can be active where it compiles its branches
            if self.watch.holds(args[0]):
                self.watch.decided()
            return (args[1] if args[0] else args[2])(*(args[3] if len(args) > 3 else ()))
        if name not in _SHOWN and not _checks(name, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        self.watch.paused, before = True, self.watch.paused
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.watch.paused = before


def _checks(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call looks at values only to refuse some, as `one_hot` does once it is told the number of classes."""
    return name == "one_hot" and (args[1] if len(args) > 1 else kwargs.get("num_classes", -1)) != -1


def _decides(func: Any, args: Sequence[Any]) -> bool:
    if torch.Tag.data_dependent_output in func.tags or str(func).startswith(_UNTAGGED):
        return True
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if str(func).startswith("aten.index."):  # picks by position, or by a mask
        return any(part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1])
    return True


def _storages(value: object) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_nested:
            yield leaf.untyped_storage()
