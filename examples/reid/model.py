"""ResNet50-IBN-a and OSNet, written from the papers, and the small embedder that `examples.reid.train` trains.

- X. Pan, P. Luo, J. Shi, X. Tang: Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, ECCV 2018,
  arXiv:1807.09441. IBN-a: in conv2_x to conv4_x the first normalization of each residual branch is instance
  normalization for one half of the channels and batch normalization for the other. It has as many parameters as
  ResNet50: 25.6 M with 1,000 classes.
- K. Zhou, Y. Yang, A. Cavallaro, T. Xiang: Omni-Scale Feature Learning for Person Re-Identification, ICCV 2019,
  arXiv:1905.00953. 2.2 M parameters.

Nobody's weights are here: the two large ones are for sizes and speeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

HEIGHT, WIDTH = 128, 64
FEATURES = 128
WEIGHTS = Path(__file__).parent / "street.safetensors"
_MEAN, _STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)


class InstanceBatchNorm(nn.Module):
    """Instance normalization for the first half of the channels, batch normalization for the rest (IBN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.instances = channels // 2
        self.instance = nn.InstanceNorm2d(self.instances, affine=True)
        self.batch = nn.BatchNorm2d(channels - self.instances)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, rest = x[:, : self.instances], x[:, self.instances :]
        return torch.cat([self.instance(first), self.batch(rest)], dim=1)


class ResidualUnit(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut; the first normalization is IBN where `ibn` is set."""

    def __init__(self, inner: int, width: int, *, stride: int, ibn: bool) -> None:
        super().__init__()
        outer = 4 * width
        self.branch = nn.Sequential(
            nn.Conv2d(inner, width, 1, bias=False),
            InstanceBatchNorm(width) if ibn else nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outer, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        self.last = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.branch(x) + self.shortcut(x))
        return y


class ResNet50IBN(nn.Module):
    """ResNet50 with IBN-a. With `classes` 0 it gives the 2,048 pooled features, of length 1."""

    def __init__(self, *, classes: int = 0, last_stride: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        inner = 64
        for width, units, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, last_stride)):
            for unit in range(units):
                layers.append(ResidualUnit(inner, width, stride=1 if unit else stride, ibn=width < 512))
                inner = 4 * width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(inner, classes) if classes else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        features = self.trunk(image).mean((2, 3))
        if self.head is not None:
            logits: torch.Tensor = self.head(features)
            return logits
        return functional.normalize(features)


def convolved(inner: int, outer: int, *, kernel: int = 1, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """A convolution, batch normalization, and ReLU where that is wanted."""
    layers: list[nn.Module] = [nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outer)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


class Lite(nn.Module):
    """Lite 3x3 (section 3.1): a pointwise convolution without an activation, then a depthwise one of 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


class Gate(nn.Module):
    """The unified aggregation gate (section 3.2): one small network weighs the channels of every stream."""

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.weigh = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x * self.weigh(x.mean((2, 3), keepdim=True))
        return y


class OmniScale(nn.Module):
    """The bottleneck of OSNet: streams of one to four Lite 3x3, so of four sizes, joined by one gate."""

    def __init__(self, inner: int, outer: int, *, streams: int = 4) -> None:
        super().__init__()
        middle = outer // 4
        self.narrow = convolved(inner, middle)
        self.streams = nn.ModuleList(nn.Sequential(*(Lite(middle) for _ in range(n + 1))) for n in range(streams))
        self.gate = Gate(middle)
        self.widen = convolved(middle, outer, relu=False)
        self.shortcut: nn.Module = convolved(inner, outer, relu=False) if inner != outer else nn.Identity()
        self.last = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.narrow(x)
        joined = sum((self.gate(stream(narrow)) for stream in self.streams), start=torch.zeros_like(narrow))
        y: torch.Tensor = self.last(self.widen(joined) + self.shortcut(x))
        return y


class OSNet(nn.Module):
    """OSNet (table 1). With `classes` 0 it gives its features, of length 1."""

    def __init__(self, *, channels: Sequence[int] = (64, 256, 384, 512), features: int = 512, classes: int = 0) -> None:
        super().__init__()
        first, second, third, fourth = channels
        self.trunk = nn.Sequential(
            convolved(3, first, kernel=7, stride=2),
            nn.MaxPool2d(3, 2, 1),
            OmniScale(first, second),
            OmniScale(second, second),
            convolved(second, second),
            nn.AvgPool2d(2),
            OmniScale(second, third),
            OmniScale(third, third),
            convolved(third, third),
            nn.AvgPool2d(2),
            OmniScale(third, fourth),
            OmniScale(fourth, fourth),
            convolved(fourth, fourth),
        )
        self.features = nn.Sequential(nn.Linear(fourth, features), nn.BatchNorm1d(features), nn.ReLU())
        self.head = nn.Linear(features, classes) if classes else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = self.features(self.trunk(image).mean((2, 3)))
        if self.head is not None:
            logits: torch.Tensor = self.head(found)
            return logits
        return functional.normalize(found)


class StreetEmbedder(nn.Module):
    """A quarter of OSNet's channels, with the pictures' halves and quarters pooled apart; takes crops as bytes.

    `crop` is uint8 [rows, 128, 64, 3]; the answer [rows, 128] has length 1.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, *, channels: Sequence[int] = (16, 64, 96, 128), stripes: int = 4) -> None:
        super().__init__()
        self.net = OSNet(channels=channels).trunk
        self.stripes = stripes
        self.features = nn.Linear(channels[-1] * stripes, FEATURES)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))

    def forward(self, crop: torch.Tensor) -> torch.Tensor:
        return self.embed((crop.permute(0, 3, 1, 2).float() - self.mean) / self.std)

    def embed(self, image: torch.Tensor) -> torch.Tensor:
        """The same for normalized pictures [rows, 3, 128, 64]."""
        maps = self.net(image)
        rows, channels, height, _ = maps.shape
        pooled = maps.reshape(rows, channels, self.stripes, height // self.stripes, -1).mean((3, 4))
        return functional.normalize(self.features(pooled.flatten(1)))


def resnet50_ibn_a() -> nn.Module:
    """Random weights, 256x128 pictures, 1,000 classes: the size of the mission's model."""
    torch.manual_seed(0)
    return ResNet50IBN(classes=1000).eval()


def osnet() -> nn.Module:
    """OSNet with random weights, 256x128 pictures."""
    torch.manual_seed(0)
    return OSNet().eval()


def street() -> nn.Module:
    """The small embedder with the weights of `python -m examples.reid.train`."""
    from safetensors.torch import load_file

    model = StreetEmbedder()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
