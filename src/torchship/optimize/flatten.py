"""Makes any module take flat tensors and return a flat tuple: calls are rebuilt, nested outputs are named."""

from __future__ import annotations

import dataclasses
import inspect
import keyword
import re
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch

from torchship.errors import CaptureFailed
from torchship.lowering import tree
from torchship.lowering.torch_stage import no_fast_path


@dataclasses.dataclass(frozen=True)
class CallTemplate:
    """A call with its tensors taken out: everything that is no tensor stays as it was in the first example."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fill(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keyword arguments with `tensors` in their slots."""
        args, kwargs = tree.fill((self.args, self.kwargs), tensors)
        return args, kwargs


class Flat(torch.nn.Module):
    """`inner` behind flat tensors: `forward(a, b, ...)` returns a tuple with one tensor for each of `paths`."""

    def __init__(
        self, inner: torch.nn.Module, *, frame: CallTemplate, names: Sequence[str], paths: Sequence[tree.Path]
    ) -> None:
        super().__init__()
        self.inner = inner
        self.frame = frame
        self.paths = tuple(paths)
        self.moves: tuple[int, ...] = ()  # for each output the axis that is to come first
        self.steady = True  # whether two runs on the same input agree
        self.remembers: list[str] = []  # the paths of what forward changes in itself
        self.written: tuple[int, ...] = ()  # inputs that forward writes into: it gets copies of them
        # exporters read names and number of the inputs from the arguments of forward
        arguments, scope = ", ".join(identifiers(names)), dict[str, Any](__name__="torchship_flat")
        exec(f"def forward(self, {arguments}):\n    return self.run(({arguments},))", scope)  # noqa: S102  # checked
        self.forward = MethodType(scope["forward"], self)

    def run(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Rebuild the call, make it, and take the outputs apart."""
        return self.take(self.answer(tensors))

    def answer(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What the user's module itself gives."""
        if self.written:
            tensors = [tensor.clone() if i in self.written else tensor for i, tensor in enumerate(tensors)]
        args, kwargs = self.frame.fill(tensors)
        with no_fast_path():
            return self.inner(*args, **kwargs)

    def take(self, output: Any) -> tuple[torch.Tensor, ...]:
        """The tensors of an answer, in the order of `paths`."""
        found = tuple(tree.follow(output, path) for path in self.paths)
        if any(self.moves):
            return tuple(out.movedim(axis, 0) for out, axis in zip(found, self.moves, strict=True))
        return found


def identifiers(names: Sequence[str]) -> list[str]:
    """Distinct Python identifiers for tensor names."""
    taken: list[str] = ["self"]
    for name in names:
        word = re.sub(r"\W", "_", name, flags=re.ASCII)
        word = word if word[:1].isalpha() or word[:1] == "_" else f"t{word}"
        word = f"{word}_" if keyword.iskeyword(word) else word
        while word in taken:
            word += "_"
        taken.append(word)
    return taken[1:]


def take_apart(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[CallTemplate, list[tuple[str, torch.Tensor]]]:
    """The CallTemplate of a call and its tensors with their names: the parameter's, then keys and indices inside it."""
    parts, names = tree.Parts(), [f"input_{index}" for index in range(len(args))]
    for index, parameter in enumerate(parameters_of(module)[: len(args)]):
        if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            names[index] = parameter.name
    named = [*zip(names, args, strict=True), *kwargs.items()]
    given = [tree.take_apart(value, parts, name=name, numbered=True) for name, value in named]
    frame = CallTemplate(tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True)))
    for leaf in parts.hiding:
        raise CaptureFailed(
            f"argument {leaf.name!r} is a {kind_of(leaf.value)}: tensors in it would be constants of the artifact",
            hint="give its tensors by themselves, in a list, a dict or a dataclass",
        )
    if not parts.tensors:
        raise CaptureFailed("the example inputs hold no tensor", hint="give tensors as the model's forward takes them")
    words = identifiers([leaf.name for leaf in parts.tensors])
    return frame, [(word, leaf.value) for word, leaf in zip(words, parts.tensors, strict=True)]


def kind_of(value: object) -> str:
    """The type of a value as its module and name."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def parameters_of(module: torch.nn.Module) -> list[inspect.Parameter]:
    """The parameters of forward; none where Python cannot tell."""
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def outline(output: Any, parts: tree.Parts | None = None) -> list[tree.Leaf]:
    """Every tensor of an output with its way there, under stable and distinct names; `parts` takes in all the rest.

    So it does a single number that an object keeps for itself, as a cache keeps its window: it belongs to no row.
    """
    parts = parts or tree.Parts()
    tree.take_apart(output, parts)
    leaves: list[tree.Leaf] = []
    for leaf in parts.tensors:
        own = not leaf.value.dim() and any(_private(*step) for step in leaf.path)
        (parts.others if own else leaves).append(leaf)
    words = identifiers([leaf.name or "output" for leaf in leaves])
    return [tree.Leaf(word, leaf.path, leaf.value) for word, leaf in zip(words, leaves, strict=True)]


def _private(how: str, key: object) -> bool:
    return how == "field" and str(key).startswith("_")
