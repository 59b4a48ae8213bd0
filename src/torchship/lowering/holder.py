"""What the tensors that a submodule gives come in: one by itself, or a flat container, taken apart and filled again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import torch


class Holder(msgspec.Struct, frozen=True):
    """What the outputs of a submodule come in: a tensor by itself (no kind), or a container, with its keys."""

    kind: str = ""
    keys: tuple[str, ...] = ()

    def fill(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The tensors as the submodule gives them."""
        if not self.kind:
            return tensors[0]
        return _KINDS[self.kind](zip(self.keys, tensors, strict=True) if self.keys else tensors)


_KINDS: dict[str, Any] = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}


def held(output: Any) -> tuple[Holder, tuple[torch.Tensor, ...]] | None:
    """An output's holder and tensors; None for anything but tensors in one flat container."""
    import torch

    kind = type(output).__name__
    if isinstance(output, torch.Tensor):
        return Holder(), (output,)
    if _KINDS.get(kind) is not type(output) or not output:
        return None
    values = tuple(output.values() if isinstance(output, dict) else output)
    keys = tuple(output) if isinstance(output, dict) else ()
    if not all(isinstance(value, torch.Tensor) for value in values) or not all(isinstance(key, str) for key in keys):
        return None
    return Holder(kind, keys), values
