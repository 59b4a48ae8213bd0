"""Structured pruning: whole channels leave a module, in rounds, until it costs a share of what it did.

Which channels hang together (residual sums, concatenations, depthwise convolutions, squeeze-excite) is found by
Torch-Pruning's dependency graph (Fang et al., arXiv:2301.12900). What is left is the user's own module with narrower
layers: its weights are a plain state dict, and a channel map says which channels of which layer were kept, so that
`narrow` makes the same module out of a fresh one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from torchship.errors import BadConfig, CorruptArtifact, TorchshipError, Unavailable, Unsupported
from torchship.optimize.channels import ChannelMap, Kept, Prune
from torchship.plugins import missing

Loss: TypeAlias = Callable[[nn.Module], torch.Tensor]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KNOWN = (*_CONVOLUTIONS, *_TRANSPOSED, *_NORMS, nn.Linear, nn.LayerNorm, nn.PReLU)
_STEPS = 90  # small ones: the share that is asked for is met closely
_MOST = 0.9  # of the channels of one layer
_FLOOR = 8  # channels that every layer keeps, and their multiple


_PLAIN = Prune()


def flops_of(module: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """Multiplications of one call, counted by torch's own counter over convolutions and products of matrices."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops()) / 2


def prune(
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    *,
    flops: float,
    wish: Prune = _PLAIN,
    loss: Loss | None = None,
    known: Mapping[str, Kept] = {},
) -> ChannelMap:
    """Remove the least important channels of `module`, in place, until a call takes at most `flops` multiplications.

    `inputs` are one call's tensors. `loss(module)` is the loss on some data, for Taylor importance. `known` is the map
    of an earlier round; the returned one is relative to the original again. Layers that give the module's outputs,
    and what Torch-Pruning does not understand, keep their channels.
    Raises Unavailable without torch-pruning, Unsupported where nothing (more) can be removed.
    """
    if lacking := missing("torch_pruning", pip="torch-pruning"):
        raise Unavailable(f"pruning needs it: {lacking}")
    names = {id(part): name for name, part in module.named_modules()}
    found = _complete(known, module)
    training = module.training
    module.eval()
    with _understood():
        pruner = _pruner(module, inputs, wish, loss)
    now = flops_of(module, inputs)
    for _ in range(_STEPS):
        if now <= flops:
            break
        with _understood():
            groups = [group for group in pruner.step(interactive=True) if _removable(group, wish.multiple)]
        for group in groups:
            _note(group, found, names)
            group.prune()
        now = _runs(module, inputs) if groups else now
    module.train(training)
    if now > flops:
        raise Unsupported(
            f"pruning ends at {now:.3g} multiplications, where at most {flops:.3g} are asked for",
            hint="ask for less, or keep fewer layers as they are",
        )
    return {name: kept for name, kept in found.items() if kept.out is not None or kept.taken is not None}


def _runs(module: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """Its multiplications. Raises Unsupported where channels went that something needs."""
    with _understood():
        return flops_of(module, inputs)


@contextmanager
def _understood() -> Iterator[None]:
    """Raises Unsupported where the graph of channels cannot be made, or what is left of the module fails."""
    try:
        yield
    except TorchshipError:
        raise
    except Exception as fault:
        raise Unsupported(
            f"this model cannot be pruned: {type(fault).__name__}: {fault}",
            hint="its channels are split or shuffled: keep the modules that do so as they are",
        ) from fault


def _pruner(module: nn.Module, inputs: Sequence[torch.Tensor], wish: Prune, loss: Loss | None) -> Any:
    import torch_pruning as tp

    module.requires_grad_(True)
    module.zero_grad()
    if wish.importance == "taylor":
        if loss is None:
            raise BadConfig("prune: Taylor importance needs a loss", hint="give data, or importance = magnitude")
        loss(module).backward()  # type: ignore[no-untyped-call]
        importance: Any = tp.importance.GroupTaylorImportance(normalizer="mean")
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="mean")
    return tp.pruner.BasePruner(
        module,
        tuple(inputs),
        importance=importance,
        global_pruning=True,
        pruning_ratio=_MOST,
        max_pruning_ratio=_MOST,
        iterative_steps=_STEPS,
        round_to=wish.multiple,
        ignored_layers=list(_left_alone(module, inputs, wish.keep)),
    )


def _left_alone(module: nn.Module, inputs: Sequence[torch.Tensor], keep: Sequence[str]) -> Iterator[nn.Module]:
    """The layers that keep their channels: named ones, those that give an output, and those of a kind that `narrow`
    does not know."""
    outputs: set[int] = set()
    last: list[tuple[nn.Module, Any]] = []

    def hook(part: nn.Module, _: Any, answer: Any) -> None:
        last.append((part, answer))

    handles = [part.register_forward_hook(hook) for part in module.modules() if not list(part.children())]
    try:
        with torch.no_grad():
            answer = module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    flat, _ = torch.utils._pytree.tree_flatten(answer)
    outputs = {one.untyped_storage().data_ptr() for one in flat if isinstance(one, torch.Tensor)}
    giving = [p for p, a in last if isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() in outputs]
    weighted = [part for part, _ in last if isinstance(part, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear))]
    yield from giving or weighted[-1:]
    for name, part in module.named_modules():
        strange = list(part.parameters(recurse=False)) and not isinstance(part, _KNOWN)
        if strange or any(name == word or name.startswith(f"{word}.") for word in keep):
            yield part


def _removable(group: Any, multiple: int) -> bool:
    """Whether something is left of all its layers, and all of them are of a kind that `narrow` knows."""
    for dependency, indices in group:
        layer = dependency.target.module
        if not indices:
            return False
        if not list(layer.parameters()) and not isinstance(layer, _KNOWN):
            continue  # an operation without weights
        if not isinstance(layer, _KNOWN):
            return False
        if width(layer, _is_out(dependency)) - len(indices) < min(multiple, _FLOOR):
            return False
    return True


def _is_out(dependency: Any) -> bool:
    return "prune_out" in str(getattr(dependency.handler, "__name__", ""))


def width(layer: nn.Module, out: bool) -> int:
    """How many channels a layer gives, or takes."""
    if isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)):
        return int(layer.out_channels if out else layer.in_channels)
    if isinstance(layer, nn.Linear):
        return int(layer.out_features if out else layer.in_features)
    if isinstance(layer, nn.LayerNorm):
        return int(layer.normalized_shape[-1])
    return int(getattr(layer, "num_features", 0) or getattr(layer, "num_parameters", 1 << 30))


def _complete(known: Mapping[str, Kept], module: nn.Module) -> ChannelMap:
    return {
        name: Kept(*(None if part is None else list(part) for part in (found.out, found.taken)))
        for name, part_ in module.named_modules()
        if isinstance(part_, _KNOWN)
        for found in [known.get(name, Kept())]
    }


def _note(group: Any, found: ChannelMap, names: Mapping[int, str]) -> None:
    """Strike what a group removes off the lists."""
    done: set[tuple[str, bool]] = set()
    for dependency, indices in group:
        layer = dependency.target.module
        name = names.get(id(layer), "")
        kept = found.get(name)
        if kept is None:
            continue
        out = _is_out(dependency)
        if isinstance(layer, (*_NORMS, nn.LayerNorm, nn.PReLU)) or _depthwise(layer):
            out = True
        if (name, out) in done:  # one layer may hang on a group by both ends of one operation
            continue
        done.add((name, out))
        now = (kept.out if out else kept.taken) or list(range(width(layer, out)))
        gone = set(indices)
        left = [channel for place, channel in enumerate(now) if place not in gone]
        if out:
            kept.out = left
        else:
            kept.taken = left


def _depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _CONVOLUTIONS) and layer.groups == layer.out_channels and layer.groups > 1


def narrow(module: nn.Module, channels: Mapping[str, Kept]) -> nn.Module:
    """`module` (the original, as its class makes it) with only the channels of the map, in place; itself.

    Its weights are those of the kept channels: load the pruned state dict after it. Raises CorruptArtifact where the
    map does not fit the module.
    """
    for name, kept in channels.items():
        try:
            layer = module.get_submodule(name)
            _narrow(layer, kept)
        except (AttributeError, IndexError, RuntimeError) as fault:
            raise CorruptArtifact(
                f"the channel map does not fit the module at {name!r}: {fault}",
                hint="it belongs to another version of the class",
            ) from fault
    return module


def _narrow(layer: nn.Module, kept: Kept) -> None:
    if not isinstance(layer, _KNOWN):
        raise AttributeError(f"{type(layer).__name__} has no channels to choose from")
    if _depthwise(layer):
        _slice(layer, kept.out, 0)
        width = layer.weight.shape[0]
        layer.groups = layer.in_channels = layer.out_channels = width
        return
    across = 0 if isinstance(layer, _TRANSPOSED) else 1
    if kept.taken is not None:
        rows = torch.tensor(kept.taken, device=layer.weight.device)
        layer.weight = nn.Parameter(layer.weight.detach().index_select(across, rows), layer.weight.requires_grad)
    _slice(layer, kept.out, 1 - across)
    shape = layer.weight.shape
    if isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED)):
        given, made = (shape[1], shape[0]) if across else (shape[0], shape[1])
        layer.in_channels, layer.out_channels = given * (layer.groups if across else 1), made
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(shape)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = shape[0]
    else:
        layer.num_features = shape[0]


def _slice(layer: Any, kept: Sequence[int] | None, axis: int) -> None:
    """Cut the weight along the axis of its outputs, and all that has one number a channel."""
    if kept is None:
        return
    rows = torch.tensor(list(kept), device=layer.weight.device)
    width = layer.weight.shape[axis]
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if tensor.dim() == 0:
            continue
        at = axis if name == "weight" else 0
        if tensor.shape[at] != width:
            continue
        cut = tensor.detach().index_select(at, rows)
        setattr(layer, name, nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)


def ends(flops: float, *, wish: Prune) -> list[float]:
    """How many multiplications each round leaves of `flops`: every round takes the same share."""
    left = 1 - wish.flops
    return [flops * math.pow(left, number / wish.rounds) for number in range(1, wish.rounds + 1)]
