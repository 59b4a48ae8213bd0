"""TorchScript as the way out: recurrent nets of any length are traced, loops in Python are not; packages are found."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchship.errors import Unavailable
from torchship.lowering import program, script
from torchship.model import Model
from torchship.optimize.capture import capture
from torchship.plugins import load


class Tagger(nn.Module):
    """Its output is no TorchScript type: a dict of a tensor and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(4, 6, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        steps, state = self.net(x)
        return {"steps": steps, "state": state}


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        state = x.new_zeros(x.shape[0], 6)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return [state]


def captured(module: nn.Module) -> Model:
    return capture(module, [torch.randn(2, 5, 4), torch.randn(2, 7, 4)])


def test_only_a_loop_in_python_depends_on_the_length() -> None:
    assert script.traceable(captured(Tagger()))
    assert not script.traceable(captured(Loop()))


@pytest.mark.parametrize("name", ["eager", "onnxruntime"])
def test_a_recurrent_net_takes_any_length(name: str, tmp_path: Path) -> None:
    model = captured(Tagger())
    backend = load("backends", name=name)
    backend.build(model, options={}, out=tmp_path)
    stage = backend.open(tmp_path, signature=model.signature, options={})
    x = np.random.default_rng(0).standard_normal((3, 11, 4), dtype=np.float32)
    with torch.no_grad():
        expected = model.module(torch.from_numpy(x))
    for spec, tensor in zip(model.signature.outputs, expected, strict=True):
        np.testing.assert_allclose(stage({"x": x})[spec.name], tensor.numpy(), atol=1e-5)


def test_packages_of_operators_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/models/model.json", '"torch.ops.aten.add.Tensor"')
        archive.writestr("a/code/y.py", "ops.torchvision.nms(x)")
        archive.writestr("a/code/x.py", "ops.torchao.quantize_affine(x)")
    imported: list[str] = []
    monkeypatch.setattr("torchship.lowering.program.import_module", imported.append)
    program.register_operators(tmp_path / "a.pt2")
    assert imported == ["torchao", "torchvision"]

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("torchship.lowering.program.import_module", absent)
    with pytest.raises(Unavailable, match="operators of torchao") as told:
        program.register_operators(tmp_path / "a.pt2")
    assert told.value.hint == "pip install torchao"


def test_operators_that_nothing_defines_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/models/model.json", '"torch.ops.aten.add.Tensor" "torch.ops.homemade.blur.default"')
    with pytest.raises(Unavailable, match="operators of 'homemade'"):
        program.register_operators(tmp_path / "a.pt2")
