"""Cross-layer equalization: channels of neighbouring layers get equal ranges, so that one scale fits them all.

Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721, section 4.1: between W1 and W2 with nothing or a positively homogeneous activation in between,
channel i of W1 is divided, and of W2 multiplied, by s_i = sqrt(r1_i * r2_i) / r2_i; the answers stay the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchship.errors import BadConfig
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

if TYPE_CHECKING:
    import torch

_HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout")
_LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
_SMALLEST = 1e-8


def apply(model: Model, *, options: Options) -> Model:
    """`rounds` (20) of equalization over all pairs; batch norms are folded first, for they would undo it.

    Raises BuildFailed when the model cannot be exported, BadConfig for a wrong option.
    """
    import torch

    from torchship.lowering import surgery

    rounds = options.get("rounds", 20)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise BadConfig(f"equalize: rounds is {rounds!r}, expected a number of 1 or more")
    changed = surgery.copied(model)
    surgery.fold_batch_norms(changed, surgery.Wiring(changed))
    pairs = _pairs(surgery.Wiring(changed))
    with torch.no_grad():
        for _ in range(rounds):
            change = [_equalize(changed.module.get_submodule(a), changed.module.get_submodule(b)) for a, b in pairs]
            if not change or max(change) < 1e-4:
                break
    return changed


def _pairs(wiring: Any) -> list[tuple[str, str]]:
    """Paths of layers that feed one another through nothing but homogeneous operators, each read once."""
    found = []
    for node in wiring.nodes:
        first = wiring.owner(node) if wiring.kind(node) in _LAYERS else ""
        after = wiring.only_user(node) if first else None
        while after is not None and wiring.kind(after) in _HOMOGENEOUS:
            after = wiring.only_user(after)
        second = wiring.owner(after) if after is not None and wiring.kind(after) in _LAYERS else ""
        if second:
            found.append((first, second))
    return found


def _equalize(first: torch.nn.Module, second: torch.nn.Module) -> float:
    """Rescale one pair; how far from equal it was (0: it was equal already, or it does not fit)."""
    import torch

    w1: Any = getattr(first, "weight", None)
    w2: Any = getattr(second, "weight", None)
    if w1 is None or w2 is None or not isinstance(w1, torch.Tensor) or not isinstance(w2, torch.Tensor):
        return 0.0
    depthwise = getattr(second, "groups", 1) == w1.shape[0] == w2.shape[0] and w2.shape[1] == 1
    if not depthwise and (getattr(second, "groups", 1) != 1 or w2.shape[1] != w1.shape[0]):
        return 0.0
    incoming = w2.flatten(1) if depthwise else w2.transpose(0, 1).flatten(1)
    r1, r2 = w1.flatten(1).abs().amax(1), incoming.abs().amax(1)
    alive = (r1 > _SMALLEST) & (r2 > _SMALLEST)
    scale = torch.where(alive, (r1 * r2).sqrt() / r2.clamp(min=_SMALLEST), torch.ones_like(r1))
    w1.div_(scale.reshape(-1, *[1] * (w1.ndim - 1)))
    if getattr(first, "bias", None) is not None:
        first.bias.div_(scale)  # type: ignore[operator]
    shape = (-1, *[1] * (w2.ndim - 1)) if depthwise else (1, -1, *[1] * (w2.ndim - 2))
    w2.mul_(scale.reshape(shape))
    return float((scale - 1).abs().max())


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """Where there are convolutions and ReLUs."""
    kinds = {type(module).__name__ for module in model.module.modules()}
    return [{}] if "Conv2d" in kinds and kinds & {"ReLU", "LeakyReLU"} else []
