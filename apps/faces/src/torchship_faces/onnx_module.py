"""An ONNX file as an nn.Module, so that the search can optimize a model that comes without its Python source.

Covers the operators of convolutional networks. A batch axis that the file fixed to 1 is freed; what the file computes
about shapes is computed with plain integers, so that `torch.export` sees no data-dependent shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as fn
from torch import Tensor, nn

from torchship.errors import Unsupported


class OnnxModule(nn.Module):
    """Runs the nodes of an ONNX graph one after another; takes and gives tensors in the order of the file."""

    def __init__(self, path: str | Path) -> None:
        """Raises Unsupported naming the first operator that is not covered."""
        super().__init__()
        import onnx
        from onnx import numpy_helper

        graph = onnx.load(str(path)).graph
        unknown = {node.op_type for node in graph.node} - set(_OPERATORS)
        if unknown:
            raise Unsupported(f"{path} uses {', '.join(sorted(unknown))}", hint="serve the file with onnxruntime as is")
        self._host: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        for tensor in graph.initializer:
            self._store(tensor.name, numpy_helper.to_array(tensor))
        self._steps = []
        for node in graph.node:
            attributes = {a.name: _plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}
            if node.op_type == "Constant":
                self._store(node.output[0], np.asarray(attributes["value"]))
            else:
                self._steps.append((node.op_type, list(node.input), node.output[0], attributes))
        self._inputs = [value.name for value in graph.input if value.name not in self._stored]
        self._outputs = [value.name for value in graph.output]

    def _store(self, name: str, value: np.ndarray[Any, Any]) -> None:
        if value.dtype == np.int64:
            self._host[name] = value.tolist()
            return
        self._stored[name] = f"weight_{len(self._stored)}"
        tensor = torch.from_numpy(_flushed(value))
        self.register_parameter(self._stored[name], nn.Parameter(tensor, requires_grad=False))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the graph."""
        values: dict[str, Any] = dict(self._host)
        values.update({name: getattr(self, attribute) for name, attribute in self._stored.items()})
        values.update(zip(self._inputs, tensors, strict=True))
        values[""] = None
        for operator, inputs, output, attributes in self._steps:
            values[output] = _OPERATORS[operator]([values[name] for name in inputs], attributes)
        return tuple(values[name] for name in self._outputs)


def _flushed(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy without the numbers that weight decay left next to zero: their products are denormal, and a processor
    takes a hundred cycles for each (a face embedder ran 9 times faster, with the same outputs to the last bit)."""
    flushed: np.ndarray[Any, Any] = np.array(value)
    if flushed.dtype.kind == "f" and flushed.size:
        sizes = np.abs(flushed)
        flushed[sizes < 1e-12 * sizes.max()] = 0
    return flushed


def _plain(value: Any) -> Any:
    if hasattr(value, "dims"):
        from onnx import numpy_helper

        return numpy_helper.to_array(value)
    return value.decode() if isinstance(value, bytes) else value


def _conv(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Tensor:
    x, weight, *bias = inputs
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right):
        x, top, left = fn.pad(x, (left, right, top, bottom)), 0, 0
    stride, dilation = attributes.get("strides", (1, 1)), attributes.get("dilations", (1, 1))
    groups = attributes.get("group", 1)
    return fn.conv2d(x, weight, bias[0] if bias else None, tuple(stride), (top, left), tuple(dilation), groups)


def _resize(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Tensor:
    if attributes.get("mode") != "nearest" or attributes.get("coordinate_transformation_mode") != "asymmetric":
        raise Unsupported(f"Resize {dict(attributes)}")
    return fn.interpolate(inputs[0], size=inputs[3][2:], mode="nearest")


def _reshape(inputs: Sequence[Any], _: Mapping[str, Any]) -> Tensor:
    x: Tensor
    x, shape = inputs
    rows = x.shape[0]
    return x.reshape([rows, *shape[1:]] if shape[0] in (0, 1) else shape)


def _gather(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    if not isinstance(inputs[0], list):
        raise Unsupported("Gather on tensors")
    return inputs[0][inputs[1]]


def _concat(inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    if isinstance(inputs[0], Tensor):
        return torch.cat(list(inputs), attributes["axis"])
    return [length for part in inputs for length in part]


_OPERATORS: dict[str, Callable[[Sequence[Any], Mapping[str, Any]], Any]] = {
    "Add": lambda i, _: i[0] + i[1],
    "Cast": lambda i, _: i[0],  # only shapes are cast in the files that we read
    "Concat": _concat,
    "Constant": lambda i, _: None,
    "Conv": _conv,
    "Flatten": lambda i, a: i[0].flatten(a.get("axis", 1)),
    "Gather": _gather,
    "GlobalAveragePool": lambda i, _: i[0].mean((2, 3), keepdim=True),
    "Identity": lambda i, _: i[0],
    "LeakyRelu": lambda i, a: fn.leaky_relu(i[0], a.get("alpha", 0.01)),
    "Mul": lambda i, _: i[0] * i[1],
    "PRelu": lambda i, _: fn.prelu(i[0], i[1].flatten()),
    "Relu": lambda i, _: fn.relu(i[0]),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda i, _: list(i[0].shape),
    "Sigmoid": lambda i, _: torch.sigmoid(i[0]),
    "Slice": lambda i, _: i[0][i[1][0] : i[2][0]],
    "Softmax": lambda i, a: torch.softmax(i[0], a.get("axis", -1)),
    "Transpose": lambda i, a: i[0].permute(a["perm"]),
    "Unsqueeze": lambda i, _: [i[0]],
}
