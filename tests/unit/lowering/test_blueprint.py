"""Blueprints: a module as plain data and back, what they refuse, and the part of a script that classes need."""

from __future__ import annotations

import enum
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from torchship.errors import BuildFailed, NotFound
from torchship.lowering import blueprint
from torchship.lowering.blueprint import Blueprint, excerpt


class Kind(enum.Enum):
    SOFT = 1


class Sizes(NamedTuple):
    first: int
    second: float


class Everything(nn.Module):
    """Attributes of every kind that a blueprint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.kind, self.sizes, self.limit = Kind.SOFT, Sizes(2, 0.5), float("inf")
        self.act, self.norm = torch.nn.functional.gelu, partial(nn.LayerNorm, eps=1e-3)
        self.scale: torch.Tensor
        self.table, self.loose = np.arange(4), torch.randn(3)
        self.dtype, self.where = torch.float32, torch.device("cpu")
        self.rnn = nn.LSTM(4, 4, bidirectional=True)
        self.layers = nn.ModuleDict({"a": nn.Linear(4, 4)})
        self.again, self.me = self.layers["a"], [self.layers]
        self.spectrum = nn.Parameter(torch.randn(2, dtype=torch.complex64))
        self.register_buffer("scale", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.act(self.layers["a"](self.rnn(x)[0][..., :4])) * self.scale.sum() * self.table[1]
        return out


def there_and_back(module: nn.Module) -> nn.Module:
    drawn = blueprint.draw(module)
    plain = msgspec.json.decode(msgspec.json.encode(drawn.blueprint), type=Blueprint)
    found: nn.Module = blueprint.raise_up(plain, {name: tensor.clone() for name, tensor in drawn.tensors.items()})
    return found


def test_a_module_comes_back_whole() -> None:
    module = Everything().eval()
    found = there_and_back(module)
    assert isinstance(found, Everything)
    assert found.again is found.layers["a"]
    assert found.me[0] is found.layers
    assert (found.kind, found.sizes, found.limit, found.dtype) == (Kind.SOFT, (2, 0.5), float("inf"), torch.float32)
    assert "scale" not in found.state_dict()
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(found(x), module(x))
    assert torch.equal(found.spectrum, module.spectrum)


def test_what_is_no_data_is_refused_by_its_path() -> None:
    hooked = nn.Sequential(nn.Linear(2, 2))
    hooked[0].register_forward_hook(lambda part, given, out: out)
    with pytest.raises(BuildFailed, match=r"^0 is a module with forward hooks"):
        blueprint.draw(hooked)
    odd = nn.Sequential(nn.Linear(2, 2))
    vars(odd)["act"] = lambda x: x
    with pytest.raises(BuildFailed, match=r"^act is .*<lambda>, which no import finds"):
        blueprint.draw(odd)


def test_a_class_that_is_gone_is_named() -> None:
    drawn = blueprint.draw(nn.Sequential())
    gone = Blueprint(drawn.blueprint.root, [blueprint.Part("nowhere.at_all:Net", {})])
    with pytest.raises(NotFound, match=r"nowhere\.at_all:Net"):
        blueprint.raise_up(gone, {})


SCRIPT = """
from __future__ import annotations
import os, sys
import torch

WIDTH = 4
OTHER = expensive()

def double(x):
    return x * WIDTH

@torch.no_grad
class Net(Base):
    def forward(self, x):
        return double(x)

class Base(torch.nn.Module):
    pass

net = Net()
train(net)
if __name__ == "__main__":
    sys.exit(0)
"""


def test_an_excerpt_holds_what_the_classes_need_and_nothing_that_runs() -> None:
    found = excerpt(SCRIPT, names=["Net"], file="script.py")
    for kept in ("import annotations", "import torch", "WIDTH = 4", "def double", "@torch.no_grad", "class Base"):
        assert kept in found
    for dropped in ("expensive", "train", "net =", "exit", "import os"):
        assert dropped not in found
    with pytest.raises(BuildFailed, match=r"Missing is not defined at the top of script\.py"):
        excerpt(SCRIPT, names=["Missing"], file="script.py")
