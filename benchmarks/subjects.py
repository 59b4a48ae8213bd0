"""The models that the benchmarks run on, by name: built with fixed random weights, their inputs drawn with a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

IMAGE = "image:FP32[-1,3,224,224]"
TOKENS = "tokens:FP32[-1,128,384]"
NAMES = ("resnet18", "mobilenet_v3_large", "resnet50", "encoder")


def module(name: str) -> Any:
    """The eager module in eval mode, equal in every process. Raises KeyError for an unknown name."""
    import torch

    torch.manual_seed(0)
    if name == "encoder":
        layer = torch.nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, activation="gelu")
        return torch.nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    import torchvision

    if name not in torchvision.models.list_models(torchvision.models):
        raise KeyError(f"no model {name!r}: use encoder or a torchvision classifier")
    return torchvision.models.get_model(name, weights=None).eval()


def signature(name: str) -> str:
    """The input as the command line spells it."""
    return TOKENS if name == "encoder" else IMAGE


def batch(name: str, rows: int, *, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """`rows` inputs: smooth random pictures (noise on three scales) or random tokens, FP32."""
    draw = np.random.default_rng(seed)
    if name == "encoder":
        return draw.standard_normal((rows, 128, 384), dtype=np.float32)
    total = np.zeros((rows, 3, 224, 224), np.float32)
    for size in (7, 28, 224):
        noise = draw.standard_normal((rows, 3, size, size), dtype=np.float32)
        total += noise.repeat(224 // size, axis=2).repeat(224 // size, axis=3)
    return total / np.float32(np.sqrt(3))


def calibration(name: str, rows: int = 64) -> Sequence[np.ndarray[Any, np.dtype[np.float32]]]:
    """Batches of 8 for quantizers, drawn apart from what is validated."""
    return [batch(name, 8, seed=1000 + start) for start in range(0, rows, 8)]
