"""What backends say when they cannot: missing libraries, wrong options, wrong devices, broken files, bad inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.contracts.test_backends import HERE, expected, picture, tensors_of
from torchship import plugins
from torchship.backends import aoti, eager, onnxruntime, openvino, tensorrt, torchscript
from torchship.errors import BadConfig, BadInput, BuildFailed, CorruptArtifact, Unavailable
from torchship.hardware import Gpu, Hardware
from torchship.lowering import torch_stage
from torchship.model import Model
from torchship.optimize import config
from torchship.recipe import Options, Recipe, Step
from torchship.tensors import Signature

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
H100 = Gpu("NVIDIA H100", 80 * 2**30, "9.0")
ADA = Gpu("NVIDIA L4", 24 * 2**30, "8.9")


def with_gpu(gpu: Gpu) -> Hardware:
    return Hardware("x86_64", "test", 2, 2**34, ("avx512_bf16",), (gpu,))


@pytest.mark.parametrize("backend", ["eager", "inductor", "aoti", "onnxruntime", "openvino", "executorch", "tensorrt"])
def test_an_unknown_precision_is_named_with_the_known_ones(backend: str, tmp_path: Path) -> None:
    module = plugins.load("backends", name=backend)
    with pytest.raises(BadConfig, match="int3") as caught:
        module.build(picture(), options={"precision": "int3"}, out=tmp_path)
    assert "fp32" in caught.value.hint or "f32" in caught.value.hint


def test_missing_packages_are_named_with_the_pip_line() -> None:
    assert plugins.missing("numpy") == ""
    assert plugins.missing("no_such_thing") == "no_such_thing is not installed: pip install no_such_thing"
    assert plugins.missing("no_such_thing numpy nor_this", pip="both").endswith("are not installed: pip install both")


def test_tensorrt_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt, "_module", lambda: "")
    assert "pip install tensorrt-rtx" in tensorrt.probe(hardware=HERE)
    assert "pip install tensorrt-rtx" in tensorrt.probe(hardware=with_gpu(ADA))
    refused = tensorrt.probe(hardware=with_gpu(H100))
    assert "pip install tensorrt;" in refused
    assert "TensorRT-RTX does not run on NVIDIA H100 (compute 9.0)" in refused
    with pytest.raises(BuildFailed, match="installed"):
        tensorrt.build(picture(), options={}, out=tmp_path)
    with pytest.raises(Unavailable, match="installed"):
        tensorrt.open(tmp_path, signature=picture().signature, options={})
    monkeypatch.setattr(tensorrt, "_module", lambda: "tensorrt_rtx_bindings")
    assert "shows none" in tensorrt.probe(hardware=Hardware("x86_64", "test", 2, 2**34))
    assert "9.0" in tensorrt.probe(hardware=with_gpu(H100))
    assert tensorrt.probe(hardware=with_gpu(ADA)) == ""
    monkeypatch.setattr(tensorrt, "_module", lambda: "tensorrt")
    assert tensorrt.probe(hardware=with_gpu(H100)) == ""


def test_a_gpu_brings_recipes_for_it() -> None:
    recipes = [
        recipe
        for name in ("eager", "kernels", "aoti", "torchscript", "tensorrt")
        for recipe in plugins.load("backends", name=name).propose(picture(), hardware=with_gpu(H100))
    ]
    on_card = {recipe.backend for recipe in recipes if recipe.options.get("device") == "cuda"}
    assert on_card == {"eager", "kernels", "aoti", "torchscript", "tensorrt"}
    kernels = [recipe for recipe in recipes if recipe.backend == "kernels"]
    assert [recipe.options["precision"] for recipe in kernels] == ["fp16", "bf16", "tf32"]
    assert Recipe("eager", {"device": "cuda"}) in recipes, "what gains on the card are told against"


def test_the_device_of_the_caller_wins_over_the_recipe() -> None:
    assert torch_stage.device_of({}) == "cpu"
    assert torch_stage.device_of({"device": "cuda"}) == "cuda"
    assert torch_stage.device_of({"device": "cuda"}, device="cuda:1") == "cuda:1"


def test_a_device_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    model = picture()
    eager.build(model, options={}, out=tmp_path)
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises((Unavailable, RuntimeError)):
        eager.open(tmp_path, signature=model.signature, options={}, device=absent)


def test_providers_and_devices_that_are_not_there_are_named(tmp_path: Path) -> None:
    model = picture()
    onnxruntime.build(model, options={}, out=tmp_path)
    with pytest.raises(Unavailable, match="QNNExecutionProvider") as caught:
        onnxruntime.open(tmp_path, signature=model.signature, options={"provider": "QNNExecutionProvider"})
    assert "CPUExecutionProvider" in caught.value.hint
    with pytest.raises(Unavailable, match="AMD's Ryzen AI"):
        onnxruntime.open(tmp_path, signature=model.signature, options={"provider": "VitisAIExecutionProvider"})
    with pytest.raises(BadConfig, match="no provider 'CudaProvider'") as unknown:
        onnxruntime.open(tmp_path, signature=model.signature, options={"provider": "CudaProvider"})
    assert "CUDAExecutionProvider" in unknown.value.hint
    with pytest.raises(BadConfig, match="magic"):
        onnxruntime.open(tmp_path, signature=model.signature, options={"optimization": "magic"})
    for device, absent in (("NPU9", "NPU9"), ("HETERO:NPU,CPU", "NPU"), ("MULTI", "MULTI"), ("SOME:CPU", "SOME")):
        with pytest.raises(Unavailable, match=f"no device {absent}"):
            openvino.open(tmp_path, signature=model.signature, options={"device": device})


def test_a_provider_takes_options_of_its_own_and_may_not_fall_silently_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort

    model, given = picture(), tensors_of("picture", 2)
    onnxruntime.build(model, options={}, out=tmp_path)
    asked: list[Any] = []

    class Session(ort.InferenceSession):  # type: ignore[misc]
        def __init__(self, path: str, *, sess_options: Any, providers: Any) -> None:
            asked.append(providers[0])
            super().__init__(path, sess_options=sess_options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(Unavailable, match="CUDAExecutionProvider does not start"):
        onnxruntime.open(tmp_path, signature=model.signature, options={}, device="cuda:1")
    own: dict[str, str] = {"use_arena": "0"}
    options: Options = {"provider": "CPUExecutionProvider", "provider_options": own}
    stage = onnxruntime.open(tmp_path, signature=model.signature, options=options, threads=1)
    assert asked == [
        ("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"}),
        ("CPUExecutionProvider", {"use_arena": "0"}),
    ]
    assert np.allclose(stage(given)["logits"], expected(model, given)["logits"], atol=1e-4)


def test_openvino_takes_several_devices_by_their_names(tmp_path: Path) -> None:
    model, given = picture(), tensors_of("picture", 2)
    openvino.build(model, options={}, out=tmp_path)
    for device in ("AUTO:CPU", "HETERO:CPU"):
        stage = openvino.open(tmp_path, signature=model.signature, options={"device": device}, threads=1)
        assert np.allclose(stage(given)["logits"], expected(model, given)["logits"], atol=1e-3)


def test_every_option_that_is_proposed_is_one_that_exists() -> None:
    for name in plugins.names("backends"):
        module = plugins.load("backends", name=name)
        for recipe in module.propose(picture(), hardware=with_gpu(ADA)):
            assert set(recipe.options) <= set(module.OPTIONS), recipe


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe("onnxruntime", {"precison": "int8"}), "onnxruntime has no option 'precison'"),
        (Recipe("eager", {}, (Step("fuse", {"format": "nhwc"}),)), "fuse has no option 'format'"),
        (Recipe("eager", {}, (Step("fues"),)), "fues"),
        (Recipe("openvino", {"precision": "int8", "exclude": ["haed"]}), "no module fits 'haed'"),
    ],
)
def test_a_recipe_is_checked_before_anything_starts(recipe: Recipe, words: str) -> None:
    with pytest.raises(BadConfig, match=words):
        config.check(recipe, nn.ModuleDict({"head": nn.Identity()}))


@pytest.mark.parametrize("backend", [eager, torchscript, onnxruntime, openvino, aoti])
def test_a_broken_file_is_corrupt(backend: Any, tmp_path: Path) -> None:
    for name in ("program.pt2", "script.ts", "model.onnx", "model.xml", "model.pt2"):
        (tmp_path / name).write_bytes(b"this is no model")
    with pytest.raises(CorruptArtifact):
        backend.open(tmp_path, signature=picture().signature, options={})


def test_a_closed_stage_says_so(tmp_path: Path) -> None:
    for backend in (eager, onnxruntime, openvino):
        folder = tmp_path / backend.__name__
        folder.mkdir()
        backend.build(picture(), options={}, out=folder)
        stage = backend.open(folder, signature=picture().signature, options={}, threads=1)
        stage.close()
        with pytest.raises(Unavailable, match="closed"):
            stage(tensors_of("picture", 1))


def test_the_libraries_that_check_nothing_are_checked_by_the_signature() -> None:
    stage = torch_stage.staged(lambda image: (image,), signature=picture().signature, check=True)
    for wrong in (np.zeros((1, 3, 15, 16), np.float32), np.zeros((1, 3, 16, 16)), np.zeros((9, 3, 16, 16), np.float32)):
        with pytest.raises(BadInput, match="image"):
            stage({"image": wrong})


class Branching(nn.Module):
    """Which way it goes depends on the data: torch.export refuses it, scripting does not."""

    def __init__(self) -> None:
        super().__init__()
        self.plus, self.minus = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            chosen: torch.Tensor = self.plus(x)
        else:
            chosen = self.minus(x)
        return chosen


class Flattened(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.inner(x),)


@pytest.mark.parametrize("backend", [eager, torchscript, onnxruntime, openvino])
def test_control_flow_takes_both_ways_after_the_build(backend: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    signature = Signature.parse("x:FP32[1..8,4] -> y:FP32[-1,4]")
    examples = [{"x": np.ones((2, 4), np.float32)}]
    model = Model(module=Flattened(Branching()).eval(), signature=signature, examples=examples)
    backend.build(model, options={}, out=tmp_path)
    stage = backend.open(tmp_path, signature=signature, options={}, threads=1)
    for sign in (1, -1):
        given = {"x": np.full((3, 4), sign, np.float32)}
        assert np.allclose(stage(given)["y"], expected(model, given)["y"], atol=1e-6)


class Hopeless(nn.Module):
    """Neither can be exported nor scripted."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = {name: value for name, value in [("a", x)] if bool(value.sum() > 0)}
        return found["a"]


def test_what_cannot_be_saved_says_both_reasons(tmp_path: Path) -> None:
    signature = Signature.parse("x:FP32[1..8,4] -> y:FP32[-1,4]")
    model = Model(module=Flattened(Hopeless()), signature=signature, examples=[{"x": np.ones((2, 4), np.float32)}])
    with pytest.raises(BuildFailed, match=r"torch\.export.*torch\.jit\.script"):
        eager.build(model, options={}, out=tmp_path)
    for backend in (onnxruntime, openvino, torchscript):
        with pytest.raises(BuildFailed):
            backend.build(model, options={}, out=tmp_path)
