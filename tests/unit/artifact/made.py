"""Tiny real artifacts for tests: one ONNX graph each, made in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from torchship.artifact import Artifact
from torchship.artifact.manifest import Provenance
from torchship.artifact.package import amend, pack
from torchship.recipe import Recipe
from torchship.tensors import Signature

WEIGHT = np.array([[1, 0], [0, 1], [2, -1]], np.float32)
PROVENANCE = Provenance("0.1.0", "2026-01-01T00:00:00+00:00", "tests:linear", "0" * 64)


def linear(folder: Path, *, name: str = "linear", labels: Sequence[str] = (), **more: Any) -> Artifact:
    """x:FP32[-1,3] @ WEIGHT -> y:FP32[-1,2]; `more` fields of its manifest."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    write_onnx(folder / "backend" / "model.onnx", nodes, inputs={"x": ["n", 3]}, outputs={"y": ["n", 2]}, w=WEIGHT)
    given = np.arange(6, dtype=np.float32).reshape(2, 3)
    packed = pack(
        folder,
        name=name,
        signature=Signature.parse("x:FP32[-1,3] -> y:FP32[-1,2]"),
        recipe=Recipe("onnxruntime"),
        provenance=PROVENANCE,
        max_batch=4,
        inputs={"x": given},
        outputs={"y": given @ WEIGHT},
        labels=labels,
    )
    return amend(folder, **more) if more else packed


def colour(folder: Path, *, labels: Sequence[str] = ("red", "green", "blue")) -> Artifact:
    """image:FP32[-1,3,8,8] -> logits:FP32[-1,3]: ten times the mean of each channel."""
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "ten"], ["logits"]),
    ]
    write_onnx(
        folder / "backend" / "model.onnx",
        nodes,
        inputs={"image": ["n", 3, 8, 8]},
        outputs={"logits": ["n", 3]},
        axes=np.array([2, 3], np.int64),
        ten=np.array(10, np.float32),
    )
    signature = Signature.parse("image:FP32[-1,3,8,8] -> logits:FP32[-1,3]")
    return pack(
        folder,
        name="colour",
        signature=signature,
        recipe=Recipe("onnxruntime"),
        provenance=PROVENANCE,
        max_batch=2,
        labels=labels,
    )


def write_onnx(
    path: Path, nodes: list[Any], *, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], **weights: Any
) -> None:
    """Write a graph of FP32 inputs and outputs."""
    sides = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "tiny", sides[0], sides[1], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
