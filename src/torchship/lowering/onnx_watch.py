"""Runs an ONNX graph on calibration data and looks at every floating-point tensor inside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchship import hardware
from torchship.lowering.ranges import Seen, kept_per_batch
from torchship.tensors import Signature, Tensors

_ROWS_AT_ONCE = 4
_FLOAT = 1  # onnx.TensorProto.FLOAT


def chunks(batches: Sequence[Tensors], *, signature: Signature) -> list[Tensors]:
    """The batches in pieces of a few rows, so that all activations at once stay small."""
    if not signature.batched:
        return list(batches)
    pieces: list[Tensors] = []
    for batch in batches:
        rows = next(iter(batch.values())).shape[0]
        pieces += [
            {name: array[start : start + _ROWS_AT_ONCE] for name, array in batch.items()}
            for start in range(0, rows, _ROWS_AT_ONCE)
        ]
    return pieces


def float_tensors(graph: Any) -> list[str]:
    """Names of all float32 tensors that nodes of `graph` make, outputs included; shapes must have been inferred."""
    made = {name for node in graph.graph.node for name in node.output if name}
    typed = (*graph.graph.value_info, *graph.graph.output)
    return [info.name for info in typed if info.name in made and info.type.tensor_type.elem_type == _FLOAT]


def unbounded(graph: Any, seen: Mapping[str, Seen]) -> tuple[set[str], list[str]]:
    """The tensors that held an infinity, as masks of attention do, and the nodes that read or make one: eight bits have
    no level for it.
    """
    import onnx

    held = {name for name, found in seen.items() if np.isinf(found.low) or np.isinf(found.high)}
    for weight in graph.graph.initializer:
        if weight.data_type == _FLOAT and np.isinf(onnx.numpy_helper.to_array(weight)).any():
            held.add(weight.name)
    return held, [node.name for node in graph.graph.node if held.intersection((*node.input, *node.output))]


def run(graph: Any, names: Sequence[str], pieces: Sequence[Tensors], *, folder: Path) -> Iterator[Mapping[str, Any]]:
    """The values of the tensors `names` for each piece of data; `folder` takes a temporary file."""
    import onnx
    import onnxruntime as ort

    tapped = onnx.ModelProto()
    tapped.CopyFrom(graph)
    given = {output.name for output in tapped.graph.output}
    tapped.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in given)
    path = folder / "tapped.onnx"
    onnx.save(tapped, str(path))
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = hardware.cores()
    session = ort.InferenceSession(str(path), sess_options=settings, providers=["CPUExecutionProvider"])
    wanted = {node.name for node in session.get_inputs()}
    for piece in pieces:
        feed = {name: array for name, array in piece.items() if name in wanted}
        yield dict(zip(names, session.run(list(names), feed), strict=True))


def observe(
    graph: Any, pieces: Sequence[Tensors], *, folder: Path, means: Mapping[str, int] = {}
) -> tuple[dict[str, Seen], dict[str, Any]]:
    """What every float tensor and float input held; and for `means` (tensor: axis) the mean along all other axes."""
    names = float_tensors(graph)
    inputs = [info.name for info in graph.graph.input if info.type.tensor_type.elem_type == _FLOAT]
    seen = {name: Seen() for name in (*inputs, *names)}
    keep = kept_per_batch(len(pieces))
    sums: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for piece, values in zip(pieces, run(graph, names, pieces, folder=folder), strict=True):
        for name, array in (*((name, piece[name]) for name in inputs), *values.items()):
            seen[name].add(array, keep=keep)
            if name in means and array.ndim > means[name] % max(array.ndim, 1):
                axis = means[name] % array.ndim
                others = tuple(i for i in range(array.ndim) if i != axis)
                sums[name] = sums.get(name, 0.0) + np.sum(array, axis=others, dtype=np.float64)
                counts[name] += array.size // max(array.shape[axis], 1)
    return seen, {name: total / max(counts[name], 1) for name, total in sums.items()}
