"""The face models as nn.Modules with their preprocessing inside: what goes in is bytes of pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from torchship.migrate.onnx_module import OnnxModule


class Detector(nn.Module):
    """RetinaFace: canvas UINT8 [n, side, side, 3] RGB to loc [n, a, 4], face [n, a], landmarks [n, a, 10].

    `face` is a probability, the other two are relative to the anchors: `torchship.stages.faces:Find` makes
    pixels of them.
    """

    mean: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.net = OnnxModule(path)
        self.register_buffer("mean", torch.tensor([104.0, 117.0, 127.0]).view(1, 3, 1, 1))

    def forward(self, canvas: Tensor) -> dict[str, Tensor]:
        """Run on a batch of canvases."""
        x = canvas.permute(0, 3, 1, 2).float()
        loc, scores, landmarks = self.net(torch.cat([x[:, 2:3], x[:, 1:2], x[:, 0:1]], 1) - self.mean)
        return {"loc": loc, "face": scores[..., 1], "landmarks": landmarks}


class Embedder(nn.Module):
    """Chips UINT8 [n, side, side, 3] RGB to unit vectors `embedding` [n, width]."""

    def __init__(self, path: str | Path, *, bgr: bool = True) -> None:
        super().__init__()
        self.net = OnnxModule(path)
        self.bgr = bgr

    def forward(self, chip: Tensor) -> dict[str, Tensor]:
        """Run on a batch of chips."""
        x = (chip.permute(0, 3, 1, 2).float() - 127.0) / 128.0
        if self.bgr:
            x = torch.cat([x[:, 2:3], x[:, 1:2], x[:, 0:1]], 1)
        (raw,) = self.net(x)
        return {"embedding": torch.nn.functional.normalize(raw, dim=1)}
