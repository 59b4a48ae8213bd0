"""Copies a module as it will be served: out of its wrappers, in eval mode, its computed weights as plain ones."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchship.errors import CaptureFailed

# hooks of torch's own that compute a weight before each call: what settles one, and where it keeps the weight's name
_SETTLED: dict[type, tuple[Callable[[Any, str], Any], str]] = {
    WeightNorm: (remove_weight_norm, "name"),
    SpectralNorm: (remove_spectral_norm, "name"),
    prune.BasePruningMethod: (prune.remove, "_tensor_name"),
}


def frozen(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of `module` on the host, in eval mode, that needs no gradients.

    Weights that are computed anew at each call (weight norm, spectral norm, parametrizations, masks of pruning) never
    change in eval mode: they become plain ones. Raises CaptureFailed for weights without values, and for what cannot
    be copied.
    """
    module = _unwrapped(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if torch.nn.parameter.is_lazy(tensor):
            raise CaptureFailed(
                f"{name} has no shape yet", hint="call the module once, so that lazy layers get weights"
            )
        if tensor.is_meta:
            raise CaptureFailed(
                f"{name} is on the meta device: it has a shape, but no values",
                hint="module.to_empty(device='cpu'), then load_state_dict",
            )
    with torch.no_grad():  # else the copies of TorchScript's weights are computed ones
        made = _copied(module).cpu().eval()
        for weight in made.parameters():  # TorchScript's modules have no requires_grad_ of their own
            weight.requires_grad_(False)
        _settle(made)
    return made


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside torch.compile's, DataParallel's and DistributedDataParallel's wrappers."""
    inner = getattr(module, "_orig_mod", None)
    if isinstance(module, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        inner = module.module
    return module if inner is None else _unwrapped(inner)


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    computed = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed}
    try:
        made = copy.deepcopy(module, memo)
        for part in made.modules():
            places: tuple[dict[Any, Any], ...] = (vars(part), part._forward_hooks, part._forward_pre_hooks)
            for held in places:
                held |= {key: _rebound(value, memo) for key, value in held.items() if isinstance(value, FunctionType)}
        return made
    except Exception as fault:
        raise CaptureFailed(
            f"{type(module).__name__} cannot be copied: {type(fault).__name__}: {fault}",
            hint="it holds something that is no weight: an open file, a lock, or a tensor that gradients flow through",
        ) from fault


def _rebound(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A function that closes over parts of the copy where it closed over parts of the original."""
    cells = tuple(CellType(copy.deepcopy(cell.cell_contents, memo)) for cell in function.__closure__ or ())
    if all(new.cell_contents is old.cell_contents for new, old in zip(cells, function.__closure__ or (), strict=True)):
        return function
    made = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _settle(module: torch.nn.Module) -> None:
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            _settle_parametrized(part)
        for hook in list(part._forward_pre_hooks.values()):
            for kind, (settle, name) in _SETTLED.items():
                if isinstance(hook, kind):
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # they are deprecated, and still much used
                        settle(part, getattr(hook, name))


def _settle_parametrized(part: torch.nn.Module) -> None:
    """What `remove_parametrizations` does; but that empties the class, which the copy shares with the original."""
    names = list(part.parametrizations)  # type: ignore[arg-type]
    weights = {name: getattr(part, name).clone() for name in names}
    if not all(torch.equal(getattr(part, name), weight) for name, weight in weights.items()):
        return  # random numbers
    part.__class__ = type(part).__bases__[0]
    del part.parametrizations
    for name, weight in weights.items():
        part.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))


def remember(module: torch.nn.Module) -> Callable[[], list[str]]:
    """What gives a module its buffers and plain attributes back as they are now, and tells which buffers had changed.

    Forward may count, and keep what it has computed; what is made of the module later is to start from the beginning.
    """
    buffers = {path: buffer.clone() for path, buffer in module.named_buffers()}
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    plain = [(vars(part), {name: (value, _content(value)) for name, value in _own(part).items()}) for part in parts]

    def restore() -> list[str]:
        for part, (now, kept) in zip(parts, plain, strict=True):
            for name in set(_own(part)).difference(kept):
                del now[name]
            for name, (value, content) in kept.items():
                now[name] = value
                if content is not None:  # the same object, for others may hold it too
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(content)
        return [path for path, before in buffers.items() if _given_back(module, path, before)]

    return restore


def _own(part: torch.nn.Module) -> dict[str, Any]:
    """A module's attributes but those that every module has."""
    fresh = vars(torch.nn.Module())
    return {name: value for name, value in vars(part).items() if name not in fresh}


def _content(value: Any) -> Any:
    return copy.copy(value) if type(value) in (list, dict, set) else None


def _given_back(module: torch.nn.Module, path: str, before: torch.Tensor) -> bool:
    *above, name = path.split(".")
    owner: Any = functools.reduce(getattr, above, module)  # TorchScript's modules have no get_submodule
    now = getattr(owner, name)
    if now is not None and same(now, before):
        return False
    setattr(owner, name, before.clone())
    return True


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of any dtype are equal, NaN for NaN."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124  # NaN is not itself
