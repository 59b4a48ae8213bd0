"""Folds batch norms into the convolutions and linear layers before them, and lets activations work in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

if TYPE_CHECKING:
    from torchship.lowering.surgery import Wiring


def apply(model: Model, *, options: Options) -> Model:
    """`in_place` (true): activations that alone read a convolution overwrite it.

    What reads what is taken from the exported graph. Raises BuildFailed when the model cannot be exported.
    """
    from torchship.lowering import surgery

    changed = surgery.copied(model)
    wiring = surgery.Wiring(changed)
    _fold(changed, wiring)
    if options.get("in_place", True):
        _overwrite(changed, wiring)
    return changed


def _fold(model: Model, wiring: Wiring) -> None:
    import torch
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    from torchship.lowering import surgery

    for norm in wiring.nodes:
        before = norm.args[0] if wiring.kind(norm) == "batch_norm" else None
        if not isinstance(before, torch.fx.Node) or wiring.only_user(before) is not norm:
            continue
        layer_path, norm_path = wiring.owner(before), wiring.owner(norm, tensors=(3, 1))
        if not layer_path or not norm_path:
            continue
        layer: Any = model.module.get_submodule(layer_path)
        batch_norm: Any = model.module.get_submodule(norm_path)
        if type(layer) is torch.nn.Linear:
            fused: Any = fuse_linear_bn_eval(layer, batch_norm)
        elif type(layer) in (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d):
            fused = fuse_conv_bn_eval(layer, batch_norm)
        else:
            continue
        surgery.put(model.module, layer_path, fused)
        surgery.put(model.module, norm_path, torch.nn.Identity())


def _overwrite(model: Model, wiring: Wiring) -> None:
    import torch

    safe: dict[str, bool] = {}
    activations = ("relu", "hardswish", "silu", "hardtanh", "leaky_relu", "hardsigmoid")
    for node in wiring.nodes:
        if wiring.kind(node) not in activations:
            continue
        before = node.args[0]
        alone = (
            isinstance(before, torch.fx.Node)
            and wiring.kind(before) in ("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "add")
            and wiring.only_user(before) is node
        )
        place = wiring.place(node)
        safe[place] = safe.get(place, True) and alone
    for place, good in safe.items():
        if good and place:
            module = model.module.get_submodule(place)
            if hasattr(module, "inplace"):
                module.inplace = True  # type: ignore[assignment]


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """Where there are batch norms."""
    norms = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
    return [{}] if any(type(module).__name__ in norms for module in model.module.modules()) else []
