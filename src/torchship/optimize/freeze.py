"""Copies a module as it will be served: out of its wrappers, in eval mode, its computed weights as plain ones."""

from __future__ import annotations

import copy
import functools
import logging
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
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
# what nothing asks for while a model runs without gradients
_IDLE_HOOKS = frozenset(name for name in vars(torch.nn.Module()) if "hooks" in name) - {
    *("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks_with_kwargs",
}
_LARGEST = 2**26  # numbers of a sparse tensor that is made dense
# no copies of these are made
_SHARED = (ContextVar, type(threading.Lock()), type(threading.RLock()), threading.local, logging.Logger)


def frozen(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of `module` on the host, in eval mode, that needs no gradients.

    Weights that are computed anew at each call (weight norm, spectral norm, parametrizations, masks of pruning) never
    change in eval mode: they become plain ones. Raises CaptureFailed for weights without values, for what cannot be
    copied, and for what is no module.
    """
    given: object = module
    if not isinstance(given, torch.nn.Module):
        what = f"{given.__name__} is a class" if isinstance(given, type) else f"this is a {type(given).__name__}"
        raise CaptureFailed(f"{what}, not an nn.Module", hint="give the module itself: call what makes it")
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
        made = _bare(_copied(module)).cpu().eval()
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


def _bare(module: torch.nn.Module) -> torch.nn.Module:
    """Without what only compiles, loads or trains: inner wrappers of torch.compile, hooks that serve no forward."""
    for part in list(module.modules()):
        if isinstance(part, torch.jit.ScriptModule):
            continue
        for name, child in part._modules.items():
            part._modules[name] = child if child is None else _unwrapped(child)
        vars(part).pop("_compiled_call_impl", None)
        for name in _IDLE_HOOKS.intersection(vars(part)):
            vars(part)[name].clear()
    return module


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    values = [value for part in module.modules() for value in vars(part).values()]
    tensors = [*values, *module.buffers()]
    apart = [value for value in tensors if isinstance(value, torch.Tensor) and not _copies_itself(value)]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in apart}
    for part in module.modules():
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values()):
            values += [cell.cell_contents for cell in getattr(hook, "__closure__", ()) or ()]
    memo |= {id(value): value for value in values if isinstance(value, _SHARED)}
    try:
        made = copy.deepcopy(module, memo)
        for part in made.modules():
            places: tuple[dict[Any, Any], ...] = (vars(part), part._forward_hooks, part._forward_pre_hooks)
            for held in places:
                held |= {key: _rebound(value, memo) for key, value in held.items() if isinstance(value, FunctionType)}
        return made
    except Exception as fault:
        raise CaptureFailed(
            f"{_culprit(module, memo)} cannot be copied: {type(fault).__name__}: {fault}",
            hint="it holds something that is no weight: an open file, or a tensor that gradients flow through",
        ) from fault


def _copies_itself(tensor: torch.Tensor) -> bool:
    """Whether `deepcopy` takes a tensor: not what is computed, compressed (CSR), or of a class made of Tensor."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or torch.nn.parameter.is_lazy(tensor)
    return tensor.is_leaf and tensor.layout in (torch.strided, torch.sparse_coo) and plain


def _culprit(module: torch.nn.Module, memo: dict[int, Any]) -> str:
    """The path of the attribute that stops the copy."""
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            try:
                if name != "_modules":
                    copy.deepcopy(value, dict(memo))
            except Exception:  # whatever it is
                return ".".join(word for word in (type(module).__name__, path, name) if word)
    return type(module).__name__


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


def make_dense(module: torch.nn.Module) -> list[str]:
    """Put dense tensors in the place of the module's sparse weights, buffers and attributes; a note for the report.

    No format of artifacts carries sparse ones, and most products take either. Raises CaptureFailed for what would be
    too large.
    """
    found = []
    for path, part in module.named_modules():
        for held in () if isinstance(part, torch.jit.ScriptModule) else (part._parameters, part._buffers, vars(part)):
            for name, tensor in held.items():
                if not isinstance(tensor, torch.Tensor) or tensor.layout == torch.strided:
                    continue
                where = f"{path}.{name}".strip(".")
                if tensor.numel() > _LARGEST:
                    raise CaptureFailed(
                        f"{where} is sparse and has shape {list(tensor.shape)}: no artifact carries sparse tensors, "
                        f"and {tensor.numel():,} numbers are too many",
                        hint="keep its indices and values as buffers, and compute with index_select and index_add",
                    )
                dense = tensor.to_dense()
                held[name] = torch.nn.Parameter(dense, requires_grad=False) if held is part._parameters else dense
                found.append(where)
    return [f"{', '.join(found[:4])}: sparse, made dense, for artifacts carry no sparse tensors"] if found else []


def remember(module: torch.nn.Module) -> Callable[..., list[str]]:
    """What gives a module its buffers and plain attributes back as they are now, and tells which buffers had changed;
    with `attributes=True` which attributes, too, all by their paths.

    Forward may count, and keep what it has computed; what is made of the module later is to start from the beginning.
    """
    buffers = {path: buffer.clone() for path, buffer in module.named_buffers()}
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    mutable = (list, dict, set, OrderedDict)
    plain = [
        {name: (value, copy.copy(value) if type(value) in mutable else None) for name, value in _own(part).items()}
        for part in parts
    ]
    paths = {id(part): path for path, part in module.named_modules()}

    def restore(*, attributes: bool = False) -> list[str]:
        changed: list[str] = []
        other: list[str] = []
        for part, kept in zip(parts, plain, strict=True):
            path, held = paths[id(part)], _own(part)
            for name in set(held).difference(kept):
                del vars(part)[name]
                other.append(f"{path}.{name}".strip("."))
            for name, (value, content) in kept.items():
                if held.get(name) is not value or (content is not None and _held(content) != _held(value)):
                    other.append(f"{path}.{name}".strip("."))
                vars(part)[name] = value
                if content is not None:  # the same object, for others may hold it too
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(content)
        for path, before in buffers.items():
            *above, name = path.split(".")
            owner: Any = functools.reduce(getattr, above, module)  # TorchScript's modules have no get_submodule
            now = getattr(owner, name)
            if now is None or not same(now, before):
                setattr(owner, name, before.clone())
                changed.append(path)
        return [*changed, *other] if attributes else changed

    return restore


def _held(container: Any) -> list[int]:
    """Which objects a list, dict or set holds: tensors in it are not compared."""
    return [id(item) for item in (*container, *(container.values() if isinstance(container, dict) else ()))]


def _own(part: torch.nn.Module) -> dict[str, Any]:
    """A module's attributes but those that every module has; its hooks are its own."""
    fresh = vars(torch.nn.Module())
    return {name: value for name, value in vars(part).items() if name not in fresh or "hooks" in name}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of any dtype and layout are equal, NaN for NaN."""
    if a.layout != torch.strided or b.layout != torch.strided:
        return a.layout == b.layout and a.shape == b.shape and same(a.to_dense(), b.to_dense())
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # noqa: PLR0124  # NaN is not itself
