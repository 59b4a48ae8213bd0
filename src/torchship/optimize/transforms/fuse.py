"""Folds batch norms into the convolutions and linear layers before them, and lets activations work in place."""

from __future__ import annotations

from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

OPTIONS = ("in_place",)
_ACTIVATIONS = ("relu", "hardswish", "silu", "hardtanh", "leaky_relu", "hardsigmoid")
_OVERWRITTEN = ("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "add")


def apply(model: Model, *, options: Options) -> Model:
    """`in_place` (true): activations that alone read a convolution overwrite it.

    What reads what is taken from the exported graph. Raises BuildFailed when the model cannot be exported.
    """
    import torch

    from torchship.lowering import surgery

    changed = surgery.copied(model)
    wiring = surgery.Wiring(changed)
    surgery.fold_batch_norms(changed, wiring)
    safe: dict[str, bool] = {}  # the paths of activations, and whether each of their calls is alone
    for node in wiring.nodes if options.get("in_place", True) else ():
        if wiring.kind(node) in _ACTIVATIONS:
            before, place = node.args[0], wiring.place(node)
            alone = (
                isinstance(before, torch.fx.Node)
                and wiring.kind(before) in _OVERWRITTEN
                and wiring.only_user(before) is node
            )
            safe[place] = safe.get(place, True) and alone
    for place in (place for place, good in safe.items() if good and place):
        module = changed.module.get_submodule(place)
        if hasattr(module, "inplace"):
            module.inplace = True  # type: ignore[assignment]
    return changed


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """Where there are batch norms."""
    norms = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
    return [{}] if any(type(module).__name__ in norms for module in model.module.modules()) else []
