"""Quantization-aware fine-tuning: the loop sees simulated int8, the result is a float model that int8 hurts less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchship.errors import OptimizeError
from torchship.optimize.capture import capture
from torchship.optimize.config import Distill
from torchship.optimize.sensitivity import round_signed
from torchship.optimize.strategies.finetuning import tune


def module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def test_the_loop_trains_under_simulated_int8_and_weights_come_back_float() -> None:
    given = module()
    model = capture(given, torch.randn(4, 8))
    losses = []

    def loop(student: Any, distill: Distill) -> None:
        assert isinstance(student, nn.Sequential)
        assert student.training
        assert not student[1].training
        weight: Any = student[0].weight
        assert torch.allclose(weight, round_signed(weight.detach(), axis=0), atol=1e-6), "the loop sees rounded weights"
        optimizer = torch.optim.SGD(student.parameters(), lr=0.02)
        torch.manual_seed(1)
        x = torch.randn(64, 8)
        for _ in range(30):
            optimizer.zero_grad()
            loss: Any = distill(student(x), x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    tuned = tune(model, loop)
    assert losses[-1] < losses[0]
    assert list(tuned.module.state_dict()) == list(model.module.state_dict())
    assert not tuned.module.training
    assert not any(p.requires_grad for p in tuned.module.parameters())
    inner: list[Any] = [made.module.inner for made in (model, tuned)]
    before, after = (layers[0].weight for layers in inner)
    assert not torch.equal(before, after)
    assert torch.equal(before, given.get_parameter("0.weight")), "the captured model is left alone"
    x = torch.randn(5, 8)
    assert torch.allclose(tuned.module(x)[0], model.module(x)[0], atol=0.2)


def test_a_loop_that_fails_or_diverges_is_named() -> None:
    model = capture(module(), torch.randn(4, 8))

    def broken(student: nn.Module, distill: Distill) -> None:
        raise ValueError("no data")

    def diverging(student: nn.Module, distill: Distill) -> None:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.fill_(float("nan"))

    with pytest.raises(OptimizeError, match="loop failed: ValueError: no data"):
        tune(model, broken)
    with pytest.raises(OptimizeError, match="NaN or infinity in 0"):
        tune(model, diverging)
