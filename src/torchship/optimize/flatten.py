"""Makes any module take flat tensors and return a flat tuple: calls are rebuilt, nested outputs are named."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import re
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, TypeAlias

import torch

from torchship.errors import CaptureFailed

Path: TypeAlias = tuple[tuple[str, Any], ...]
Leaf: TypeAlias = tuple[str, Path, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where tensor number `index` belongs in a call."""

    index: int


@dataclasses.dataclass(frozen=True)
class Frame:
    """A call with its tensors taken out: everything that is no tensor stays as it was in the first example."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fill(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with `tensors` in their slots."""
        args = tuple(_fill(value, tensors) for value in self.args)
        return args, {name: _fill(value, tensors) for name, value in self.kwargs.items()}


class Flat(torch.nn.Module):
    """`inner` behind flat tensors: `forward(a, b, ...)` returns a tuple with one tensor for each of `paths`."""

    def __init__(self, inner: torch.nn.Module, *, frame: Frame, names: Sequence[str], paths: Sequence[Path]) -> None:
        super().__init__()
        self.inner = inner
        self.frame = frame
        self.paths = tuple(paths)
        self.moves: tuple[int, ...] = ()  # for each output the axis that is to come first
        self.steady = True  # whether two runs on the same input agree
        self.written: tuple[int, ...] = ()  # inputs that forward writes into: it gets copies of them
        # exporters read names and number of the inputs from the arguments of forward
        self.forward = MethodType(_forward(names), self)

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Rebuild the call, make it, and take the outputs apart."""
        return self.take(self.answer(tensors))

    def answer(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the user's module itself gives."""
        if self.written:
            tensors = [tensor.clone() if i in self.written else tensor for i, tensor in enumerate(tensors)]
        args, kwargs = self.frame.fill(tensors)
        return self.inner(*args, **kwargs)

    def take(self, output: Any) -> tuple[torch.Tensor, ...]:
        """The tensors of an answer, in the order of `paths`."""
        found = tuple(follow(output, path) for path in self.paths)
        if any(self.moves):
            return tuple(out.movedim(axis, 0) for out, axis in zip(found, self.moves, strict=True))
        return found


def _forward(names: Sequence[str]) -> Callable[..., Any]:
    arguments = ", ".join(identifiers(names))
    scope: dict[str, Any] = {"__name__": "torchship_flat"}
    exec(f"def forward(self, {arguments}):\n    return self.run(({arguments},))", scope)  # noqa: S102  # names are checked
    found: Callable[..., Any] = scope["forward"]
    return found


def identifiers(names: Sequence[str]) -> list[str]:
    """Distinct Python identifiers for tensor names."""
    taken: list[str] = ["self"]
    for name in names:
        word = _word(name)
        word = f"{word}_" if keyword.iskeyword(word) else word
        while word in taken:
            word += "_"
        taken.append(word)
    return taken[1:]


def _word(text: object) -> str:
    word = re.sub(r"\W", "_", str(text), flags=re.ASCII)
    return word if word[:1].isalpha() or word[:1] == "_" else f"t{word}"


def take_apart(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Frame, list[tuple[str, torch.Tensor]]]:
    """The Frame of a call and its tensors with their names: the parameter's, then keys and indices inside it."""
    found: list[tuple[str, torch.Tensor]] = []
    names = _parameter_names(module, args)
    frame = Frame(
        tuple(_empty(value, name, found) for name, value in zip(names, args, strict=True)),
        {name: _empty(value, name, found) for name, value in kwargs.items()},
    )
    if not found:
        raise CaptureFailed("the example inputs hold no tensor", hint="give tensors as the model's forward takes them")
    words = identifiers([name for name, _ in found])
    return frame, [(word, tensor) for word, (_, tensor) in zip(words, found, strict=True)]


def _parameter_names(module: torch.nn.Module, args: Sequence[Any]) -> list[str]:
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = []
    for index in range(len(args)):
        plain = index < len(parameters) and parameters[index].kind in (
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
        )
        names.append(parameters[index].name if plain else f"input_{index}")
    return names


def _empty(value: Any, name: str, found: list[tuple[str, torch.Tensor]]) -> Any:
    """`value` with its tensors replaced by slots; the tensors are appended to `found`."""
    if isinstance(value, torch.Tensor):
        found.append((name, value))
        return Slot(len(found) - 1)
    if isinstance(value, dict):
        return {key: _empty(item, f"{name}_{key}", found) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_empty(item, f"{name}_{i}", found) for i, item in enumerate(value)))
    if isinstance(value, list | tuple):
        return type(value)(_empty(item, f"{name}_{i}", found) for i, item in enumerate(value))
    return value


def _fill(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _fill(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_fill(item, tensors) for item in value))
    if isinstance(value, list | tuple):
        return type(value)([_fill(item, tensors) for item in value])
    return value


def outline(output: Any) -> list[Leaf]:
    """Name, path and value of every tensor in an output; names are stable and distinct, None and plain values drop."""
    found: list[Leaf] = []
    _outline(output, "", (), found)
    words = identifiers([name or "output" for name, _, _ in found])
    return [(word, path, tensor) for word, (_, path, tensor) in zip(words, found, strict=True)]


def _outline(value: Any, name: str, path: Path, found: list[Leaf]) -> None:
    def inside(key: object, how: str, item: Any) -> None:
        _outline(item, f"{name}_{key}" if name else str(key), (*path, (how, key)), found)

    if isinstance(value, torch.Tensor):
        found.append((name, path, value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inside(key, "item", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            inside(entry.name, "field", getattr(value, entry.name))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            inside(key, "field", getattr(value, key))
    elif isinstance(value, list | tuple):
        name = name or "output"
        for index, item in enumerate(value):
            inside(index, "item", item)


def follow(value: Any, path: Path) -> Any:
    """What `path` leads to inside an output."""
    for how, key in path:
        value = getattr(value, key) if how == "field" else value[key]
    return value
