"""Eight bits in large linear layers on a card: weights once, activations as they come, with a scale for each row.

Products of fp8 run at twice the speed of fp16 on Tensor Cores from compute capability 8.9 on, of int8 from 7.5 on; what
the rows cost to be scaled is only won back by wide layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchship.errors import BadConfig, BuildFailed
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options, choice

if TYPE_CHECKING:
    import torch

PRECISION = "int8"  # it is judged as eight bits are
RUNS_WITH: Options = {"device": "cuda", "precision": "bf16"}  # what a backend's recipe says beside it
OPTIONS = ("format", "least", "exclude", "modules")
_FORMATS = ("fp8", "int8")
_FROM = {"fp8": 8.9, "int8": 7.5}  # compute capability
_WIDE = 1024  # features on both sides, from which on it pays
_SHARE = 0.6  # of all weights that must be in such layers
_LARGEST = {"fp8": 448.0, "int8": 127.0}
_STEP = 16  # the products take features in steps of so many


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """Where wide linear layers hold most of the weights: fp8 where the card has it, else int8."""
    import torch

    try:
        capability = min(float(gpu.capability) for gpu in hardware.gpus)
    except ValueError:  # there is none, or it does not tell
        return []
    wide = [module for module in model.module.modules() if type(module) is torch.nn.Linear and _fits(module, _WIDE)]
    every = sum(weight.numel() for weight in model.module.parameters())
    if sum(layer.weight.numel() for layer in wide) <= _SHARE * every:
        return []
    word = next((word for word in _FORMATS if capability >= _FROM[word]), "")
    return [{"format": word, "least": _WIDE}] if word else []


def apply(model: Model, *, options: Options) -> Model:
    """`format` fp8 (e4m3) or int8; `least`: features that a layer has on both sides at least (16); `exclude` and
    `modules` are path patterns of what stays as it is, see `paths.rules`. Raises BadConfig, or BuildFailed without a
    layer that fits.
    """
    import torch

    from torchship.lowering import paths, surgery

    kind, least = choice(options, "format", _FORMATS, of="rowwise"), options.get("least", 1)
    if not isinstance(least, int) or least < 1:
        raise BadConfig(f"rowwise: least is {least!r}", hint="give a number of features: 1024")
    rules = paths.rules(options, narrow=_FORMATS, module=model.module)
    changed = surgery.copied(model)
    found = [
        (path, module)
        for path, module in changed.module.named_modules()
        if type(module) is torch.nn.Linear and _fits(module, least) and not rules.spares(path)
    ]
    if not found:
        raise BuildFailed(
            f"rowwise: no linear layer takes features in steps of {_STEP}, and {least} of them or more",
            hint="it is for wide linear layers",
        )
    for module in changed.module.modules():
        if isinstance(module, torch.nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # its fused path reads float weights
    for path, layer in found:
        changed.module.set_submodule(path, _narrowed(layer, kind))
    return changed


def _fits(layer: torch.nn.Linear, least: int) -> bool:
    return layer.in_features % _STEP == 0 and min(layer.in_features, layer.out_features) >= least


def _narrowed(layer: torch.nn.Linear, kind: str) -> torch.nn.Module:
    """A layer that computes the same in eight bits."""
    import torch

    narrow = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    largest, outputs = _LARGEST[kind], layer.out_features

    def scaled(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows in eight bits, and [rows, 1] what to multiply each with."""
        wide = rows.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest
        unit = (wide / scale).clamp(-largest, largest)
        return (unit.round() if kind == "int8" else unit).to(narrow), scale

    class Rowwise(torch.nn.Module):
        bits: torch.Tensor
        scale_bits: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            missing = -outputs % _STEP
            weight, scale = scaled(torch.nn.functional.pad(layer.weight.detach(), (0, 0, 0, missing)))
            # as integers: casting the model to half must leave both alone
            self.register_buffer("bits", weight.view(torch.uint8))
            self.register_buffer("scale_bits", scale.view(torch.int32))
            self.bias = layer.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, scale = self.bits.view(narrow).t(), self.scale_bits.view(torch.float32).t()
            rows, own = scaled(x.reshape(-1, x.shape[-1]))
            if kind == "fp8":
                answer = torch._scaled_mm(rows, weight, scale_a=own, scale_b=scale, out_dtype=torch.bfloat16)
            else:  # the product wants more than 16 rows
                sums = torch._int_mm(torch.nn.functional.pad(rows, (0, 0, 0, 16)), weight)[: rows.shape[0]]
                answer = sums.float() * own * scale
            answer = answer[:, :outputs].to(x.dtype)
            if self.bias is not None:
                answer = answer + self.bias
            return answer.reshape(*x.shape[:-1], outputs)

    return Rowwise().eval()
