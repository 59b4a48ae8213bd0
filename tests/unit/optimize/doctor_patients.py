"""Modules that export badly, each for one reason; the doctor's tests name the line that is at fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Healthy(nn.Module):
    """Exports by every route."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


class DataIf(nn.Module):
    """Branches on a value."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # FAULT
            return x * 2
        return x - 1


class Item(nn.Module):
    """Takes a number out of a tensor and counts with it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = int(x.abs().max().item())  # FAULT
        for _ in range(count):
            x = x * 0.5
        return x


class Numpy(nn.Module):
    """Leaves torch on the way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import numpy as np

        peak = np.percentile(x.numpy(), 90)  # FAULT
        scaled: torch.Tensor = x / float(peak)
        return scaled


class InPlaceView(nn.Module):
    """Writes into a view of its own input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head = x[:, :2]
        head.add_(1.0)  # FAULT
        return x * 2


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        grad: torch.Tensor = 2 * x * grads[0]
        return grad


class CustomFunction(nn.Module):
    """Calls an autograd Function of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Square.apply(x)  # FAULT
        return out


class SideEffect(nn.Module):
    """Remembers what it has seen in a Python list and prints."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach())  # FAULT
        self.calls += 1
        print("called", self.calls)
        return x + 1


class FixedBatch(nn.Module):
    """Its batch size is written into the code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, 8).sum(1)  # FAULT


class AssertsBatch(nn.Module):
    """Asserts on a free axis."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] % 2 == 0:  # FAULT
            return x * 2
        return x * 3


class Mask(nn.Module):
    """Picks as many values as there are: the output's length depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[x > 0]  # FAULT
        if len(kept) == 0:
            return x.sum()
        return kept.sum()


class Catches(nn.Module):
    """Uses try and except."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            return x @ x  # FAULT
        except RuntimeError:
            return x


class Random(nn.Module):
    """Two runs differ."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)  # FAULT


class Special(nn.Module):
    """Uses an operator that ONNX does not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.special.bessel_j0(x)  # FAULT
        return out


class WrongDtype(nn.Module):
    """Has a weight in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight  # FAULT


class Break(nn.Module):
    """Breaks the graph but runs on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()  # FAULT
        return x + 1


class Kwargs(nn.Module):
    """Valid Python that TorchScript cannot read."""

    def forward(self, x: torch.Tensor, **options: float) -> torch.Tensor:  # FAULT
        out: torch.Tensor = x * options.get("scale", 2.0)
        return out


class Closure(nn.Module):
    """Lambdas, f-strings with specs and comprehensions over dicts."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scale: Callable[[torch.Tensor], torch.Tensor] = lambda value: value * 2  # noqa: E731  # FAULT
        return {f"out{i}": scale(x) + i for i in range(2)}


class Crash(nn.Module):
    """Kills the process when it is traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            import os
            import signal

            os.kill(os.getpid(), signal.SIGSEGV)
        return x + 1


class Odd(nn.Module):
    """In train mode, with a shared part, a loose tensor, a turned weight, a huge buffer, and a dropout of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(8, 8), self.first[1])
        self.norm = nn.BatchNorm1d(8)
        self.turned = nn.Parameter(torch.ones(4, 8).t())
        self.offset = torch.ones(8)
        self.register_buffer("table", torch.zeros(1024, 1024 * 5))
        self.train()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x)) + self.offset
        return nn.functional.dropout(self.norm(x), 0.0) @ self.turned


class ViewOnly(nn.Module):
    """Takes contiguous inputs only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1) * 2  # FAULT


class Double(nn.Module):
    """Computes in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 2).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x.double())
        return out.float()


class Halved(nn.Module):
    """Loops until a value is small."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        while x.norm() > 1:  # FAULT
            x = x / 2
        return x


class Asserts(nn.Module):
    """Asserts on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert (x.abs() < 100).all(), "too large"  # FAULT
        return x * 2


class Steps(nn.Module):
    """Goes over a free axis step by step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = [x[0]]
        for step in range(1, x.shape[0]):  # FAULT
            out.append(out[-1] + x[step])
        return torch.stack(out)


@torch.library.custom_op("torchship_patient::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    """An operator that says nothing about its output's shape."""
    return x * 2


class NoFake(nn.Module):
    """Calls an operator without a fake."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.torchship_patient.twice(x)  # FAULT
        return out


CALLS: list[float] = []


class Remembers(nn.Module):
    """Counts its calls in an object of the module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CALLS.append(1.0)  # FAULT
        return x * len(CALLS)


class NeverEval(nn.Module):
    """Keeps its dropout on whatever it is told, and calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> NeverEval:
        return super().train(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.drop(self.layer(self.layer(x)))
        return out


class Recurrent(nn.Module):
    """Runs an LSTM over a free axis."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.cells(x)[0]  # FAULT
        return out


class Encoder(nn.Module):
    """A transformer layer, which torch runs as one operator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x[:, None])[:, 0]
        return out
