"""A cascade that decides by its data: sure rows leave early, the others go through the large part."""

from __future__ import annotations

import torch
from torch import nn


class Cascade(nn.Module):
    """`x` FP32 [rows, 32] to logits [rows, 10]. As researchers write it: a Python `if` on a value of a tensor."""

    def __init__(self, *, sure: float = 0.9) -> None:
        super().__init__()
        self.sure = sure
        self.small = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))
        self.large = nn.Sequential(nn.Linear(32, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quick: torch.Tensor = self.small(x)
        if quick.softmax(1).amax(1).min() > self.sure:
            return quick
        full: torch.Tensor = quick + self.large(x)
        return full


class Chosen(Cascade):
    """The same answers without a branch, as the doctor proposes: both parts run, each batch picks one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quick = self.small(x)
        return torch.where(quick.softmax(1).amax(1).min() > self.sure, quick, quick + self.large(x))


class Conditional(Cascade):
    """The same answers with the branch in the graph: torch.cond runs one part only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quick = self.small(x)
        sure = quick.softmax(1).amax(1).min() > self.sure
        out: torch.Tensor = torch.cond(sure, lambda q, _: q.clone(), lambda q, y: q + self.large(y), (quick, x))
        return out


class Routed(Cascade):
    """Row by row, in Python that no exporter reads: only the unsure rows go through the large part."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quick: torch.Tensor = self.small(x)
        sure = quick.softmax(1).amax(1).tolist()
        rows = [row for row, score in enumerate(sure) if score <= self.sure]
        if rows:
            quick[rows] += self.large(x[rows])
        return quick


def _seeded(kind: type[Cascade]) -> Cascade:
    torch.manual_seed(0)
    module = kind()
    with torch.no_grad():
        for weight in module.small[2].parameters():
            weight.mul_(30)  # some rows are sure, some are not
    return module.eval()


def cascade() -> Cascade:
    """With the Python branch."""
    return _seeded(Cascade)


def chosen() -> Cascade:
    """Rewritten with torch.where."""
    return _seeded(Chosen)


def routed() -> Cascade:
    """Row by row, with Python lists."""
    return _seeded(Routed)


def conditional() -> Cascade:
    """Rewritten with torch.cond."""
    return _seeded(Conditional)
