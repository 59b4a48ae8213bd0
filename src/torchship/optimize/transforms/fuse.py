"""Folds batch norms into the convolutions and linear layers before them, and lets activations work in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

if TYPE_CHECKING:
    from torchship.lowering.surgery import Wiring

OPTIONS = ("in_place",)


def apply(model: Model, *, options: Options) -> Model:
    """`in_place` (true): activations that alone read a convolution overwrite it.

    What reads what is taken from the exported graph. Raises BuildFailed when the model cannot be exported.
    """
    from torchship.lowering import surgery

    changed = surgery.copied(model)
    wiring = surgery.Wiring(changed)
    surgery.fold_batch_norms(changed, wiring)
    if options.get("in_place", True):
        _overwrite(changed, wiring)
    return changed


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
