"""A detector of Backbone, Neck and Head; backbones are swapped by name, and every part is an nn.Module of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

CLASSES = ("circle", "square", "triangle")
STRIDES = (8, 16, 32)
WEIGHTS = Path(__file__).parent / "csp.safetensors"


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(self, given: int, out: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(given, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.SiLU())


class Csp(nn.Module):
    """Cross stage partial: half of the channels pass two residual convolutions, the rest goes around (CSPNet, 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.around = Conv(channels, half, 1)
        self.through = Conv(channels, half, 1)
        self.first = Conv(half, half)
        self.second = Conv(half, half)
        self.join = Conv(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        through = self.through(x)
        through = through + self.second(self.first(through))
        return cast(torch.Tensor, self.join(torch.cat((self.around(x), through), 1)))


class CspBackbone(nn.Module):
    """Our own: four strided convolutions with a CSP block after each."""

    channels = (48, 72, 96)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv(3, 16, 3, 2), Conv(16, 32, 3, 2))
        self.stage3 = nn.Sequential(Conv(32, 48, 3, 2), Csp(48))
        self.stage4 = nn.Sequential(Conv(48, 72, 3, 2), Csp(72))
        self.stage5 = nn.Sequential(Conv(72, 96, 3, 2), Csp(96))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        third = self.stage3(self.stem(x))
        fourth = self.stage4(third)
        return third, fourth, self.stage5(fourth)


class Tapped(nn.Module):
    """A torchvision classifier's features, tapped after three of its blocks (strides 8, 16 and 32)."""

    def __init__(self, features: nn.Sequential, *, taps: tuple[int, int, int], channels: tuple[int, int, int]) -> None:
        super().__init__()
        low, middle, high = (tap + 1 for tap in taps)
        blocks = list(features)
        self.low = nn.Sequential(*blocks[:low])
        self.middle = nn.Sequential(*blocks[low:middle])
        self.high = nn.Sequential(*blocks[middle:high])
        self.channels = channels

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        low = self.low(x)
        middle = self.middle(low)
        return low, middle, self.high(middle)


def _mobilenet() -> Tapped:
    from torchvision.models import mobilenet_v3_small

    return Tapped(mobilenet_v3_small(weights=None).features, taps=(3, 8, 12), channels=(24, 48, 576))


def _efficientnet() -> Tapped:
    from torchvision.models import efficientnet_b0

    return Tapped(efficientnet_b0(weights=None).features, taps=(3, 5, 7), channels=(40, 112, 320))


BACKBONES: dict[str, Callable[[], CspBackbone | Tapped]] = {
    "csp": CspBackbone,
    "mobilenet": _mobilenet,
    "efficientnet": _efficientnet,
}


class Neck(nn.Module):
    """Path aggregation: what is coarse goes down to the fine levels, then up again (PANet, 2018)."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(Conv(count, width, 1) for count in channels)
        self.down = nn.ModuleList(Conv(width, width) for _ in channels[1:])
        self.up = nn.ModuleList(Conv(width, width, 3, 2) for _ in channels[1:])

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for index in (1, 0):
            coarse = nn.functional.interpolate(found[index + 1], scale_factor=2.0, mode="nearest")
            found[index] = self.down[index](found[index] + coarse)
        for index in (1, 2):
            found[index] = found[index] + self.up[index - 1](found[index - 1])
        return found


class Head(nn.Module):
    """Without anchors: for each cell class scores, and distances to the four sides of a box (FCOS, 2019)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.scores = nn.ModuleList(nn.Sequential(Conv(width, width), nn.Conv2d(width, classes, 1)) for _ in STRIDES)
        self.sides = nn.ModuleList(nn.Sequential(Conv(width, width), nn.Conv2d(width, 4, 1)) for _ in STRIDES)
        for part in self.scores:
            nn.init.constant_(cast(nn.Conv2d, cast(nn.Sequential, part)[1]).bias, -4.0)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        boxes, scores = [], []
        for level, stride, score, side in zip(levels, STRIDES, self.scores, self.sides, strict=True):
            points = cells(level.shape[2], level.shape[3], stride).to(level.device)
            distances = nn.functional.softplus(side(level).flatten(2).transpose(1, 2)) * stride
            near, far = points - distances[..., :2], points + distances[..., 2:]
            boxes.append(torch.cat((near, far), 2))
            scores.append(score(level).flatten(2).transpose(1, 2))
        return torch.cat(boxes, 1), torch.cat(scores, 1).sigmoid()


def cells(height: int, width: int, stride: int) -> torch.Tensor:
    """The centres of a level's cells in pixels, FP32 [cells, 2] as x and y."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack((x, y), 2).reshape(-1, 2).float() + 0.5) * stride


class Detector(nn.Module):
    """`image` FP32 [rows, 3, SIZE, SIZE] in 0 to 1, to `boxes` [rows, cells, 4] (x, y, x, y in pixels) and `scores`."""

    def __init__(self, backbone: str = "csp", *, classes: int = len(CLASSES), width: int = 64) -> None:
        super().__init__()
        self.backbone = BACKBONES[backbone]()
        self.neck = Neck(self.backbone.channels, width)
        self.head = Head(width, classes)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        boxes, scores = self.head(self.neck(self.backbone(image)))
        return {"boxes": boxes, "scores": scores}


def csp() -> Detector:
    """The trained detector."""
    from safetensors.torch import load_file

    detector = Detector("csp")
    if WEIGHTS.exists():
        detector.load_state_dict({key: value.float() for key, value in load_file(WEIGHTS).items()}, strict=False)
    return detector.eval()


def mobilenet() -> Detector:
    """The same with MobileNetV3's features, not trained: for timing."""
    return Detector("mobilenet").eval()


def efficientnet() -> Detector:
    """The same with EfficientNet-B0's features, not trained: for timing."""
    return Detector("efficientnet").eval()
