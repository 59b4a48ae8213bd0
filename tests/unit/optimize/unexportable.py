"""A model whose forward neither exports nor scripts: Python decides by the data, with things no compiler knows."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Exports by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.b(torch.relu(self.a(x)))) + x


class Searching(nn.Module):
    """Rows go through one of two blocks, sorted out by a Python dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, **options: object) -> dict[str, torch.Tensor]:
        h = self.first(x)
        seen = {index: float(row.sum()) for index, row in enumerate(h)}
        rows = [self.second(h[i : i + 1]) if total > 0 else h[i : i + 1] for i, total in seen.items()]
        return {"scores": self.head(torch.cat(rows))}


def make() -> nn.Module:
    torch.manual_seed(3)
    return Searching()
