"""The zoo: torchvision's classifiers, detectors and segmenters, and sequence models, with random weights and inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CLASSIFIERS = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3",
    "maxvit_t", "mnasnet1_0", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x1_0", "squeezenet1_1", "swin_t",
    "vgg11_bn", "vit_b_32", "wide_resnet50_2",
)  # fmt: skip
DETECTORS = ("ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn")
SEGMENTERS = ("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large")
OTHERS = ("encoder", "decoder", "lstm", "gru")
NAMES = (*CLASSIFIERS, *DETECTORS, *SEGMENTERS, *OTHERS)


class Listed(nn.Module):
    """torchvision's detectors take and give lists: one picture in, its boxes out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: torch.Tensor) -> Any:
        return self.inner([image])[0]


class Decoder(nn.Module):
    """A small causal language model: `ids` INT64 [rows, length] to logits FP32 [rows, length, 500]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(500, 128)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True) for _ in range(2))
        self.head = nn.Linear(128, 500)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        out: torch.Tensor = self.head(x)
        return out


def subject(name: str) -> tuple[Any, list[str], tuple[Any, ...]]:
    """The module in eval mode, its inputs as the command line spells them, and an input that the search never sees."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(11)
    if name in OTHERS:
        return _sequences(name, draw)
    from torchvision import models

    if name in DETECTORS:
        net = models.get_model(name, weights=None, weights_backbone=None)
        side = 320 if name.startswith("ssd") else 224
        return Listed(net).eval(), [f"image:FP32[3,{side},{side}]"], (torch.rand(3, side, side, generator=draw),)
    side = {"inception_v3": 299, "maxvit_t": 224, "vit_b_32": 224, "swin_t": 224}.get(name, 160)
    options: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    options |= {"weights_backbone": None} if name in SEGMENTERS else {}
    net = models.get_model(name, weights=None, **options)
    return net.eval(), [f"image:FP32[-1,3,{side},{side}]"], (torch.randn(3, 3, side, side, generator=draw),)


def _sequences(name: str, draw: Any) -> tuple[Any, list[str], tuple[Any, ...]]:
    if name == "encoder":
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        net: Any = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        return net.eval(), ["src:FP32[-1,64,128]"], (torch.randn(3, 64, 128, generator=draw),)
    if name == "decoder":
        inputs = ["ids:INT64[-1,length:1..64]"]
        return Decoder().eval(), inputs, (torch.randint(0, 500, (3, 20), generator=draw),)
    kind = nn.LSTM if name == "lstm" else nn.GRU
    net = kind(32, 64, num_layers=2, batch_first=True, bidirectional=name == "lstm")
    return net.eval(), ["input:FP32[-1,24,32]"], (torch.randn(3, 24, 32, generator=draw),)


def calibration(name: str) -> list[tuple[Any, ...]]:
    """A few batches of random inputs for quantizers."""
    _, _, unseen = subject(name)
    draw = torch.Generator().manual_seed(5)
    found = []
    for _ in range(6):
        drawn = [
            torch.randn(tensor.shape, generator=draw)
            if tensor.is_floating_point()
            else torch.randint(0, 500, tensor.shape, generator=draw)
            for tensor in unseen
        ]
        found.append(tuple(tensor.abs().clamp(max=1) if name in DETECTORS else tensor for tensor in drawn))
    return found
