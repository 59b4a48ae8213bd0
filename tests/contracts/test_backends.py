"""Every backend keeps the contract: probe, propose, build, open; found by discovery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchship import hardware, plugins, process
from torchship.model import Model, to_numpy
from torchship.recipe import Recipe
from torchship.tensors import Signature, Tensors

SLOW = ("aoti", "executorch", "inductor")  # they compile for many seconds: the first and the last proposal do
BACKENDS = plugins.names("backends")
HERE = hardware.here()
TOLERANCE = {
    "tf32": 2e-3,
    "bf16": 0.05,
    "fp16": 0.01,
    "f16": 0.01,
    "int8": 0.15,
    "dynamic_int8": 0.15,
    "int8_weights": 0.05,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


class Picture(nn.Module):
    """A small classifier with a shared activation, a residual and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        seen = self.act(self.norm(self.stem(image)))
        seen = self.act(self.body(seen) + seen)
        return (self.head(seen.mean((2, 3))),)


class Sentence(nn.Module):
    """Two inputs (integers among them), two outputs, rows and length free."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.mix = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = torch.nn.functional.gelu(self.mix(self.words(ids))) * mask.unsqueeze(-1)
        return self.head(seen), seen.sum(1) / mask.sum(1, keepdim=True)


def picture() -> Model:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    data = [{"image": random.normal(size=(4, 3, 16, 16)).astype(np.float32)} for _ in range(16)]
    signature = Signature.parse("image:FP32[1..8,3,16,16] -> logits:FP32[-1,10]")
    return Model(module=Picture().eval(), signature=signature, examples=data[:1], calibration=data, name="picture")


def sentence() -> Model:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    lengths = [6, *range(2, 17)]
    data: list[Tensors] = [
        {"ids": random.integers(0, 50, size=(2, n)), "mask": np.ones((2, n), np.float32)} for n in lengths
    ]
    text = "ids:INT64[1..8,seq:1..16], mask:FP32[1..8,seq:1..16] -> tags:FP32[-1,seq,4], summary:FP32[-1,32]"
    return Model(
        module=Sentence().eval(), signature=Signature.parse(text), examples=data[:1], calibration=data, name="sentence"
    )


MODELS = {"picture": picture, "sentence": sentence}


def expected(model: Model, tensors: Tensors) -> dict[str, np.ndarray[Any, Any]]:
    with torch.no_grad():
        answers = model.module(*model.torch_inputs(tensors))
    return {
        spec.name: np.asarray(to_numpy(answer)) for spec, answer in zip(model.signature.outputs, answers, strict=True)
    }


def error(found: Tensors, wanted: Tensors) -> float:
    """The largest relative L2 error over the outputs."""
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert found[name].dtype == wanted[name].dtype
    return max(float(np.linalg.norm(found[n] - wanted[n]) / np.linalg.norm(wanted[n])) for n in wanted)


def tensors_of(name: str, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(rows)
    if name == "picture":
        return {"image": random.normal(size=(rows, 3, 16, 16)).astype(np.float32)}
    length = 1 + rows
    return {"ids": random.integers(0, 50, size=(rows, length)), "mask": np.ones((rows, length), np.float32)}


def tolerance(recipe: Recipe) -> float:
    if recipe.transforms:
        return TOLERANCE["int8"]
    return TOLERANCE.get(str(recipe.options.get("precision", "fp32")), 1e-4)


def cases() -> Sequence[tuple[str, str, Recipe]]:
    found = []
    for backend in BACKENDS:
        if plugins.reason_against("backends", name=backend, hardware=HERE):
            continue
        module = plugins.load("backends", name=backend)
        for name, make in MODELS.items():
            recipes = module.propose(make(), hardware=HERE)
            if backend in SLOW:
                recipes = recipes[:1] if name == "picture" else recipes[-1:]
            found += [(backend, name, recipe) for recipe in recipes]
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_probe_answers_with_a_string_and_never_raises(backend: str) -> None:
    module = plugins.load("backends", name=backend)
    answer = module.probe(hardware=HERE)
    assert isinstance(answer, str)
    assert "\n" not in answer
    assert module.KIND in ("data", "native")
    assert all(isinstance(name, str) for name in module.PACKAGES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_proposals_are_recipes_of_that_backend_without_twins(backend: str) -> None:
    module = plugins.load("backends", name=backend)
    recipes = module.propose(picture(), hardware=HERE)
    assert all(recipe.backend == backend for recipe in recipes)
    assert len({recipe.key for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize(("backend", "name", "recipe"), cases(), ids=lambda v: v.label if isinstance(v, Recipe) else v)
def test_built_and_reopened_it_agrees_with_torch(backend: str, name: str, recipe: Recipe, tmp_path: Path) -> None:
    module, model = plugins.load("backends", name=backend), MODELS[name]()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    shaped = model
    for step in recipe.transforms:
        shaped = plugins.load("transforms", name=step.transform).apply(shaped, options=step.options)
    module.build(shaped, options=recipe.options, out=tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    stage = module.open(tmp_path, signature=model.signature, options=recipe.options, device="cpu", threads=1)
    try:
        assert stage.signature == model.signature
        assert stage.max_batch == 8
        for rows in (1, 2, 8, 3):
            given = tensors_of(name, rows)
            first = stage(given)
            kept = {key: value.copy() for key, value in first.items()}
            assert error(first, expected(model, given)) < tolerance(recipe)
            stage(tensors_of(name, rows % 8 + 1))
            assert all(np.array_equal(first[key], kept[key]) for key in first)  # an answer outlives the next call
    finally:
        stage.close()
        stage.close()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_opens_where_torch_cannot_be_imported(backend: str, tmp_path: Path) -> None:
    module, model = plugins.load("backends", name=backend), sentence()
    module.build(model, options={}, out=tmp_path)
    outcome = process.run(
        "tests.contracts.torch_free:open_and_run",
        argument=[backend, str(tmp_path), str(model.signature)],
        timeout=120,
        threads=1,
    )
    assert outcome.fault == "", outcome.log
    found = {name: np.asarray(value, np.float32) for name, value in outcome.value["outputs"].items()}
    given = {name: np.asarray(value) for name, value in outcome.value["inputs"].items()}
    given["mask"] = given["mask"].astype(np.float32)
    assert error(found, expected(model, given)) < 1e-4
