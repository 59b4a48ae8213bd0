"""Modules that fuse their own branches are served fused, where that changes no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchship.model import Model
from torchship.optimize.capture import capture


class RepVgg(nn.Module):
    """3x3, 1x1 and identity, each with a batch norm, that become one 3x3 convolution."""

    fault = 1.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense: Any = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point: Any = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.same: Any = nn.BatchNorm2d(width)
        for norm in (self.dense[1], self.point[1], self.same):
            norm.running_mean, norm.running_var = torch.randn(width), torch.rand(width) + 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, width, h, w], the same shape."""
        x = self.whole(x) if hasattr(self, "whole") else self.dense(x) + self.point(x) + self.same(x)
        return torch.relu(x)

    def switch_to_deploy(self) -> None:
        """One convolution in place of three branches."""
        if hasattr(self, "whole"):
            return
        width = self.same.num_features
        kernel, bias = torch.zeros(width, width, 3, 3), torch.zeros(width)
        pads: dict[Any, Any] = {self.dense[1]: self.dense[0].weight}
        pads[self.point[1]] = nn.functional.pad(self.point[0].weight, [1] * 4)
        pads[self.same] = nn.functional.pad(torch.eye(width)[:, :, None, None], [1] * 4)
        for norm, weight in pads.items():
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            kernel += weight * scale[:, None, None, None]
            bias += norm.bias - norm.running_mean * scale
        whole: Any = nn.Conv2d(width, width, 3, padding=1)
        whole.weight.data, whole.bias.data = kernel * self.fault, bias
        self.whole = whole
        del self.dense, self.point, self.same


class Broken(RepVgg):
    """Its fusion is off by a tenth."""

    fault = 1.1


class Asks(RepVgg):
    """Its method cannot be called without arguments."""

    def switch_to_deploy(self, how: str) -> None:  # type: ignore[override]
        """Never called."""
        raise AssertionError(how)


class Raises(RepVgg):
    """Its method fails."""

    def switch_to_deploy(self) -> None:
        """Fails."""
        raise RuntimeError("no weights")


def captured(kind: type[RepVgg]) -> tuple[nn.Module, Model]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8), kind(8)).eval()
    return net, capture(net, torch.randn(2, 3, 6, 6))


def noted(model: Model) -> list[str]:
    flat: Any = model.module
    return list(flat.notes)


def convolutions(model: Model) -> int:
    return sum(isinstance(part, nn.Conv2d) for part in model.module.modules())


def test_branches_become_one_convolution_and_the_users_module_stays() -> None:
    net, model = captured(RepVgg)
    assert convolutions(model) == 3
    assert sum(isinstance(part, nn.Conv2d) for part in net.modules()) == 5
    x = torch.randn(2, 3, 6, 6)
    (found,) = model.module(x)
    torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-4)
    assert "2 modules were fused by their own switch_to_deploy" in " ".join(noted(model))


def test_what_was_fused_can_be_fine_tuned() -> None:
    _, model = captured(RepVgg)
    model.module.requires_grad_(True)
    answer: Any = model.module(torch.randn(2, 3, 6, 6))[0].sum()
    answer.backward()
    assert all(weight.grad is not None for weight in model.module.parameters())


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Broken, "after switch_to_deploy the answers are off by"), (Raises, "switch_to_deploy fails: "), (Asks, "")],
)
def test_what_fuses_wrongly_fails_or_asks_for_more_stays_as_it_is(kind: type[RepVgg], words: str) -> None:
    net, model = captured(kind)
    assert convolutions(model) == 5
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(model.module(x)[0], net(x))
    notes = " ".join(noted(model))
    assert words in notes
    assert ("not re-parameterized" in notes) == bool(words)
