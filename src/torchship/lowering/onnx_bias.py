"""Bias correction: takes the mean shift that rounding the weights causes out of each layer's bias.

Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721, section 4.2: E[Wq x] - E[W x] = (Wq - W) E[x], with E[x] measured here on the calibration data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_LAYERS = ("Conv", "Gemm", "MatMul")


def inputs_of_layers(graph: Any, *, skip: Collection[str] = ()) -> dict[str, int]:
    """The tensors whose channel means are needed, with their channel axis; nodes named in `skip` stay in float."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    return {
        node.input[0]: 1 if node.op_type == "Conv" else -1
        for node in graph.graph.node
        if node.op_type in _LAYERS and node.name not in skip
        if node.input[1] in weights and node.input[0] not in weights
    }


def correct(graph: Any, means: dict[str, Array], *, skip: Collection[str] = (), per_channel: bool = True) -> None:
    """Change the biases of the layers of `graph` whose input's mean is known, in place.

    `per_channel`: whether each output channel of a weight has a scale of its own. A MatMul's bias is the constant that
    alone is added to it; one without is left as it is.
    """
    import onnx

    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    uses = Counter(name for node in graph.graph.node for name in node.input)
    for index, node in enumerate(graph.graph.node):
        mean = means.get(node.input[0]) if node.op_type in _LAYERS and node.name not in skip else None
        if mean is None or node.input[1] not in tensors:
            continue
        shift = _shift(node, onnx.numpy_helper.to_array(tensors[node.input[1]]), mean, per_channel)
        holder, position = _place_of_bias(graph, node, tensors, uses)
        if shift is None or holder is None:
            continue
        name = holder.input[position] if position < len(holder.input) else ""
        before = onnx.numpy_helper.to_array(tensors[name]) if name else np.zeros_like(shift)
        fresh = f"{name or node.name}_corrected_{index}"
        graph.graph.initializer.append(onnx.numpy_helper.from_array((before - shift).astype(np.float32), fresh))
        if not name:
            holder.input.append(fresh)
            continue
        holder.input[position] = fresh
        if uses[name] == 1:
            graph.graph.initializer.remove(tensors[name])


def _place_of_bias(graph: Any, node: Any, tensors: Mapping[str, Any], uses: Counter[str]) -> tuple[Any, int]:
    """The node that adds a layer's bias, and at which input; no node where the bias is no constant of one axis."""
    if node.op_type != "MatMul":
        given = node.input[2] if len(node.input) > 2 else ""
        return (None, 0) if given and given not in tensors else (node, 2)
    made = node.output[0]
    after = next((other for other in graph.graph.node if made in other.input), None)
    if after is None or after.op_type != "Add" or uses[made] != 1:
        return None, 0
    position = 1 - list(after.input).index(made)
    bias = tensors.get(after.input[position])
    return (after, position) if bias is not None and len(bias.dims) == 1 else (None, 0)


def _shift(node: Any, weight: Array, mean: Array, per_channel: bool) -> Array | None:
    """Mean change of each output channel; None where the shapes are not those of a plain layer."""
    attributes = {entry.name: entry for entry in node.attribute}
    if node.op_type != "Conv":
        if weight.ndim != 2 or ("transA" in attributes and attributes["transA"].i):
            return None
        matrix = weight if "transB" in attributes and attributes["transB"].i else weight.T
        change = rounding_of(matrix, per_channel=per_channel)
        return change @ mean if change.shape[1] == mean.size else None
    groups = attributes["group"].i if "group" in attributes else 1
    change = rounding_of(weight, per_channel=per_channel).reshape(weight.shape[0], weight.shape[1], -1).sum(axis=2)
    if change.shape[1] * groups != mean.size:
        return None
    per_group = np.repeat(mean.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return np.asarray((change * per_group).sum(axis=1))


def rounding_of(weight: Array, *, per_channel: bool = True) -> Array:
    """What symmetric int8, with a scale for each output channel (axis 0) or one for all, adds to `weight`."""
    flat = weight.reshape(weight.shape[0], -1).astype(np.float64)
    peak = np.abs(flat).max(axis=1, keepdims=True) if per_channel else np.abs(flat).max()
    scale = np.maximum(peak, 1e-12) / 127
    return np.asarray((np.clip(np.rint(flat / scale), -127, 127) * scale - flat).reshape(weight.shape))
