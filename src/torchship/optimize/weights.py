"""Loads a checkpoint's weights into a module, and says exactly what does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torchship.errors import BadConfig, NotFound

_NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")  # what training scripts call it
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel, torch.compile, Lightning
_SHOWN = 5


def load_weights(module: torch.nn.Module, path: Path) -> int:
    """Put the tensors of `path` (safetensors, or what `torch.save` wrote of a state dict) into `module`, in place.

    A training script's nest (`{"state_dict": ...}`) and wrapper prefixes (`module.`) are taken off. Every parameter and
    persistent buffer must be there in its shape. Returns how many tensors were loaded. Nothing but tensors is
    unpickled. Raises NotFound or BadConfig.
    """
    wanted = module.state_dict()
    found = _fitting(_tensors(path), wanted)
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is not in the model" for name in found if name not in wanted]
    faults += [
        f"{name} is {list(tensor.shape)}, the model's is {list(wanted[name].shape)}"
        for name, tensor in found.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise BadConfig(
            f"--weights {path}: {'; '.join(faults[:_SHOWN])}{more}",
            hint="is it a checkpoint of this model, built with the same arguments (number of classes, width)?",
        )
    module.load_state_dict(found)
    return len(found)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, without what a training script put around them."""
    if not path.is_file():
        raise NotFound(f"--weights: no file {path}")
    found = _read(path)
    for nest in _NESTS:
        if isinstance(found, Mapping) and isinstance(found.get(nest), Mapping):
            found = found[nest]
            break
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        what = ", ".join(map(str, list(found)[:_SHOWN])) if isinstance(found, Mapping) else type(found).__name__
        raise BadConfig(
            f"--weights {path}: no state dict in it, but {what}",
            hint="save it with torch.save(model.state_dict(), path) or as safetensors",
        )
    return {str(name): tensor for name, tensor in found.items()}


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


def _fitting(found: dict[str, torch.Tensor], wanted: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors under the model's names: a wrapper's prefix is taken off where that makes more of them fit."""
    for wrapper in _WRAPPERS:
        bare = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
        if len(bare) == len(found) and len(bare.keys() & wanted.keys()) > len(found.keys() & wanted.keys()):
            found = bare
    return found
