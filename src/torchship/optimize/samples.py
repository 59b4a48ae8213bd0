"""Example and calibration inputs: random ones made from a signature, and the user's own brought into flat tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torchship.errors import BadInput
from torchship.lowering.tree import Parts, take_apart
from torchship.model import to_numpy, to_torch
from torchship.tensors import Array, Free, Signature, Tensors, TensorSpec, dtype_name, numpy_dtype

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def as_call(example: Any) -> Call:
    """One example as arguments and keyword arguments: a dict is keywords, a tuple is arguments, a tensor is one."""
    if isinstance(example, Mapping):
        return (), {str(name): _tensors(value) for name, value in example.items()}
    if isinstance(example, tuple):
        return tuple(map(_tensors, example)), {}
    return (_tensors(example),), {}


def _tensors(value: Any) -> Any:
    """Numpy arrays become tensors, wherever they sit."""
    return pytree.tree_map(lambda leaf: to_torch(leaf) if isinstance(leaf, np.ndarray) else leaf, value)


def random_inputs(
    specs: Sequence[TensorSpec], *, rows: int = 2, free: int = 16, vocabulary: int = 2, seed: int = 0
) -> list[torch.Tensor]:
    """Random tensors that fit `specs`: normal floats, integers below `vocabulary`, ones where the name says mask.

    `rows` is the length of a free axis 0, `free` of other free axes; bounds of the axes are kept, and axes of one
    name are equally long.
    """
    source = np.random.default_rng(seed)
    lengths: dict[str, int] = {}
    found = []
    for spec in specs:
        shape = []
        for position, axis in enumerate(spec.shape):
            if isinstance(axis, Free):
                wanted = max(axis.min, rows if position == 0 else free)
                length = wanted if axis.max is None else min(wanted, axis.max)
                shape.append(lengths.setdefault(axis.name, length) if axis.name else length)
            else:
                shape.append(axis)
        found.append(_random(spec, shape, source=source, vocabulary=vocabulary))
    return found


def masked(specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """`tensors` with masks for which some places count and some do not, whichever way round they are meant.

    A quarter at the end of every second row differs from the rest; then masks of ones, and of zeros.
    """
    masks = [i for i, spec in enumerate(specs) if "mask" in spec.name.lower() and not tensors[i].is_floating_point()]
    for kept, tail in ((1, 0), (0, 1), (1, 1), (0, 0)):
        made = list(tensors)
        for i in masks:
            made[i] = torch.full_like(tensors[i], kept)
            if tensors[i].dim() > 1:
                made[i][1::2, ..., tensors[i].shape[-1] - tensors[i].shape[-1] // 4 :] = tail
        yield made
        if not masks:
            return


def _random(spec: TensorSpec, shape: list[int], *, source: np.random.Generator, vocabulary: int) -> torch.Tensor:
    if spec.dtype == "BYTES":
        raise BadInput(
            f"input {spec.name!r} is BYTES: a torch module takes numbers", hint="decode in a stage before it"
        )
    kind = numpy_dtype(spec.dtype)
    if spec.dtype in ("FP16", "BF16", "FP32", "FP64"):
        return to_torch(source.standard_normal(shape).astype(kind))
    if "mask" in spec.name.lower():
        return to_torch(np.ones(shape, kind))
    high = 256 if spec.dtype == "UINT8" else 2 if spec.dtype == "BOOL" else max(vocabulary, 2)
    return to_torch(source.integers(0, high, shape).astype(kind))


def vocabulary_of(module: torch.nn.Module) -> int:
    """The smallest embedding table's length: ids below it are safe for every table; 2 without one."""
    return vocabularies(module)[-1]


def vocabularies(module: torch.nn.Module) -> list[int]:
    """The lengths of the embedding tables, the longest first: a short one may be for something else than ids."""
    tables = (part for part in module.modules() if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag))
    return sorted({max(part.num_embeddings, 2) for part in tables}, reverse=True) or [2]


def flatten_samples(samples: Iterable[Any], *, signature: Signature, rows: int) -> list[Tensors]:
    """The user's calibration data as flat batches in the order they come, at most `rows` rows in all.

    A sample is what the model takes (tensor, array, tuple, dict by input name). A tuple or list that is longer than
    the inputs, as a data loader yields with its labels, gives its first items. A single row without its batch axis
    is given one. Raises BadInput for data that does not fit the signature.
    """
    found, left = list[Tensors](), rows
    for index, sample in enumerate(samples):
        flat = _flat(sample, signature)
        try:
            signature.check(flat)
        except BadInput as fault:
            raise BadInput(f"calibration sample {index}: {fault}", hint=fault.hint) from None
        count = rows_of(flat, signature=signature)
        over = signature.batched and count > left
        found.append({name: array[:left] for name, array in flat.items()} if over else flat)
        left -= count
        if left <= 0 or len(found) == rows:
            break
    return found


def labels_of(sample: Any, *, signature: Signature, rows: int) -> Array | None:
    """The labels that come with a sample, an integer for each of its `rows`: what follows the inputs of a pair, or
    stands beside them in a dict under "labels" or "label". None where there are none."""
    specs = signature.inputs
    if isinstance(sample, Mapping) and all(spec.name in sample for spec in specs):
        found = sample.get("labels", sample.get("label"))
    else:
        found = next(iter(_values(sample, signature)[len(specs) :]), None)
    if found is None:
        return None
    labels = np.ravel(to_numpy(found) if isinstance(found, torch.Tensor) else np.asarray(found))
    return labels.astype(np.int64) if labels.dtype.kind in "iu" and len(labels) == rows else None


def _values(sample: Any, signature: Signature) -> Sequence[Any]:
    """The arrays of a sample in the order of the inputs, and what follows them."""
    specs = signature.inputs
    if isinstance(sample, Mapping) and not all(spec.name in sample for spec in specs):
        sample = list(as_call(sample)[1].values())
    if isinstance(sample, Mapping):
        return [sample[spec.name] for spec in specs]
    parts = Parts()
    take_apart(as_call(sample)[0] if isinstance(sample, tuple) else _tensors(sample), parts)
    return [leaf.value for leaf in parts.tensors]


def _flat(sample: Any, signature: Signature) -> Tensors:
    specs, values = signature.inputs, _values(sample, signature)
    if len(values) < len(specs):
        raise BadInput(
            f"a calibration sample holds {len(values)} tensors, the model takes {len(specs)}",
            hint=f"give {', '.join(spec.name for spec in specs)}",
        )
    found: dict[str, Array] = {}
    for spec, value in zip(specs, values, strict=False):
        array = to_numpy(value) if isinstance(value, torch.Tensor) else np.asarray(value)
        array = array[None] if array.ndim == len(spec.shape) - 1 else array
        wanted = numpy_dtype(spec.dtype)
        # data sets often come as doubles; a picture as bytes is left alone: its scale is the user's to choose
        same_kind = array.dtype.kind == wanted.kind and dtype_name(array.dtype) != spec.dtype
        found[spec.name] = array.astype(wanted) if same_kind and wanted.kind in "fi" else array
    return found


def rows_of(batch: Tensors, *, signature: Signature) -> int:
    """How many rows a batch holds; 1 where the signature has none."""
    return next(iter(batch.values())).shape[0] if signature.batched else 1
