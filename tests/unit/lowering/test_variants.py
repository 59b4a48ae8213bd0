"""The options of the torch backends for precision and layout: what they change, what they keep, what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.contracts.test_backends import error, expected, picture, sentence, tensors_of
from torchship import plugins
from torchship.errors import BadConfig
from torchship.lowering import paths
from torchship.lowering.torch_stage import shaped
from torchship.optimize.capture import capture
from torchship.recipe import Options

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


@pytest.mark.parametrize("options", [{"precision": "fp4"}, {"precision": "bf16", "mode": "magic"}])
def test_a_wrong_option_is_named(options: Options) -> None:
    with pytest.raises(BadConfig):
        shaped(picture(), options)


def test_a_pattern_that_fits_no_module_is_an_error() -> None:
    with pytest.raises(BadConfig, match="'haed'") as caught:
        shaped(sentence(), {"precision": "bf16", "modules": {"haed": "fp32"}})
    assert "head" in caught.value.hint


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_half_precision_answers_alike_and_the_old_model_is_unchanged(mode: str) -> None:
    model = picture()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    changed = shaped(model, {"precision": "bf16", "mode": mode})
    assert changed.signature == model.signature
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    given = tensors_of("picture", 3)
    assert 1e-6 < error(expected(changed, given), expected(model, given)) < 0.02


def test_precision_keeps_the_layers_that_it_is_told_to_keep() -> None:
    model = picture()
    seen: dict[str, torch.dtype] = {}
    changed = shaped(model, {"precision": "bf16", "mode": "cast", "modules": {"head": "fp32"}})
    for path, module in changed.module.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            seen[paths.user_path(path)] = module.weight.dtype
    assert seen == {"stem": torch.bfloat16, "body": torch.bfloat16, "head.inner": torch.float32}


def test_precision_under_autocast_keeps_a_layer_in_float() -> None:
    model = picture()
    given = tensors_of("picture", 4)
    every = error(expected(shaped(model, {"precision": "bf16"}), given), expected(model, given))
    most = error(expected(shaped(model, {"precision": "bf16", "keep": ["*"]}), given), expected(model, given))
    assert most < 1e-6 < every


class Branches(nn.Module):
    """A list of modules, and one whose weight is read past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.tied = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch in self.branches:
            x = branch(x)
        return torch.nn.functional.linear(self.tied(x), self.tied.weight.float().T.to(x.dtype))


@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_lists_of_modules_and_weights_that_others_read_are_kept_too(mode: str) -> None:
    model = capture(Branches().eval(), torch.randn(4, 4))
    options: Options = {"precision": "bf16", "mode": mode, "modules": {"branches": "fp32", "tied": "fp32"}}
    changed = shaped(model, options)
    given = torch.randn(3, 4)
    assert torch.allclose(changed.module(given)[0], model.module(given)[0], atol=0.05)
    weights = [part.weight.dtype for part in changed.module.modules() if isinstance(part, nn.Linear)]
    assert weights == [torch.float32] * 3
    again = plugins.load("transforms", name="unshare").apply(changed, options={})
    assert torch.equal(again.module(given)[0], changed.module(given)[0])


def test_volumes_are_laid_out_too() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (1, 4)), nn.Conv3d(1, 4, 3))
    given = torch.randn(2, 3, 8, 8)
    model = capture(body.eval(), given)
    last = shaped(model, {"channels_last": True})
    assert torch.allclose(last.module(given)[0], model.module(given)[0], atol=1e-5)
    inner: Any = last.module.inner
    assert inner[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert inner[2].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert all(layer.weight.is_contiguous() for layer in body if isinstance(layer, nn.Conv2d | nn.Conv3d))


class Pixels(nn.Module):
    """Makes float32 of bytes itself, as a model with its own pre-processing does, and spares a layer's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = self.stem((image.float() - 118.0) / 58.0).mean((2, 3)) + self.shift
        answer: torch.Tensor = self.head(found)
        return answer


@pytest.mark.parametrize("keep", [[], ["head"]])
def test_float32_that_the_model_makes_itself_is_narrowed_at_the_next_layer(keep: list[str]) -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 255, (2, 3, 12, 12), dtype=torch.uint8)
    model = capture(Pixels().eval(), (image,), name="pixels")
    changed = shaped(model, {"precision": "fp16", "mode": "cast", "keep": keep})
    exported = torch.export.export(changed.module, (image,), strict=False)
    assert "convolution" in str(exported.run_decompositions().graph)
    with torch.no_grad():
        (answer,), (wanted,) = exported.module()(image), model.module(image)
    assert answer.dtype == torch.float32
    assert 1e-6 < error({"a": answer.numpy()}, {"a": wanted.numpy()}) < 0.01
