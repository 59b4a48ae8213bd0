"""Loads a checkpoint's weights into a module, and says exactly what does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from torchship.errors import BadConfig, NotFound

_SHOWN = 5
_DEPTH = 3  # how deep a training script nests its state dicts
_COUNTER = "num_batches_tracked"  # what batch norms before torch 0.4.1 did not have
_NORMED = re.compile(r"parametrizations\.(\w+)\.original([01])$")
_State: TypeAlias = dict[str, torch.Tensor]


def load_weights(module: torch.nn.Module, path: Path) -> int:
    """Put the tensors of `path` (safetensors, or what `torch.save` wrote of a state dict) into `module`, in place.

    A training script's nests (`{"state_dict": ...}`) and wrappers (`module.`, `model._orig_mod.`) are taken off. Every
    parameter and persistent buffer must be there in its shape, once where it is shared; weight norms are taken in the
    old and the new form, as torch's own hooks do. Where a file holds several sets that fit, as raw and averaged (EMA)
    ones, `FILE#KEY` says which. Returns how many tensors were loaded. Nothing but tensors is unpickled.
    Raises NotFound or BadConfig.
    """
    name, _, chosen = path.name.rpartition("#")
    if path.is_file() or not name:
        chosen = ""
    else:
        path = path.with_name(name)
    if not path.is_file():
        raise NotFound(f"--weights: no file {path}")
    wanted = {_plain(name): tensor for name, tensor in module.state_dict().items()}
    found = {key: _shared(state, wanted) for key, state in _candidates(_states(_read(path)), wanted).items()}
    if not found:
        raise BadConfig(
            f"--weights {path}: no state dict in it", hint="save torch.save(model.state_dict(), path), or safetensors"
        )
    if chosen and chosen not in found:
        keys = ", ".join(filter(None, found))
        raise BadConfig(
            f"--weights {path} holds no {chosen!r}",
            hint=f"it holds {keys}" if keys else f"it holds one set of weights: leave out #{chosen}",
        )
    found = {chosen: found[chosen]} if chosen else found
    faults = {key: _faults(state, wanted) for key, state in found.items()}
    right = [key for key in found if not faults[key]]
    if len(right) > 1 and not all(_same(found[key], found[right[0]]) for key in right):
        raise BadConfig(
            f"--weights {path} holds several sets of weights that fit: {', '.join(right)}",
            hint=f"averaged (EMA) ones are often better; say which: {path.name}#{right[-1]}",
        )
    if not right:
        fault = min(faults.values(), key=len)
        more = f" and {len(fault) - _SHOWN} more" if len(fault) > _SHOWN else ""
        raise BadConfig(
            f"--weights {path}: {'; '.join(fault[:_SHOWN])}{more}",
            hint="is it a checkpoint of this model, built with the same arguments (number of classes, width)?",
        )
    module.load_state_dict(found[right[0]], strict=False)
    return len(found[right[0]])


def _plain(name: str) -> str:
    """The name of a weight norm's part as it was before parametrizations; torch's hook takes it in both."""
    return _NORMED.sub(lambda found: f"{found[1]}_{'gv'[int(found[2])]}", name)


def _states(found: Any, key: str = "", depth: int = _DEPTH) -> dict[str, _State]:
    """Every mapping of names to tensors in a checkpoint, by the keys that lead there."""
    if not isinstance(found, Mapping):
        return {}
    if found and all(isinstance(value, torch.Tensor) for value in found.values()):
        return {key: {_plain(str(name)): value for name, value in found.items() if name != "n_averaged"}}
    inner = found.items() if depth else ()
    return {k: v for name, value in inner for k, v in _states(value, f"{key}.{name}".strip("."), depth - 1).items()}


def _candidates(states: Mapping[str, _State], wanted: _State) -> dict[str, _State]:
    """What may be the model's state, by its key: of each state dict the names below the prefix where most fit."""
    found: dict[str, _State] = {}
    some = list(wanted)[:: max(1, len(wanted) // 8)]
    for key, state in states.items():
        ends = {name[: len(name) - len(word)] for word in some for name in state if name.endswith(word)}
        counts = {end: sum(end + name in state for name in wanted) for end in sorted(ends) if end[-1:] in ("", ".")}
        best = [end for end in counts if counts[end] == max(counts.values())] or [""]
        for end in best:
            others = tuple(other for other in best if other.startswith(end) and other != end)
            below = {name: value for name, value in state.items() if name.startswith(end)}
            taken = state if len(best) == 1 else {n: value for n, value in below.items() if not n.startswith(others)}
            place = key if len(best) == 1 else f"{key}.{end}".strip(".") or "plain"
            found[place] = {name.removeprefix(end): value for name, value in taken.items()}
    return found


def _shared(state: _State, wanted: _State) -> _State:
    """`state` with the names that it lacks because another name holds the same tensor of the model."""
    twins: dict[object, list[str]] = {}
    for name, tensor in wanted.items():
        twins.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), []).append(name)
    filled = {name: state[twin] for names in twins.values() for name in names for twin in names if twin in state}
    return {**filled, **state}


def _faults(state: _State, wanted: _State) -> list[str]:
    """What does not fit, in words."""
    faults = [f"{name} is missing" for name in wanted if name not in state and not name.endswith(_COUNTER)]
    faults += [f"{name} is not in the model" for name in state if name not in wanted]
    for name, theirs in state.items():
        ours = wanted.get(name, theirs)
        if theirs.shape != ours.shape:
            faults.append(f"{name} is {list(theirs.shape)}, the model's is {list(ours.shape)}")
        elif theirs.is_floating_point() != ours.is_floating_point():
            faults.append(f"{name} is {theirs.dtype}, the model's is {ours.dtype}")
    return faults


def _same(a: _State, b: _State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as fault:
            raise BadConfig(f"--weights {path}: {fault}") from fault
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as fault:  # torch raises anything, from UnpicklingError to IndexError, for a foreign file
        held = re.search(r"GLOBAL (\S+)", str(fault))
        if held is None:
            raise BadConfig(
                f"--weights {path} is not a checkpoint of torch", hint="give .pth or .safetensors"
            ) from fault
        raise BadConfig(
            f"--weights {path} holds a Python object ({held[1]}) beside tensors: opening it could run code",
            hint="where you trust it, load it yourself and save model.state_dict()",
        ) from fault
