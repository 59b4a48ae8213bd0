"""The Model: a captured nn.Module that takes and gives flat tensors in the order of its Signature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torchship.tensors import Array, Free, Signature, Tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shelf:
    """A folder for what was exported of `module`: the trials of one search use it again."""

    folder: Path
    module: torch.nn.Module


@dataclass(frozen=True, kw_only=True)
class Model:
    """`module(*inputs)` takes torch tensors in the order of `signature.inputs` and returns a tuple in the order of
    `signature.outputs`: keyword arguments, dicts and nested outputs were flattened by capture; the user's own module
    is `module.inner`. `examples` holds sample inputs (the first has two rows or more where the signature is batched),
    `calibration` real data for quantizers, in batches, `edges` inputs at the ends of what a caller may send: a
    candidate is judged on them, and never fitted to them.
    """

    module: torch.nn.Module
    signature: Signature
    examples: Sequence[Tensors]
    calibration: Sequence[Tensors] = field(default=())
    edges: Sequence[Tensors] = field(default=())
    name: str = "model"
    shelf: Shelf | None = None

    def kept(self, name: str) -> Path | None:
        """Where an export called `name` lies or belongs; None for a module that is not the shelf's own any more."""
        return self.shelf.folder / name if self.shelf and self.shelf.module is self.module else None

    def torch_inputs(self, tensors: Tensors, *, device: str = "cpu") -> tuple[torch.Tensor, ...]:
        """`tensors` as torch tensors in the order of the signature."""
        return tuple(to_torch(tensors[spec.name]).to(device) for spec in self.signature.inputs)

    def dynamic_shapes(
        self, *, ceiling: int | None = None, limits: Mapping[str, tuple[int, int | None]] = {}
    ) -> tuple[dict[int, object], ...]:
        """What `torch.export` and `torch.onnx.export` want: a Dim for every free axis.

        Axis 0 of a batched signature is one Dim over all inputs; axes of one name are one Dim.
        `ceiling` bounds axes without a maximum; `limits` are bounds of single Dims, by their names.
        """
        from torch.export import Dim

        dims: dict[str, object] = {}

        def dim(position: int, axis: Free, tensor: str) -> object:
            shared = "rows" if position == 0 and self.signature.batched else axis.name
            name = shared or f"{tensor}_{position}".replace(".", "_").replace("-", "_")
            least, most = limits.get(name, (1, None))
            return dims.setdefault(name, Dim(name, min=max(axis.min, least), max=most or axis.max or ceiling))

        return tuple(
            {i: dim(i, axis, spec.name) for i, axis in enumerate(spec.shape) if isinstance(axis, Free)}
            for spec in self.signature.inputs
        )


def to_torch(array: object) -> torch.Tensor:
    """A numpy array as a torch tensor (BF16 by its bits, the others without a copy where they are writable)."""
    import numpy as np
    import torch

    data = np.asarray(array, order="C")  # np.ascontiguousarray would give a scalar an axis
    if data.dtype.name == "bfloat16":
        return torch.from_numpy(data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(data if data.flags.writeable else data.copy())


def to_numpy(tensor: torch.Tensor) -> Array:
    """A torch tensor as a numpy array on the host (BF16 as `ml_dtypes.bfloat16`)."""
    import torch

    host = tensor.detach().cpu().contiguous()
    if host.dtype == torch.bfloat16:
        import ml_dtypes

        return host.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return host.resolve_conj().resolve_neg().numpy()
