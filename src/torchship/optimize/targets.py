"""Reads what the command line names: the target module, data, metric, recipes, times and sizes."""

from __future__ import annotations

import difflib
import json
import logging
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import Parameter
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from torchship import process, textfiles
from torchship.errors import BadConfig, BadInput, NotFound
from torchship.optimize.channels import Prune
from torchship.optimize.flatten import parameters_of
from torchship.optimize.places import innermost
from torchship.optimize.weights import load_weights
from torchship.recipe import Recipe
from torchship.stages import images
from torchship.stages.labels import read_labels
from torchship.stages.picture import SUFFIXES, picture_files, read_file
from torchship.tensors import Array, TensorSpec

_MOST_PICTURES = 256
_MOST_BATCHES = 512
# a command line begins with these options, and leaves out what is at its default
_FIRST = ("weights", "data", "evaluate", "finetune", "backends", "max_latency_p99", "max_memory", "max_size", "labels",
          "budget", "name")  # fmt: skip
_DEFAULTS = {"goal": "latency", "budget": "10m", "threads": 0, "device": "cpu"}


def read_wish(target: str, *, inputs: Sequence[str], recipes: Sequence[str], **given: Any) -> dict[str, Any]:
    """The arguments of `optimize`, from those of the command line by the names of its options; None: left out.

    Raises BadConfig or NotFound naming the argument that is wrong.
    """
    words = {"input": inputs, "recipe": recipes, **{key: given[key] for key in _FIRST}}
    command = _command(target, {**words, **{key: value for key, value in given.items() if key not in words}})
    module = module_at(target)
    if given["weights"] is not None:
        load_weights(module, Path(given["weights"]))
    specs = [TensorSpec.parse(text) for text in inputs]
    readers: dict[str, Callable[[str], Any]] = {
        "data": lambda text: list(data_at(text, specs=specs)),
        "evaluate": lambda text: found_at(text, what="--evaluate"),
        "finetune": lambda text: found_at(text, what="--finetune"),
        "prune": prune_at,
        "train": lambda text: found_at(text, what="--train"),
        "backends": lambda text: [word.strip() for word in text.split(",") if word.strip()],
        "budget": lambda text: seconds(text, what="--budget"),
        "max_latency_p99": lambda text: milliseconds(text, what="--max-latency-p99"),
        "max_memory": lambda text: memory(text, what="--max-memory"),
        "max_size": lambda text: size(text, what="--max-size"),
        "labels": labels_at,
    }
    options = {
        key: readers[key](value) if key in readers and value is not None else value for key, value in given.items()
    }
    del options["weights"]
    options["calibration"] = calibration = options.pop("data")
    options["recipes"] = [recipe for text in recipes for recipe in recipes_at(text)] or None
    options["name"] = given["name"] or target.rpartition(":")[2].rpartition(".")[2] or target
    options["labels"] = options["labels"] or []
    if not specs and not calibration:
        raise BadConfig(
            "no inputs are given", hint='add --input "image:FP32[-1,3,224,224]", or --data with real inputs'
        )
    return {
        **options,
        "module": module,
        "example_inputs": specs or [without_labels(sample, module) for sample in calibration[:4]],
        "source": target,
        "command": command,
    }


def _command(target: str, given: dict[str, Any]) -> str:
    """The command line that asks for the same again."""
    words = ["torchship", "optimize", target]
    for key, value in given.items():
        option = f"--{key.replace('_', '-')}"
        if key == "batched":
            words += [] if value is None else [option if value else "--not-batched"]
        elif isinstance(value, bool):
            words += [option] if value else []
        elif isinstance(value, (list, tuple)):
            words += [word for item in value for word in (option, item)]
        elif value is not None and _DEFAULTS.get(key) != value:
            words += [option, str(value)]
    return shlex.join(words)


def without_labels(sample: Any, module: torch.nn.Module) -> Any:
    """A sample as a data loader yields it, with labels behind the inputs, as forward takes it: the first items only."""
    kinds = [parameter.kind for parameter in parameters_of(module)]
    if not isinstance(sample, list | tuple) or not kinds or Parameter.VAR_POSITIONAL in kinds:
        return sample
    most = sum(kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    labelled = isinstance(sample, tuple) or (len(sample) == most + 1 and np.ndim(sample[-1]) < 2)
    return tuple(sample[:most]) if labelled and len(sample) > most else sample


def found_at(target: str, *, what: str) -> Any:
    """The object that `module:attribute` or `folder/file.py:attribute` names."""
    module, colon, attribute = target.rpartition(":")
    if not colon:
        raise BadConfig(
            f"{what}: {target!r} is not module:attribute", hint="write it as mypackage.module:name or file.py:name"
        )
    if module.endswith(".py"):
        if not Path(module).is_file():
            raise NotFound(f"{what}: no file {module}")
        sys.path.insert(0, str(Path(module).parent.resolve()))
        target = f"{Path(module).stem}:{attribute}"
    try:
        return process.resolve(target)
    except (ImportError, AttributeError) as fault:
        raise NotFound(f"{what}: {target!r} cannot be imported: {fault}", hint=_instead(target)) from fault
    except (Exception, SystemExit) as fault:
        raise BadConfig(
            f"{what}: {module} fails when it is imported: {_told(fault)}",
            hint='what a script does when it is run belongs under if __name__ == "__main__"',
        ) from fault


def _instead(target: str) -> str:
    """What to try where `module:attribute` was not found: the name that is nearest to it, of a module that is there."""
    module, _, attribute = target.partition(":")
    if module not in sys.modules:
        return "is it on PYTHONPATH, and spelt right?"
    found = sys.modules[module]
    names = [name for name in vars(found) if not name.startswith("_")]
    near = difflib.get_close_matches(attribute, names, 1)
    return f"did you mean {near[0]}?" if near else f"{getattr(found, '__file__', module)} defines no such name"


def _told(fault: BaseException) -> str:
    """An error in one line, with the innermost line of the user's code that it came through."""
    place = innermost(fault)
    where = f" [{place}: {place.code}]" if place else ""
    return f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}{where}"


def labels_at(target: str) -> list[str]:
    """Class names out of a file, as `TopK` reads it, or from `module:attribute`, a list or a function giving one."""
    if Path(target).is_file():
        return read_labels(target)
    if ":" not in target:
        raise NotFound(f"--labels: no file {target!r}", hint="give a file with one name a line, or module:attribute")
    found = found_at(target, what="--labels")
    return [str(label) for label in (found() if callable(found) else found)]


def module_at(target: str) -> torch.nn.Module:
    """The nn.Module that TARGET is or returns."""
    found = found_at(target, what="TARGET")
    if not isinstance(found, torch.nn.Module):
        if not callable(found):
            raise BadConfig(
                f"TARGET: {target!r} is of type {type(found).__name__}",
                hint="name an nn.Module or a function that returns one",
            )
        try:
            found = found()
        except (Exception, SystemExit) as fault:
            wanting = isinstance(fault, TypeError) and "argument" in str(fault)
            raise BadConfig(
                f"TARGET: {target!r} {'needs arguments' if wanting else 'fails when it is called'}: {_told(fault)}",
                hint="write a small function that returns the module"
                if wanting
                else "the line above is where it stops",
            ) from fault
    if not isinstance(found, torch.nn.Module):
        raise BadConfig(f"TARGET: {target!r} returned something of type {type(found).__name__}, not an nn.Module")
    return found


def prune_at(text: str) -> Prune:
    """`0.5` (the share of the multiplications that is to go), `2ms` (until a call takes no longer), or `0.7,2ms`."""
    shares = [word for word in text.split(",") if not word.strip().endswith("s")]
    times = [word for word in text.split(",") if word not in shares]
    try:
        (share,) = map(float, shares or ["0.9" if times else ""])
        (latency,) = (milliseconds(word, what="--prune") for word in times) if times else (0.0,)
    except ValueError:
        raise BadConfig(f"--prune {text!r} is not understood", hint="write 0.5, 2ms or 0.7,2ms") from None
    return Prune(share, rounds=8 if latency else 3, importance="taylor", latency=latency)


def data_at(target: str, *, specs: Sequence[TensorSpec]) -> Iterable[Any]:
    """Batches from a function (or anything iterable), or from a folder of pictures for a picture input.

    Raises BadConfig where the function fails or gives no batch, NotFound where there is none.
    """
    if Path(target).is_dir():
        return pictures(Path(target), specs=specs)
    if ":" not in target:
        raise NotFound(
            f"--data: no folder {target}", hint="give a folder of pictures, module:function or file.py:function"
        )
    found = found_at(target, what="--data")
    try:
        made = found() if callable(found) else found
        batches = list(islice(made, _MOST_BATCHES)) if isinstance(made, Iterable) else None
    except (Exception, SystemExit) as fault:
        raise BadConfig(f"--data: {target!r} fails: {_told(fault)}", hint="the line above is where it stops") from fault
    if batches is None:
        raise BadConfig(f"--data: {target!r} gives a {type(made).__name__}", hint="return or yield batches")
    if not batches:
        raise BadConfig(f"--data: {target!r} gives no batch", hint="return or yield batches")
    return batches


def pictures(folder: Path, *, specs: Sequence[TensorSpec]) -> Iterator[Array]:
    """The pictures of a folder as single rows, as `predict` and the stage `Classify` make them; what is none is left
    out with a warning.

    Use a `--data` function where the model was trained with other preprocessing.
    """
    try:
        (spec,) = specs
        read = images.reader(spec)
    except (ValueError, BadInput):
        raise BadConfig(
            "--data: a folder of pictures needs one --input with a shape like FP32[-1,3,224,224]",
            hint="give a module:function that yields batches instead",
        ) from None
    paths = list(islice(picture_files(folder), _MOST_PICTURES))
    if not paths:
        raise NotFound(f"--data: no pictures in {folder}", hint=f"looked for {', '.join(SUFFIXES)}")
    return _rows(paths, read)


def _rows(paths: Sequence[Path], read: Callable[[bytes], Array]) -> Iterator[Array]:
    for path in paths:
        try:
            yield read(read_file(path))
        except BadInput as fault:
            logging.getLogger(__name__).warning("--data: %s is left out: %s", path, fault)


def recipes_at(text: str) -> list[Recipe]:
    """Recipes from JSON, or from a .json or .toml file; one or a list (`[[recipe]]` in TOML)."""
    try:
        if text.lstrip()[:1] in "[{":
            found = json.loads(text)
        else:
            found = (
                textfiles.read_toml(Path(text)) if text.endswith(".toml") else json.loads(textfiles.read(Path(text)))
            )
        several = found.get("recipe", found) if isinstance(found, dict) else found
        return msgspec.convert(several if isinstance(several, list) else [several], list[Recipe])
    except (ValueError, msgspec.ValidationError) as fault:
        raise BadConfig(
            f"--recipe {text[:80]!r}: {fault}",
            hint='write {"backend": "onnxruntime", "options": {"precision": "int8"}}',
        ) from fault


# what may stand behind a number, by the example that whoever writes another is given
_UNITS: dict[str, dict[str, float]] = {
    "90s, 10m or 1h": {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600},
    "12ms or 0.5s": {"": 1, "ms": 1, "s": 1000},
    "300MB or 1GiB": {"": 1, "b": 1, "k": 1e3, "kb": 1e3, "kib": 2**10, "m": 1e6, "mb": 1e6, "mib": 2**20,
                      "g": 1e9, "gb": 1e9, "gib": 2**30},
}  # fmt: skip


_LEAST_MEMORY = 10**6


def _number(text: str, *, what: str, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].lower() if found else None
    if found is None or unit not in _UNITS[example]:
        raise BadConfig(f"{what}: {text!r} is not understood", hint=f"write {example}")
    return float(found[1]) * _UNITS[example][unit]


def seconds(text: str, *, what: str) -> float:
    """`90s`, `10m`, `1h` or plain seconds."""
    return _number(text, what=what, example="90s, 10m or 1h")


def milliseconds(text: str, *, what: str) -> float:
    """`12`, `12ms` or `0.5s` in milliseconds."""
    return _number(text, what=what, example="12ms or 0.5s")


def size(text: str, *, what: str) -> int:
    """`300MB` or `1GiB` in bytes."""
    return int(_number(text, what=what, example="300MB or 1GiB"))


def memory(text: str, *, what: str) -> int:
    """The same, of memory. Raises BadConfig for less than any process takes: a unit was forgotten."""
    if (found := size(text, what=what)) < _LEAST_MEMORY:
        raise BadConfig(f"{what}: {text} is {found} bytes, less than any process takes", hint="write 300MB or 1GiB")
    return found
