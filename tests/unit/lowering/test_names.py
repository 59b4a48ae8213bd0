"""Inputs and outputs of an ONNX file have the signature's names, whatever the values in the middle are called."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch

from torchship.lowering import onnx_graph
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
