"""Every transform keeps the contract: pure, answers alike, exports; found by discovery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.contracts.test_backends import HERE, error, expected, picture, sentence, tensors_of
from torchship import plugins
from torchship.backends import eager, onnxruntime
from torchship.errors import BadConfig, BuildFailed
from torchship.lowering import paths
from torchship.model import Model
from torchship.recipe import Options

TRANSFORMS = plugins.names("transforms")
MODELS: dict[str, Callable[[], Model]] = {"picture": picture, "sentence": sentence}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.*"),
]
# what each may lose: nothing, half precision, eight bits
LOSS = {"precision": 0.02, "quantize": 0.1}


def cases() -> Sequence[tuple[str, str, Options]]:
    found: list[tuple[str, str, Options]] = []
    for transform in TRANSFORMS:
        module = plugins.load("transforms", name=transform)
        for name, make in MODELS.items():
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
        ("precision", {"precision": "fp4"}),
        ("precision", {"mode": "magic"}),
        ("layout", {"layout": "sideways"}),
        ("quantize", {"scheme": "magic"}),
        ("quantize", {"exclude": "head"}),
        ("equalize", {"rounds": 0}),
    ],
)
def test_a_wrong_option_is_named(transform: str, options: Options) -> None:
    with pytest.raises(BadConfig):
        plugins.load("transforms", name=transform).apply(picture(), options=options)


def test_precision_keeps_the_layers_that_it_is_told_to_keep() -> None:
    model = picture()
    seen: dict[str, torch.dtype] = {}
    apply = plugins.load("transforms", name="precision").apply
    changed = apply(model, options={"precision": "bf16", "mode": "cast", "modules": {"head": "fp32"}})
    for path, module in changed.module.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            seen[paths.user_path(path)] = module.weight.dtype
    assert seen == {"stem": torch.bfloat16, "body": torch.bfloat16, "head.inner": torch.float32}


def test_precision_under_autocast_keeps_a_layer_in_float() -> None:
    model = picture()
    apply = plugins.load("transforms", name="precision").apply
    given = tensors_of("picture", 4)
    every = error(expected(apply(model, options={}), given), expected(model, given))
    most = error(expected(apply(model, options={"keep": ["*"]}), given), expected(model, given))
    assert most < 1e-6 < every


def test_fuse_leaves_no_batch_norm() -> None:
    fused = plugins.load("transforms", name="fuse").apply(picture(), options={})
    assert not [module for module in fused.module.modules() if isinstance(module, nn.BatchNorm2d)]


def unequal() -> Model:
    """Neighbouring layers whose channels differ ten thousandfold: what one shrinks, the next one grows."""
    torch.manual_seed(0)
    first, second, third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 10, 1)
    with torch.no_grad():
        first.weight.mul_(torch.logspace(-2, 2, 8).reshape(8, 1, 1, 1))
        second.weight.mul_(torch.logspace(2, -2, 8).reshape(8, 1, 1, 1))
    plain = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
    return replace(picture(), module=_Pooled(plain).eval())


def test_equalize_brings_the_channels_of_neighbours_to_equal_ranges() -> None:
    model = unequal()
    changed = plugins.load("transforms", name="equalize").apply(model, options={"rounds": 50})
    given = tensors_of("picture", 2)
    assert error(expected(changed, given), expected(model, given)) < 1e-5
    spread = [_spread(m) for m in changed.module.modules() if isinstance(m, nn.Conv2d)]
    before = [_spread(m) for m in model.module.modules() if isinstance(m, nn.Conv2d)]
    assert max(before[:2]) > 1000
    assert max(spread[:2]) < 20


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
    model, given = sentence(), tensors_of("sentence", 2)
    none = apply(model, options={"exclude": ["head"], "modules": {"mix": "fp32"}})
    assert error(expected(none, given), expected(model, given)) < 1e-6
