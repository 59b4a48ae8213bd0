"""dlib's face recognition network as an nn.Module, its weights read from dlib's own file without dlib."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as fn
from numpy.typing import NDArray
from torch import Tensor, nn

from torchship.errors import CorruptArtifact

SIDE = 150
WIDTH = 128
# (channels, blocks, whether its first block halves the picture), from the picture inwards: dlib's example
# dnn_face_recognition_ex.cpp, read from its last line to its first.
_LEVELS = ((32, 3, False), (64, 4, True), (128, 3, True), (256, 3, True), (256, 1, True))
_PARTS = re.compile(rb"\x01\x05con_4|\x01\x07affine_|\x01\x04fc_2")


class DlibResnet(nn.Module):
    """Chips FP32 [n, 3, 150, 150] RGB, 0 to 255, to vectors [n, 128]: faces of one person are closer than 0.6 (L2)."""

    mean: Tensor

    def __init__(self, path: str | Path) -> None:
        """Raises CorruptArtifact when the file does not hold this network."""
        super().__init__()
        parts = _read(Path(path).read_bytes())
        try:
            self.stem = _convolution(parts, inputs=3, outputs=32, size=7, stride=2)
            inputs, blocks = 32, []
            for outputs, count, halves in _LEVELS:
                for block in range(count):
                    blocks.append(ResidualBlock(parts, inputs=inputs, outputs=outputs, halves=halves and not block))
                    inputs = outputs
            self.blocks = nn.Sequential(*blocks)
            self.last = nn.Parameter(torch.from_numpy(next(parts).reshape(inputs, WIDTH).T.copy()), requires_grad=False)
        except (StopIteration, ValueError) as fault:
            raise CorruptArtifact(f"{path} is not dlib's face recognition network: {fault}") from None
        self.register_buffer("mean", torch.tensor([122.782, 117.001, 104.298]).view(1, 3, 1, 1))

    def forward(self, chip: Tensor) -> Tensor:
        """Run on a batch of chips."""
        x = fn.max_pool2d(torch.relu(self.stem((chip - self.mean) / 256.0)), 3, 2)
        return fn.linear(self.blocks(x).mean((2, 3)), self.last)


class ResidualBlock(nn.Module):
    """Two convolutions and the way around them. dlib adds tensors of two sizes as if the smaller were zero outside."""

    def __init__(self, parts: Iterator[NDArray[np.float32]], *, inputs: int, outputs: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.first = _convolution(parts, inputs=inputs, outputs=outputs, size=3, stride=2 if halves else 1)
        self.second = _convolution(parts, inputs=outputs, outputs=outputs, size=3, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both ways."""
        around = fn.avg_pool2d(x, 2) if self.halves else x
        through = self.second(torch.relu(self.first(x)))
        size = [max(a, b) for a, b in zip(around.shape[1:], through.shape[1:], strict=True)]
        return torch.relu(_padded(around, size) + _padded(through, size))


def _padded(x: Tensor, size: list[int]) -> Tensor:
    channels, height, width = (wanted - has for wanted, has in zip(size, x.shape[1:], strict=True))
    return fn.pad(x, (0, width, 0, height, 0, channels)) if channels or height or width else x


def _convolution(
    parts: Iterator[NDArray[np.float32]], *, inputs: int, outputs: int, size: int, stride: int
) -> nn.Conv2d:
    """The next convolution, with the scale and shift of the affine layer behind it folded in."""
    filters = inputs * outputs * size * size
    weight, bias = np.split(next(parts), [filters])
    scale, shift = next(parts).reshape(2, outputs)
    found = nn.Conv2d(inputs, outputs, size, stride=stride, padding=0 if stride > 1 else size // 2)
    shaped = weight.reshape(outputs, inputs, size, size) * scale[:, None, None, None]
    found.weight = nn.Parameter(torch.from_numpy(shaped), requires_grad=False)
    found.bias = nn.Parameter(torch.from_numpy(bias.reshape(outputs) * scale + shift), requires_grad=False)
    return found


def _read(data: bytes) -> Iterator[NDArray[np.float32]]:
    """The parameters of all convolutions, affine layers and the last matrix, in the order of computation.

    A dlib file holds, behind the name of each layer's kind, a tensor: its version, four sizes, and little-endian
    floats. An integer is a byte with its length, then so many bytes, the lowest first.
    """
    for name in _PARTS.finditer(data):
        position = name.end()
        if name.group().endswith(b"fc_2"):
            for _ in range(2):  # how many numbers it gives and takes
                _, position = _integer(data, position)
        header = []
        for _ in range(5):
            value, position = _integer(data, position)
            header.append(value)
        count = int(np.prod(header[1:], dtype=np.int64))
        if header[0] != 2 or not 0 <= count * 4 <= len(data) - position:
            raise ValueError(f"no tensor at byte {name.end()}")
        yield np.frombuffer(data, "<f4", count, position).astype(np.float32)


def _integer(data: bytes, position: int) -> tuple[int, int]:
    """The integer at `position`, and where the next thing begins."""
    length = data[position] & 0x0F if position < len(data) else 0
    end = position + 1 + length
    return int.from_bytes(data[position + 1 : end], "little"), end
