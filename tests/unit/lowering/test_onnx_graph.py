"""ONNX files: named as the signature is, and exported once for all trials of a search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from torchship.lowering import onnx_graph, variants
from torchship.model import Shelf
from torchship.optimize.capture import capture
from torchship.tensors import TensorSpec


class Clash(torch.nn.Module):
    """Its output and its input are named like operators inside."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 4)

    def forward(self, add: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.table(add + 1).sum(1) + 1, "relu": self.table(add).relu()}


def test_names_inside_make_way(tmp_path: Path) -> None:
    module = Clash().eval()
    model = capture(module, [TensorSpec.parse("add:INT64[-1,3]")])
    onnx_graph.write(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_inputs()] == ["add"]
    assert [node.name for node in session.get_outputs()] == ["embedding", "relu"]
    ids = np.asarray([[0, 1, 2], [3, 4, 5], [6, 7, 8]], np.int64)
    found = session.run(None, {"add": ids})
    with torch.inference_mode():
        expected = module(torch.from_numpy(ids))
    for array, tensor in zip(found, expected.values(), strict=True):
        assert np.allclose(array, tensor.numpy(), atol=1e-6)


def test_an_export_is_made_once_for_each_module(tmp_path: Path) -> None:
    plain = capture(torch.nn.Linear(3, 2), [TensorSpec.parse("x:FP32[-1,3]")])
    model = replace(plain, shelf=Shelf(tmp_path, plain.module))
    onnx_graph.write(model, tmp_path / "first")
    (tmp_path / "model.onnx").write_bytes(b"what lies on the shelf")
    onnx_graph.write(model, tmp_path / "second")
    assert (tmp_path / "second").read_bytes() == b"what lies on the shelf"
    half = variants.in_precision(model, "fp16", mode="cast")
    onnx_graph.write(half, tmp_path / "third")
    assert b"what" not in (tmp_path / "third").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "model.onnx", "second", "third"]
