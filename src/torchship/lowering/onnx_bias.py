"""Bias correction: takes the mean shift that rounding the weights causes out of each layer's bias.

Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721, section 4.2: E[Wq x] - E[W x] = (Wq - W) E[x], with E[x] measured here on the calibration data.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def inputs_of_layers(graph: Any) -> dict[str, int]:
    """The tensors whose channel means are needed, with their channel axis."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    return {
        node.input[0]: 1 if node.op_type == "Conv" else -1
        for node in graph.graph.node
        if node.op_type in ("Conv", "Gemm") and node.input[1] in weights and node.input[0] not in weights
    }


def correct(graph: Any, means: dict[str, Array]) -> None:
    """Change the biases of all Conv and Gemm nodes of `graph` whose input's mean is known; in place."""
    import onnx

    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    uses = Counter(name for node in graph.graph.node for name in node.input)
    for index, node in enumerate(graph.graph.node):
        mean = means.get(node.input[0]) if node.op_type in ("Conv", "Gemm") else None
        if mean is None or node.input[1] not in tensors:
            continue
        bias_name = node.input[2] if len(node.input) > 2 else ""
        if bias_name and bias_name not in tensors:
            continue
        shift = _shift(node, onnx.numpy_helper.to_array(tensors[node.input[1]]), mean)
        if shift is None:
            continue
        before = onnx.numpy_helper.to_array(tensors[bias_name]) if bias_name else np.zeros_like(shift)
        name = f"{bias_name or node.name}_corrected_{index}"
        graph.graph.initializer.append(onnx.numpy_helper.from_array((before - shift).astype(np.float32), name))
        if bias_name:
            node.input[2] = name
            if uses[bias_name] == 1:
                graph.graph.initializer.remove(tensors[bias_name])
        else:
            node.input.append(name)


def _shift(node: Any, weight: Array, mean: Array) -> Array | None:
    """Mean change of each output channel; None where the shapes are not those of a plain layer."""
    attributes = {entry.name: entry for entry in node.attribute}
    if node.op_type == "Gemm":
        if "transA" in attributes and attributes["transA"].i:
            return None
        matrix = weight if "transB" in attributes and attributes["transB"].i else weight.T
        change = rounding_of(matrix)
        return change @ mean if change.shape[1] == mean.size else None
    groups = attributes["group"].i if "group" in attributes else 1
    change = rounding_of(weight).reshape(weight.shape[0], weight.shape[1], -1).sum(axis=2)
    if change.shape[1] * groups != mean.size:
        return None
    per_group = np.repeat(mean.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return np.asarray((change * per_group).sum(axis=1))


def rounding_of(weight: Array) -> Array:
    """What symmetric int8 per output channel (axis 0) adds to `weight`."""
    flat = weight.reshape(weight.shape[0], -1).astype(np.float64)
    scale = np.maximum(np.abs(flat).max(axis=1, keepdims=True), 1e-12) / 127
    return np.asarray((np.clip(np.rint(flat / scale), -127, 127) * scale - flat).reshape(weight.shape))
