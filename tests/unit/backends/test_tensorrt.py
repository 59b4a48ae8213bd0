"""TensorRT by a stand-in for the library: what is asked of the builder, how an engine runs, and what is refused."""

from __future__ import annotations

import enum
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.contracts.test_backends import HERE, error, expected, picture, sentence, tensors_of, tolerance
from tests.unit.backends import standin_tensorrt
from torchship import hardware
from torchship.artifact import open_artifact, package
from torchship.artifact.manifest import Provenance
from torchship.backends import tensorrt
from torchship.cli import inspect
from torchship.errors import (
    BadConfig,
    BuildFailed,
    CorruptArtifact,
    StageFailed,
    Unavailable,
    UnsafeArtifact,
    WrongMachine,
)
from torchship.hardware import Gpu
from torchship.lowering import cuda, torch_stage
from torchship.model import Model, to_numpy, to_torch
from torchship.recipe import Options, Recipe
from torchship.tensors import Signature, Tensors

CARD = msgspec.structs.replace(HERE, gpus=(Gpu("NVIDIA H200", 150 * 2**30, "9.0", "580.1"),))
MODELS: dict[str, Callable[[], Model]] = {"picture": picture, "sentence": sentence}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]


class Stream:
    """A stream of the card, by its number."""

    numbers = iter(range(100, 10_000))

    def __init__(self, device: object = None) -> None:
        self.cuda_stream = next(self.numbers)
        self.waited: list[int] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other.cuda_stream)

    def synchronize(self) -> None:
        """Nothing runs."""


class OnHost:
    """Takes what a stage on a card is given, and runs it here: rows are filled up to the next size."""

    def __init__(self, body: Any, *, signature: Signature, device: str, check: bool, graphs: bool, bodies: Any) -> None:
        self.body, self.signature, self.check, self.graphs, self.bodies = body, signature, check, graphs, bodies

    def __call__(self, tensors: Tensors) -> dict[str, Any]:
        arrays = [tensors[spec.name] for spec in self.signature.inputs]
        rows = arrays[0].shape[0]
        size = next((size for size in sorted(self.bodies) if size >= rows), rows)
        given = [to_torch(np.take(array, np.arange(size) % rows, axis=0)) for array in arrays]
        answers = self.bodies.get(size, self.body)(*given)
        return {
            spec.name: np.asarray(to_numpy(one))[:rows]
            for spec, one in zip(self.signature.outputs, answers, strict=True)
        }

    def close(self) -> None:
        """Nothing to give back."""


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card and its library, both stand-ins; the default stream is current."""
    streams = SimpleNamespace(default=Stream(), current=None)
    streams.current = streams.default
    monkeypatch.setitem(sys.modules, "tensorrt", standin_tensorrt)
    monkeypatch.setattr(standin_tensorrt, "__version__", "11.4.0")
    monkeypatch.setattr(standin_tensorrt, "__name__", "tensorrt")
    monkeypatch.setattr(hardware, "here", lambda: CARD)
    monkeypatch.setattr(torch_stage, "device_of", lambda options, device="cpu": "cpu")
    monkeypatch.setattr(tensorrt, "prepare", lambda **given: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams.current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams.default)
    monkeypatch.setattr(cuda, "CudaStage", OnHost)
    tensorrt._logger.cache_clear()
    return streams


def opened(folder: Path, model: Model, options: Options = {}) -> Any:
    return tensorrt.open(folder, signature=model.signature, options=options)


@pytest.mark.parametrize("version", ["10.13.3.9", "11.4.0.106"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("name", ["picture", "sentence"])
def test_what_is_built_is_opened_and_agrees(
    name: str, precision: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standin_tensorrt, "__version__", version)
    model, options = MODELS[name](), {"precision": precision}
    tensorrt.build(model, options=dict(options), out=tmp_path)
    stage = opened(tmp_path, model)
    for rows in (1, 2, 8, 3):
        given = tensors_of(name, rows)
        assert error(stage(given), expected(model, given)) < tolerance(Recipe("tensorrt", dict(options)))
    assert stage.check


def test_the_network_is_strongly_typed_and_fp32_is_no_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Options = {"precision": "fp32", "workspace": 2**20, "level": 5}
    tensorrt.build(picture(), options=asked, out=tmp_path)
    builder: Any = standin_tensorrt.Builder.last
    assert builder.network.strongly_typed
    assert builder.config.flags == set()
    assert builder.config.limits == {standin_tensorrt.MemoryPoolType.WORKSPACE: 2**20}
    assert builder.config.builder_optimization_level == 5
    tensorrt.build(picture(), options={"precision": "tf32"}, out=tmp_path)
    builder = standin_tensorrt.Builder.last
    assert builder.config.flags == {standin_tensorrt.BuilderFlag.TF32}
    monkeypatch.setattr(standin_tensorrt, "NetworkDefinitionCreationFlag", enum.IntEnum("None", {"OTHER": 3}))
    tensorrt.build(picture(), options={}, out=tmp_path)


def test_profiles_follow_the_signature_one_row_few_and_many() -> None:
    signature = Signature.parse("ids:INT64[1..32,seq:4..64,3] -> y:FP32[-1]")
    assert tensorrt.row_spans(signature) == [(1, 1), (2, 8), (9, 32)]
    found = [tensorrt.extents(signature.inputs[0], signature, span) for span in tensorrt.row_spans(signature)]
    assert found == [
        [(1, 4, 3), (1, 32, 3), (1, 64, 3)],
        [(2, 4, 3), (8, 32, 3), (8, 64, 3)],
        [(9, 4, 3), (32, 32, 3), (32, 64, 3)],
    ]
    spans = [
        tensorrt.row_spans(Signature.parse(f"x:FP32[{rows},3] -> y:FP32[-1]")) for rows in ("1..1", "1..8", "4..6")
    ]
    assert spans == [[(1, 1)], [(1, 1), (2, 8)], [(4, 6)]]
    alone = Signature.parse("x:FP32[5,seq:2..] -> y:FP32[5]", batched=False)
    assert tensorrt.row_spans(alone) == [(1, 1)]
    assert tensorrt.extents(alone.inputs[0], alone, (1, 1)) == [(5, 2), (5, 256), (5, 512)]


def test_each_batch_size_has_a_context_of_its_own_in_one_piece_of_memory(tmp_path: Path) -> None:
    model = picture()
    tensorrt.build(model, options={}, out=tmp_path)
    stage = opened(tmp_path, model)
    assert stage.graphs
    assert sorted(stage.bodies) == [1, 2, 4, 8]
    contexts = stage.body._engine.contexts
    assert [context.profile for context in contexts] == [0, 1, 1, 1]
    assert len({context.memory for context in contexts}) == 1
    plain = opened(tmp_path, model, {"graphs": False})
    assert (plain.graphs, plain.bodies) == (False, {})
    free = sentence()
    tensorrt.build(free, options={}, out=tmp_path)
    stage = opened(tmp_path, free)
    assert (stage.graphs, stage.bodies) == (False, {})
    stage(tensors_of("sentence", 1))
    stage(tensors_of("sentence", 3))
    stage(tensors_of("sentence", 5))
    assert [context.profile for context in stage.body._engine.contexts] == [0, 1]


def test_it_runs_on_torchs_stream_but_for_the_default_one_and_copies_nothing(
    tmp_path: Path, card: SimpleNamespace
) -> None:
    model = picture()
    tensorrt.build(model, options={}, out=tmp_path)
    stage = opened(tmp_path, model)
    given = torch.from_numpy(tensors_of("picture", 1)["image"])
    (answer,) = stage.bodies[1](given)
    context = stage.body._engine.contexts[0]
    assert context.addresses["image"] == given.data_ptr()
    assert context.addresses["logits"] == answer.data_ptr()
    own = context.streams[-1]
    assert own != card.default.cuda_stream
    assert card.default.waited == [own], "what follows on the default stream waits for it"
    card.current = Stream()  # as while a graph is captured
    stage.bodies[1](given)
    assert context.streams[-1] == card.current.cuda_stream


def test_another_version_another_card_and_a_missing_library_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = picture()
    tensorrt.build(model, options={}, out=tmp_path)
    assert tensorrt.described(tmp_path).startswith("tensorrt 11.4.0 for compute 9.0, ")
    assert "not here" not in tensorrt.described(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(WrongMachine, match=r"built for compute 9\.0, and NVIDIA H200 has 8\.0"):
        opened(tmp_path, model)
    monkeypatch.setattr(standin_tensorrt, "__version__", "10.13.3")
    with pytest.raises(WrongMachine, match=r"tensorrt 11\.4\.0 built it, and 10\.13\.3 is installed") as caught:
        opened(tmp_path, model)
    assert "install that version" in caught.value.hint
    assert tensorrt.described(tmp_path).endswith("not here: tensorrt 11.4.0 built it, and 10.13.3 is installed")
    facts = tmp_path / "engine.json"
    facts.write_bytes(facts.read_bytes().replace(b'"tensorrt"', b'"tensorrt_rtx"'))
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None if "rtx" in name else object())
    with pytest.raises(WrongMachine, match=r"tensorrt_rtx 11\.4\.0 built it, and is not installed"):
        opened(tmp_path, model)
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    assert "is not installed" in tensorrt.described(tmp_path)
    with pytest.raises(Unavailable, match="installed"):
        opened(tmp_path, model)
    facts.write_text("{}")
    assert tensorrt.described(tmp_path).startswith("engine.json does not say what built the engine")


def test_a_plan_that_does_not_load_and_facts_that_lie_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = picture()
    monkeypatch.setattr(standin_tensorrt, "__version__", "10.0.0")
    tensorrt.build(model, options={}, out=tmp_path)
    monkeypatch.setattr(standin_tensorrt, "__version__", "11.4.0")
    facts = tmp_path / "engine.json"
    facts.write_bytes(facts.read_bytes().replace(b"10.0.0", b"11.4.0"))
    with pytest.raises(WrongMachine, match=r"the plan is of version 10\.0\.0"):
        opened(tmp_path, model)
    facts.write_bytes(facts.read_bytes().replace(b'"tensorrt"', b'"os"'))
    with pytest.raises(WrongMachine, match=r"os 11\.4\.0 built it"):
        opened(tmp_path, model)
    facts.unlink()
    with pytest.raises(CorruptArtifact, match=r"engine\.json"):
        opened(tmp_path, model)


def test_what_the_library_refuses_is_told_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = picture()
    monkeypatch.setattr(standin_tensorrt, "ALLOWED_FAULT", "Error Code 10: no implementation for node_conv")
    with pytest.raises(BuildFailed, match="no implementation for node_conv"):
        tensorrt.build(model, options={}, out=tmp_path)
    monkeypatch.setattr(standin_tensorrt, "ALLOWED_FAULT", "")
    tensorrt.build(model, options={}, out=tmp_path)
    stage = opened(tmp_path, model)
    with pytest.raises(StageFailed, match=r"refuses input 'image' with shape \[9, 3, 16, 16\]"):
        stage.body(torch.zeros(9, 3, 16, 16))

    def no_card(logger: object) -> None:
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(standin_tensorrt, "Builder", no_card)
    with pytest.raises(BuildFailed, match="only TensorRT-RTX builds without a card"):
        tensorrt.build(model, options={}, out=tmp_path)


def test_only_tensorrt_rtx_is_told_which_cards_to_build_for(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(ComputeCapability=SimpleNamespace(SM80=80, SM86=86, SM89=89, SM120=120, SM121=121))
    asked: dict[int, int] = {}

    def target(options: Options, *cards: str) -> list[str]:
        config = SimpleNamespace(
            num_compute_capabilities=0, set_compute_capability=lambda value, place: asked.update({place: value})
        )
        gpus = tuple(Gpu("a card", 2**34, capability) for capability in cards)
        monkeypatch.setattr(hardware, "here", lambda: msgspec.structs.replace(HERE, gpus=gpus))
        asked.clear()
        found = tensorrt._target(library, config, options)
        assert config.num_compute_capabilities == len(found) == len(asked)
        return found

    assert target({}, "8.9") == ["8.9"]
    assert asked == {0: 89}
    assert target({}) == target({}, "9.0") == ["8.0", "8.6", "8.9", "12.0", "12.1"]
    assert target({"compute": ["8.6", "12.0"]}, "8.9") == ["8.6", "12.0"]
    with pytest.raises(BadConfig, match=r"compute '9\.0' is unknown"):
        target({"compute": "9.0"})


def test_an_artifact_of_it_is_native_hashed_and_inspected_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = picture(), tmp_path / "artifact"
    (folder / "backend").mkdir(parents=True)
    tensorrt.build(model, options={}, out=folder / "backend")
    made = Provenance("0.1.0", "2026-01-01T00:00:00+00:00", "tests", "0" * 64)
    recipe = Recipe("tensorrt", {"precision": "fp16"})
    package.pack(folder, name="pictures", signature=model.signature, recipe=recipe, provenance=made)
    artifact = open_artifact(folder)
    kinds = {entry.path: entry.kind for entry in artifact.manifest.files}
    assert kinds == {"backend/model.plan": "native", "backend/engine.json": "native"}
    with pytest.raises(UnsafeArtifact):
        artifact.open()
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    told = dict(inspect._facts(artifact))["engine"]
    assert str(told).startswith("tensorrt 11.4.0 for compute 9.0")
    assert str(told).endswith("not here: tensorrt 11.4.0 built it, and is not installed")
    plan = folder / "backend" / "model.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptArtifact):
        open_artifact(folder)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16", "int8"])
def test_the_real_tensorrt_rtx_builds_an_engine_without_a_card(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX is not installed")
    monkeypatch.setattr(tensorrt, "_module", lambda: "tensorrt_rtx_bindings")
    monkeypatch.setattr(hardware, "here", lambda: HERE)
    real = importlib.import_module("tensorrt_rtx_bindings")
    for make in (picture, sentence):
        tensorrt.build(make(), options={"precision": precision, "compute": ["8.9"]}, out=tmp_path)
        assert (tmp_path / "model.plan").stat().st_size > 10_000
        assert f"tensorrt_rtx_bindings {real.__version__} for compute 8.9" in tensorrt.described(tmp_path)
