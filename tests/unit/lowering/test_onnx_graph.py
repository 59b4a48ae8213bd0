"""ONNX files: named as the signature is, and exported once for all trials of a search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from torchship import plugins
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


class Stream(torch.nn.Module):
    """State goes in and comes out under one name, beside an input that is handed on as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = torch.nn.GRU(3, 4, batch_first=True)

    def forward(self, frames: torch.Tensor, state: torch.Tensor, key: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, after = self.gru(frames, state.movedim(0, 1))
        return {"scores": hidden, "state": after.movedim(0, 1), "key": key}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("frames", ["2", "-1"], ids=["exported", "traced"])
def test_an_output_may_have_the_name_of_an_input(backend: str, frames: str, tmp_path: Path) -> None:
    module = Stream().eval()
    texts = (f"frames:FP32[-1,{frames},3]", "state:FP32[-1,1,4]", "key:INT64[-1]")
    model = capture(module, [TensorSpec.parse(text) for text in texts])
    engine = plugins.load("backends", name=backend)
    engine.build(model, options={}, out=tmp_path)
    stage = engine.open(tmp_path, signature=model.signature, options={})
    call = {"frames": torch.randn(3, 2, 3), "state": torch.randn(3, 1, 4), "key": torch.tensor([7, 8, 9])}
    found = stage({name: tensor.numpy() for name, tensor in call.items()})
    stage.close()
    with torch.inference_mode():
        for name, tensor in module(**call).items():
            assert np.allclose(found[name], tensor.numpy(), atol=1e-5), name


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


class Reader(torch.nn.Module):
    """Attention with a mask of numbers: minus infinity leaves a place out."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 24)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        left_out = torch.zeros_like(mask).masked_fill(mask == 0, float("-inf"))
        seen: torch.Tensor = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=left_out[:, None, None]
        )
        return seen.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("openvino", "f32"), ("openvino", "bf16")],
)
def test_a_row_whose_mask_leaves_out_everything_is_answered_as_torch_does(
    backend: str, precision: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = Reader().eval()
    x = torch.randn(3, 5, 8)
    mask = torch.ones(3, 5)
    model = capture(module, (x, mask))
    built = plugins.load("backends", name=backend)
    options = {"precision": precision}
    built.build(model, options=options, out=tmp_path)
    stage = built.open(tmp_path, signature=model.signature, options=options)
    mask[0, 3:] = 0
    mask[1] = 0
    with torch.inference_mode():
        expected = module(x, mask).numpy()
    assert not expected[1].any()
    (found,) = stage({"x": x.numpy(), "mask": mask.numpy()}).values()
    np.testing.assert_allclose(found, expected, atol=1e-5 if precision in ("fp32", "f32") else 2e-2)
    np.testing.assert_array_equal(found[1], 0)
