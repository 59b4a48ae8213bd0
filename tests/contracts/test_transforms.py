"""Every transform keeps the contract: pure, answers alike, exports; found by discovery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from tests.contracts.test_backends import HERE, error, expected, picture, sentence, tensors_of
from torchship import plugins
from torchship.backends import eager, onnxruntime
from torchship.errors import BadConfig, BuildFailed
from torchship.hardware import Gpu
from torchship.model import Model
from torchship.optimize.capture import capture
from torchship.optimize.guard import precision_of
from torchship.optimize.strategies.proposals import propose
from torchship.recipe import Options

TRANSFORMS = plugins.names("transforms")
MODELS: dict[str, Callable[[], Model]] = {"picture": picture, "sentence": sentence}
NEEDS_PAIRS = "equalize"  # these two have none
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
# what each may lose: nothing, or eight bits
LOSS = {"quantize": 0.1, "rowwise": 0.1}


def cases() -> Sequence[tuple[str, str, Options]]:
    found: list[tuple[str, str, Options]] = []
    for transform in TRANSFORMS:
        module = plugins.load("transforms", name=transform)
        for name, make in ({} if transform == NEEDS_PAIRS else MODELS).items():
            proposals = module.propose(make(), hardware=HERE) if hasattr(module, "propose") else []
            found += [(transform, name, options) for options in proposals or [{}]]
    return found


@pytest.mark.parametrize(("transform", "name", "options"), cases(), ids=str)
def test_a_new_model_answers_alike_and_the_old_one_is_unchanged(
    transform: str, name: str, options: Options, tmp_path: Path
) -> None:
    model = MODELS[name]()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    kinds = [type(module) for module in model.module.modules()]
    changed = plugins.load("transforms", name=transform).apply(model, options=options)
    assert changed.signature == model.signature
    assert [type(module) for module in model.module.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    eager.build(changed, options={}, out=tmp_path)
    stage = eager.open(tmp_path, signature=model.signature, options={}, threads=1)
    for rows in (1, 3):
        given = tensors_of(name, rows)
        assert error(stage(given), expected(model, given)) < LOSS.get(transform, 1e-5)


@pytest.mark.parametrize(
    ("transform", "options"),
    [
        ("quantize", {"scheme": "magic"}),
        ("quantize", {"exclude": "head"}),
        ("equalize", {"rounds": 0}),
        ("rowwise", {"format": "fp4"}),
        ("rowwise", {"least": "all"}),
    ],
)
def test_a_wrong_option_is_named(transform: str, options: Options) -> None:
    with pytest.raises(BadConfig):
        plugins.load("transforms", name=transform).apply(picture(), options=options)


def test_fuse_leaves_no_batch_norm() -> None:
    fused = plugins.load("transforms", name="fuse").apply(picture(), options={})
    assert not [module for module in fused.module.modules() if isinstance(module, nn.BatchNorm2d)]


class Whitened(nn.BatchNorm2d):
    """A norm that does more than a norm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("body", "shape", "left"),
    [
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (3, 9), 0),
        (nn.Sequential(nn.Conv3d(3, 8, 3), nn.BatchNorm3d(8)), (3, 5, 5, 5), 0),
        (nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)), (3, 5, 5), 0),
        (nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8)), (5,), 0),
        (nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), (7, 5), 1),  # normalizes another axis
        (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(7)), (7, 5), 1),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)), (3, 5, 5), 1),
        (nn.Sequential(nn.Conv2d(3, 8, 3), Whitened(8)), (3, 5, 5), 1),
    ],
    ids=["1d", "3d", "transposed", "linear", "linear over rows", "another length", "by the batch", "of the user's"],
)
def test_fuse_folds_only_norms_of_the_layers_own_channels(body: nn.Module, shape: Sequence[int], left: int) -> None:
    torch.manual_seed(0)
    norms = [part for part in body.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    given = torch.randn(4, *shape)
    model = capture(body.eval(), given)
    fused = plugins.load("transforms", name="fuse").apply(model, options={}).module
    assert torch.allclose(fused(given)[0], model.module(given)[0], atol=1e-5)
    assert sum(isinstance(part, type(norms[0])) for part in fused.modules()) == left


def test_a_pattern_that_fits_no_module_is_an_error() -> None:
    with pytest.raises(BadConfig, match="'haed'") as caught:
        plugins.load("transforms", name="quantize").apply(sentence(), options={"modules": {"haed": "fp32"}})
    assert "head" in caught.value.hint


def test_quantize_says_that_there_is_no_linear_layer() -> None:
    model = capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(BuildFailed, match="no linear layer"):
        plugins.load("transforms", name="quantize").apply(model, options={})


def unequal(between: Callable[[], nn.Module] = nn.ReLU) -> Model:
    """Neighbouring layers whose channels differ ten thousandfold: what one shrinks, the next one grows."""
    torch.manual_seed(0)
    first, second, third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 10, 1)
    with torch.no_grad():
        first.weight.mul_(torch.logspace(-2, 2, 8).reshape(8, 1, 1, 1))
        second.weight.mul_(torch.logspace(2, -2, 8).reshape(8, 1, 1, 1))
    plain = nn.Sequential(first, between(), second, between(), third)
    return replace(picture(), module=_Pooled(plain).eval())


@pytest.mark.parametrize("between", [nn.ReLU, nn.ReLU6])
def test_equalize_brings_the_channels_of_neighbours_to_equal_ranges(between: Callable[[], nn.Module]) -> None:
    model = unequal(between)
    before_all = {key: value.clone() for key, value in model.module.state_dict().items()}
    changed = plugins.load("transforms", name="equalize").apply(model, options={"rounds": 50})
    assert all(torch.equal(value, before_all[key]) for key, value in model.module.state_dict().items())
    given = tensors_of("picture", 2)
    assert error(expected(changed, given), expected(model, given)) < 1e-5
    spread = [_spread(m) for m in changed.module.modules() if isinstance(m, nn.Conv2d)]
    before = [_spread(m) for m in model.module.modules() if isinstance(m, nn.Conv2d)]
    assert max(before[:2]) > 1000
    assert max(spread[:2]) < 20


def test_equalize_says_that_there_is_nothing_to_do() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
            self.act = nn.ReLU6()  # one ceiling cannot fit both pairs

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.third(self.act(self.second(self.act(self.first(x)))))
            return out

    model = capture(Shared().eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(BuildFailed, match="no two layers"):
        plugins.load("transforms", name="equalize").apply(model, options={})


def test_equalize_mends_int8_with_one_scale_for_a_tensor(tmp_path: Path) -> None:
    model, given = unequal(), tensors_of("picture", 4)
    equal = plugins.load("transforms", name="equalize").apply(model, options={"rounds": 50})
    options: Options = {"precision": "int8", "per_channel": False}
    errors = []
    for name, form in (("plain", model), ("equal", equal)):
        (tmp_path / name).mkdir()
        onnxruntime.build(form, options=options, out=tmp_path / name)
        stage = onnxruntime.open(tmp_path / name, signature=model.signature, options=options, threads=1)
        errors.append(error(stage(given), expected(model, given)))
    assert errors[1] < errors[0] / 3, errors


class _Pooled(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.body(image).mean((2, 3)),)


def _spread(layer: nn.Conv2d) -> float:
    peaks = layer.weight.detach().flatten(1).abs().amax(1)
    return float(peaks.max() / peaks.min())


def test_static_quantization_needs_modules_that_are_called_once() -> None:
    quantize, unshare = (plugins.load("transforms", name=name).apply for name in ("quantize", "unshare"))
    model = picture()
    with pytest.raises(BuildFailed, match="torchao"):
        quantize(model, options={"scheme": "static"})
    changed = quantize(unshare(model, options={}), options={"scheme": "static"})
    given = tensors_of("picture", 4)
    assert 1e-6 < error(expected(changed, given), expected(model, given)) < 0.1


def test_quantize_leaves_out_what_it_is_told_to() -> None:
    apply = plugins.load("transforms", name="quantize").apply
    model = sentence()
    made = apply(model, options={"exclude": ["head"], "modules": {"mix": "int8"}}).module.state_dict()
    assert {key.split(".parametrizations")[0] for key, value in made.items() if value.dtype == torch.int8} == {"mix"}
    with pytest.raises(BuildFailed, match="no linear layer"):
        apply(model, options={"exclude": ["head"], "modules": {"mix": "fp32"}})


def by_hand(x: torch.Tensor, layer: nn.Linear, kind: str) -> torch.Tensor:
    """What eight bits with a scale for each row answer, by sums in double precision."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        largest = 448.0 if kind == "fp8" else 127.0
        scale = rows.abs().amax(1, keepdim=True) / largest
        unit = rows / scale
        return (unit.to(torch.float8_e4m3fn).double() if kind == "fp8" else unit.round().double()) * scale.double()

    return rounded(x) @ rounded(layer.weight.detach()).t() + layer.bias.detach().double()


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_rowwise_computes_in_eight_bits_with_a_scale_for_each_row(kind: str, rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 40)
    x = torch.randn(rows, 64) * torch.logspace(-3, 3, rows).unsqueeze(1)  # rows of very different sizes
    model = capture(layer, torch.randn(4, 64))
    changed = plugins.load("transforms", name="rowwise").apply(model, options={"format": kind})
    with torch.no_grad():
        found, wanted = changed.module(x)[0].double(), by_hand(x, layer, kind)
    assert float((found - wanted).norm() / wanted.norm()) < (5e-3 if kind == "fp8" else 1e-6)  # fp8 answers in bf16


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_rowwise_keeps_its_bits_where_the_model_is_cast(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = capture(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)), torch.randn(4, 3, 64))
    changed = plugins.load("transforms", name="rowwise").apply(model, options={"format": kind, "exclude": ["2"]})
    kinds = [type(module).__name__ for module in changed.module.modules()]
    assert (kinds.count("Rowwise"), kinds.count("Linear")) == (1, 1)
    options: Options = {"precision": "bf16", "mode": "cast"}
    eager.build(changed, options=options, out=tmp_path)
    stage = eager.open(tmp_path, signature=model.signature, options=options, threads=1)
    name = model.signature.inputs[0].name
    for rows in (1, 6):
        given = {name: torch.randn(rows, 3, 64).numpy()}
        assert error(stage(given), expected(model, given)) < 0.06
    stage.close()


def test_rowwise_is_proposed_where_wide_linear_layers_hold_the_weights_and_the_card_has_the_format() -> None:
    def proposed(capability: str, module: nn.Module, width: int) -> list[Options]:
        model = capture(module, torch.randn(2, width))
        card = msgspec.structs.replace(HERE, gpus=(Gpu("a card", 2**34, capability),) if capability else ())
        found: list[Options] = plugins.load("transforms", name="rowwise").propose(model, hardware=card)
        return found

    wide = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 16))
    assert proposed("9.0", wide, 1024) == [{"format": "fp8", "least": 1024}]
    assert proposed("8.0", wide, 1024) == [{"format": "int8", "least": 1024}]
    assert proposed("7.0", wide, 1024) == proposed("", wide, 1024) == []
    assert proposed("9.0", nn.Sequential(nn.Linear(768, 768)), 768) == []
    embedded = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 900))
    assert proposed("9.0", embedded, 1024) == [], "most weights are in layers that gain nothing"


def test_rowwise_goes_to_the_kernels_of_a_card_in_bf16_and_is_judged_as_eight_bits() -> None:
    card = msgspec.structs.replace(HERE, gpus=(Gpu("NVIDIA H200", 2**34, "9.0"),))
    model = capture(nn.Linear(1024, 1024), torch.randn(2, 1024))
    found = [recipe for recipe in propose(model, hardware=card, backends=["kernels"])[0] if recipe.transforms]
    assert [recipe.label for recipe in found] == ["kernels device=cuda precision=bf16 + rowwise format=fp8 least=1024"]
    assert precision_of(found[0]) == "int8"
