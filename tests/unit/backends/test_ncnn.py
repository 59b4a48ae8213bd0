"""ncnn beyond the contract: several inputs, odd sizes, what it cannot take, and files that are broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchship.backends import ncnn as backend
from torchship.errors import BadConfig, BuildFailed, CorruptArtifact, Unavailable
from torchship.hardware import here
from torchship.model import Model
from torchship.tensors import Signature

pytestmark = [
    pytest.mark.skipif(bool(backend.probe(hardware=here())), reason="needs ncnn"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Two(nn.Module):
    """Two inputs, of odd sizes, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(7, 2)

    def forward(self, image: torch.Tensor, more: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(self.mix(image)), self.head(more)


def made(text: str, module: nn.Module) -> Model:
    signature = Signature.parse(text)
    random = np.random.default_rng(0)
    example = {
        spec.name: random.normal(size=[axis if isinstance(axis, int) else 2 for axis in spec.shape]).astype(np.float32)
        for spec in signature.inputs
    }
    return Model(module=module.eval(), signature=signature, examples=[example], calibration=[], name="m")


def two() -> Model:
    torch.manual_seed(0)
    return made("image:FP32[-1,3,5,7], more:FP32[-1,7] -> seen:FP32[-1,5,5,7], found:FP32[-1,2]", Two())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 5e-3)])
def test_rows_of_odd_sizes_come_out_in_their_places(precision: str, tolerance: float, tmp_path: Path) -> None:
    model = two()
    backend.build(model, options={"precision": precision}, out=tmp_path)
    stage = backend.open(tmp_path, signature=model.signature, options={"precision": precision}, threads=1)
    random = np.random.default_rng(1)
    given = {
        "image": random.normal(size=(3, 3, 5, 7)).astype(np.float32),
        "more": random.normal(size=(3, 7)).astype(np.float32),
    }
    with torch.no_grad():
        wanted = model.module(*(torch.from_numpy(array) for array in given.values()))
    for found, right in zip(stage(given).values(), wanted, strict=True):
        np.testing.assert_allclose(found, right.numpy(), atol=tolerance, rtol=tolerance)
    stage.close()


@pytest.mark.parametrize(
    "text",
    [
        "x:FP32[-1,n:1..8] -> y:FP32[-1,2]",
        "x:INT64[-1,7] -> y:FP32[-1,2]",
        "x:FP32[-1,7] -> y:FP16[-1,2]",
        "x:FP32[-1] -> y:FP32[-1,2]",
    ],
)
def test_what_it_cannot_take_is_not_proposed_and_told(text: str, tmp_path: Path) -> None:
    model = made(text, nn.Linear(7, 2))
    assert backend.propose(model, hardware=here()) == []
    with pytest.raises(BuildFailed, match="ncnn cannot take this model: it "):
        backend.build(model, options={}, out=tmp_path)


def test_a_model_without_rows_is_told() -> None:
    rows = Signature.parse("x:FP32[-1,7] -> y:FP32[-1,2]")
    assert backend.why_not(rows) == ""
    assert "no rows" in backend.why_not(Signature(rows.inputs, rows.outputs, batched=False))


def test_faults_name_their_mend(tmp_path: Path) -> None:
    model = two()
    with pytest.raises(BadConfig, match="precision 'int8' is unknown"):
        backend.build(model, options={"precision": "int8"}, out=tmp_path)
    with pytest.raises(Unavailable, match="not on cuda"):
        backend.open(tmp_path, signature=model.signature, options={}, device="cuda")
    (tmp_path / "model.ncnn.param").write_text("7767517\n1 1\nNoSuchLayer a 0 1 in0\n")
    with pytest.raises(CorruptArtifact, match=r"model\.ncnn\.param cannot be opened"):
        backend.open(tmp_path, signature=model.signature, options={})
