"""A network described by Darknet's two files, its cfg and its weights, as an nn.Module of our own.

The kinds of layers of YOLOv3 and YOLOv3-tiny: convolutional, maxpool, route, shortcut, upsample, yolo. The weights
file is a header of three int32 and the number of images seen (int64 from version 0.2 on), then float32: of each
convolution the bias, with batch normalization also scale, mean and variance, then the kernel [out, in, size, size].
Source: Redmon and Farhadi, YOLOv3, 2018, and the format as Darknet's parser reads it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchship.errors import CorruptArtifact, Unsupported

_EPSILON = 1e-5


class Darknet(nn.Module):
    """Pixels UINT8 [n, side, side, 3] RGB to the raw maps of its yolo layers, FP32 [n, anchors * (5 + kinds), h, w].

    They come from the coarsest map to the finest and are named `map0`, `map1` ... What they mean: `yolo.decode`.
    """

    def __init__(self, cfg: Path, weights: Path) -> None:
        """Raises Unsupported for a kind of layer that is not known, CorruptArtifact for weights that do not fit."""
        super().__init__()
        net, *layers = sections(cfg.read_text())
        self.side = int(net["width"])
        self.plan: list[tuple[str, tuple[int, ...]]] = []
        self.layers = nn.ModuleList()
        widths: list[int] = []
        stream = _Weights(weights)
        for index, layer in enumerate(layers):
            kind, before = layer["kind"], widths[-1] if widths else int(net.get("channels", "3"))
            module: nn.Module = nn.Identity()
            sources: tuple[int, ...] = (index - 1,)
            width = before
            if kind == "convolutional":
                width = int(layer["filters"])
                module = _convolution(layer, before, stream)
            elif kind == "maxpool":
                size, stride = int(layer["size"]), int(layer["stride"])
                module = nn.MaxPool2d(size, stride)
                if stride == 1:  # the map keeps its size: its last row and column count twice
                    module = nn.Sequential(nn.ReplicationPad2d((0, size - 1, 0, size - 1)), module)
            elif kind == "upsample":
                module = nn.Upsample(scale_factor=int(layer["stride"]), mode="nearest")
            elif kind in ("route", "shortcut"):
                named = layer["layers"] if kind == "route" else f"-1,{layer['from']}"
                sources = tuple(at if at >= 0 else index + at for at in map(int, named.split(",")))
                width = sum(widths[at] for at in sources) if kind == "route" else before
            elif kind != "yolo":
                raise Unsupported(f"{cfg}: a layer of kind {kind!r}", hint="YOLOv3 and YOLOv3-tiny are understood")
            self.layers.append(module)
            self.plan.append((kind, sources))
            widths.append(width)
        stream.done()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Run on a batch."""
        x = pixels.permute(0, 3, 1, 2).float() / 255
        made: list[Tensor] = []
        maps: dict[str, Tensor] = {}
        for (kind, sources), layer in zip(self.plan, self.layers, strict=True):
            if kind == "route":
                x = torch.cat([made[at] for at in sources], 1) if len(sources) > 1 else made[sources[0]]
            elif kind == "shortcut":
                x = made[sources[0]] + made[sources[1]]
            elif kind == "yolo":
                maps[f"map{len(maps)}"] = x
            else:
                x = layer(x)
            made.append(x)
        return maps


def sections(text: str) -> list[dict[str, str]]:
    """The sections of a cfg, each with its `kind`."""
    found: list[dict[str, str]] = []
    for whole in text.splitlines():
        line = whole.partition("#")[0].strip()
        if line.startswith("["):
            found.append({"kind": line.strip("[]")})
        elif line:
            key, _, value = line.partition("=")
            found[-1][key.strip()] = value.strip()
    return found


class _Weights:
    """The numbers of a weights file, taken in order."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        major, minor = np.frombuffer(data, "<i4", 2)
        head = 12 + (8 if major * 10 + minor >= 2 else 4)
        self._numbers, self._path = np.frombuffer(data, "<f4", offset=head), path
        self._at = 0

    def take(self, *shape: int) -> Tensor:
        """The next ones."""
        count = int(np.prod(shape))
        chunk = self._numbers[self._at : self._at + count]
        if len(chunk) != count:
            raise CorruptArtifact(f"{self._path} ends early", hint="cfg and weights must be of one network")
        self._at += count
        return torch.from_numpy(chunk.reshape(shape).copy())

    def done(self) -> None:
        """All of them must have been taken."""
        if self._at != len(self._numbers):
            raise CorruptArtifact(
                f"{self._path} holds {len(self._numbers) - self._at} numbers too many",
                hint="cfg and weights must be of one network",
            )


def _convolution(layer: dict[str, str], before: int, stream: _Weights) -> nn.Module:
    """A convolution with its batch normalization folded in, and its activation."""
    width, size = int(layer["filters"]), int(layer["size"])
    padding = size // 2 if layer.get("pad") == "1" else 0
    bias = stream.take(width)
    if layer.get("batch_normalize") == "1":
        scale, mean, variance = (stream.take(width) for _ in range(3))
        kernel = stream.take(width, before, size, size)
        gain = scale / torch.sqrt(variance + _EPSILON)
        kernel, bias = kernel * gain.view(-1, 1, 1, 1), bias - mean * gain
    else:
        kernel = stream.take(width, before, size, size)
    made = nn.Conv2d(before, width, size, stride=int(layer["stride"]), padding=padding)
    made.load_state_dict({"weight": kernel, "bias": bias})
    activation = layer.get("activation", "linear")
    if activation not in ("linear", "leaky"):
        raise Unsupported(f"activation {activation!r}", hint="linear and leaky are understood")
    return nn.Sequential(made, nn.LeakyReLU(0.1)) if activation == "leaky" else made
