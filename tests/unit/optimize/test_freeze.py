"""Freezing: weights that are computed become plain ones, hooks keep to the copy, the original stays as it was."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from torchship.optimize import freeze


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 3))


def pruned() -> nn.Module:
    layer = nn.Linear(4, 3)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        old_weight_norm(),
        pruned(),
        parametrizations.weight_norm(nn.Linear(4, 3)),
        parametrizations.spectral_norm(nn.Linear(4, 3)),
        parametrizations.orthogonal(nn.Linear(4, 3)),
    ],
)
def test_computed_weights_become_plain_ones(layer: nn.Module) -> None:
    module, x = nn.Sequential(layer), torch.randn(5, 4)
    before = list(module.state_dict())
    module(x)  # the hooks of the old ways leave a computed tensor behind
    made = freeze.frozen(module)
    assert sorted(made.state_dict()) == ["0.bias", "0.weight"]
    assert type(made[0]) is nn.Linear  # type: ignore[index]
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(made(x), module(x))
    assert list(module.state_dict()) == before


def test_hooks_write_into_the_copy() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.seen: dict[str, torch.Tensor] = {}
            self.layer.register_forward_hook(lambda module, args, out: self.seen.update(out=out))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.layer(x)
            return self.seen["out"]

    module = Tapped()
    made = freeze.frozen(module)
    x = torch.randn(2, 4)
    torch.testing.assert_close(made(x), module.layer(x).detach())
    assert module.seen["out"].requires_grad


def test_what_forward_keeps_is_given_back() -> None:
    class Keeping(nn.Module):
        count: Any

        def __init__(self) -> None:
            super().__init__()
            self.table: Any = None
            self.log: list[int] = []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            self.table, self.late = x * 2, True
            self.log.append(len(x))
            return x + 1

    module: Any = freeze.frozen(Keeping())
    log, restore = module.log, freeze.remember(module)
    module(torch.zeros(2))
    assert restore() == ["count"]
    assert module.table is None
    assert module.log is log
    assert not log
    assert not hasattr(module, "late")
    assert module.count == 0
    assert restore() == []


def test_torchscript_that_was_trained_is_taken() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), torch.randn(2, 4))
    made = freeze.frozen(script)
    assert not any(weight.requires_grad for weight in made.parameters())
    assert freeze.remember(made)() == []


def test_compiled_parts_and_idle_hooks_are_left_behind() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager")
            self.second = parametrizations.weight_norm(nn.Linear(4, 3))
            self.second.compile(backend="eager")

        def forward(self, x: torch.Tensor) -> Any:
            return self.second(self.first(x))

    module: Any = Model()
    made: Any = freeze.frozen(module)
    assert type(made.first) is nn.Sequential
    assert made.second._compiled_call_impl is None
    assert not made.second._load_state_dict_pre_hooks
    assert type(module.first) is not nn.Sequential
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(made(x), nn.Module.__call__(module.second, module.first._orig_mod(x)))


def test_hooks_that_forward_registers_are_given_back() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()
            self.ready = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.ready:
                self.ready = True
                self.part.register_forward_hook(lambda part, given, out: out + 1)
            return self.part(x)  # type: ignore[no-any-return]

    module: Any = freeze.frozen(Late())
    restore = freeze.remember(module)
    module(torch.zeros(1))
    restore()
    assert not module.part._forward_hooks
    assert module(torch.zeros(1)).item() == 1
