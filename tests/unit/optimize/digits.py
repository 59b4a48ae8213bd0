"""A small classifier of scikit-learn's pictures of digits, trained in seconds, and its data with labels."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchship.optimize import search
from torchship.optimize.channels import Prune
from torchship.optimize.measure import Effort
from torchship.optimize.report import Report

WISH = Prune(0.5, rounds=2, importance="taylor", epochs=6)
QUICK = Effort(seconds=0.02, calls=5, fewest=2, warm_up=0.01, max_batch=4)


@cache
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [1797, 1, 8, 8] of values up to 1, and what they show."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(y)


def network() -> nn.Sequential:
    """Two convolutions and a head, with random weights."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


@cache
def trained() -> nn.Sequential:
    """The network after four epochs on 1,000 pictures; the same each time."""
    torch.manual_seed(0)
    net, (x, y) = network().train(), pictures()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(4):
        for start in range(0, 1000, 50):
            loss = nn.functional.cross_entropy(net(x[start : start + 50]), y[start : start + 50])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 50 with labels."""
    x, y = pictures()
    for start in range(0, 1750, 50):
        yield x[start : start + 50], y[start : start + 50]


def optimize(folder: Path, **more: Any) -> Report:
    """A search for a pruned one by ONNX Runtime in fp32 and int8."""
    settings: dict[str, Any] = {
        "calibration": list(pairs()), "backends": ["onnxruntime"], "goal": "size", "max_drop": 0.1, "effort": QUICK,
        "cache": folder / "cache", "store": folder / "store", "prune": WISH, "threads": 1, "name": "digits", **more,
    }  # fmt: skip
    return search.optimize(trained(), pictures()[0][:2], **settings)


def search_until_round(argument: Any) -> None:
    """A search that is killed when its first round is done."""

    def step(words: str, done: int, total: int) -> None:
        if words.startswith("pruned: "):
            os.kill(os.getpid(), signal.SIGKILL)

    optimize(Path(argument), on_step=step)
