"""Cross-layer equalization: channels of neighbouring layers get equal ranges, so that one scale fits them all.

Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721, section 4.1: between W1 and W2 with nothing or a positively homogeneous activation in between,
channel i of W1 is divided, and of W2 multiplied, by s_i = sqrt(r1_i * r2_i) / r2_i; the answers stay the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torchship.errors import BadConfig, BuildFailed
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

if TYPE_CHECKING:
    from torchship.lowering.surgery import Wiring

_HOMOGENEOUS = ("relu", "leaky_relu", "prelu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout")
_CLIPPED = ("relu6", "hardtanh")
_LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
_SMOOTH = {"SiLU", "GELU", "Hardswish", "ELU", "SELU", "Mish", "Tanh", "Sigmoid", "Softplus"}
_SMALLEST = 1e-8


OPTIONS = ("rounds",)
EASES = "int8"  # what it makes a model easier for


def apply(model: Model, *, options: Options) -> Model:
    """`rounds` (20) of equalization over all pairs; batch norms are folded first, for they would undo it. A ReLU6
    between two layers gets a ceiling for each channel, scaled with it.

    Raises BuildFailed when the model cannot be exported or has no such layers, BadConfig for a wrong option.
    """
    import torch

    from torchship.lowering import surgery

    rounds = options.get("rounds", 20)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise BadConfig(f"equalize: rounds is {rounds!r}, expected a number of 1 or more")
    changed = surgery.copied(model)
    surgery.fold_batch_norms(changed, surgery.Wiring(changed))
    find = changed.module.get_submodule
    pairs = [found for found in _pairs(surgery.Wiring(changed), find) if _fits(find(found[0]), find(found[1]))]
    if not pairs:
        raise BuildFailed("equalize: no two layers feed one another through a ReLU alone")
    for first, _, clip in pairs:
        if clip:
            changed.module.set_submodule(clip, surgery.Clipped(find(first)))
    with torch.no_grad():
        for _ in range(rounds):
            if max(_equalize(*map(find, found)) for found in pairs) < 1e-4:
                break
    return changed


def _pairs(wiring: Wiring, find: Callable[[str], Any]) -> list[tuple[str, str, str]]:
    """Layers that feed one another through nothing but positively homogeneous operators and ReLU6, each read once: the
    paths of both, and of the ReLU6 between them where there is one.
    """
    calls = Counter(wiring.place(node) for node in wiring.nodes if wiring.kind(node) in _CLIPPED)
    found = []
    for node in wiring.nodes:
        first, clip = _plain_layer(wiring, node), ""
        after = wiring.only_user(node) if first else None
        while after is not None:
            if wiring.kind(after) in _CLIPPED and not clip:
                clip = wiring.place(after)
                if calls[clip] != 1 or type(find(clip)).__name__ != "ReLU6":
                    break
            elif wiring.kind(after) not in _HOMOGENEOUS:
                break
            after = wiring.only_user(after)
        second = "" if after is None else _plain_layer(wiring, after)
        if second and (wiring.kind(node) == "linear") == (wiring.kind(after) == "linear"):
            found.append((first, second, clip))
    return found


def _plain_layer(wiring: Wiring, node: Any) -> str:
    """The path of the layer whose `weight`, and `bias` if any, this node alone uses; empty where there is none."""
    path = wiring.owner(node) if wiring.kind(node) in _LAYERS else ""
    bias = node.args[2] if len(node.args) > 2 else None
    owned = bias is None or (wiring.tensor(node, 2) == f"{path}.bias" and len(bias.users) == 1)
    return path if wiring.tensor(node, 1) == f"{path}.weight" and owned else ""


def _fits(first: Any, second: Any) -> bool:
    """Whether the channels that one layer gives are the channels that the other takes."""
    if _is_depthwise(second):
        return bool(first.weight.shape[0] == second.weight.shape[0])
    return getattr(second, "groups", 1) == 1 and bool(second.weight.shape[1] == first.weight.shape[0])


def _is_depthwise(layer: Any) -> bool:
    return bool(getattr(layer, "groups", 1) == layer.weight.shape[0] and layer.weight.shape[1] == 1)


def _equalize(first: Any, second: Any, clip: Any) -> float:
    """Rescale one pair; how far from equal it was."""
    import torch

    w1, w2 = first.weight, second.weight
    depthwise = _is_depthwise(second)
    incoming = w2.flatten(1) if depthwise else w2.transpose(0, 1).flatten(1)
    r1, r2 = w1.flatten(1).abs().amax(1), incoming.abs().amax(1)
    alive = (r1 > _SMALLEST) & (r2 > _SMALLEST)
    scale = torch.where(alive, (r1 * r2).sqrt() / r2.clamp(min=_SMALLEST), torch.ones_like(r1))
    w1.div_(scale.reshape(-1, *[1] * (w1.ndim - 1)))
    if first.bias is not None:
        first.bias.div_(scale)
    shape = (-1, *[1] * (w2.ndim - 1)) if depthwise else (1, -1, *[1] * (w2.ndim - 2))
    w2.mul_(scale.reshape(shape))
    if hasattr(clip, "ceiling"):
        clip.ceiling.div_(scale.reshape(clip.ceiling.shape))
    return float((scale - 1).abs().max())


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """Where there are convolutions, and ReLUs or activations that are no modules."""
    kinds = {type(module).__name__ for module in model.module.modules()}
    rectified = kinds & {"ReLU", "ReLU6", "LeakyReLU", "PReLU"} or not kinds & _SMOOTH
    return [{}] if kinds & {"Conv1d", "Conv2d", "Conv3d"} and rectified else []
