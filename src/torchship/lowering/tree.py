"""Nested arguments and outputs: taken apart into named tensors, and put together again.

Lists, tuples and dicts are nodes of torch's pytree. Every other object (a dataclass, a cache, a distribution) is opened
by its attributes, where these hold tensors: nobody has to register it.
"""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils import _pytree as pytree

Path: TypeAlias = tuple[tuple[str, Any], ...]
_NODES = (list, tuple, dict)
_CLOSED = (torch.nn.Module, torch.Size, torch.Generator, type, types.FunctionType, types.ModuleType, enum.Enum)
_PLAIN = (*_CLOSED, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_HIDING = (np.ndarray, Iterator, Set, types.FunctionType, torch.nn.Module)  # tensors may be inside, out of sight


@dataclass(frozen=True)
class Slot:
    """Where tensor number `index` belongs."""

    index: int


@dataclass(frozen=True)
class Hollow:
    """An object without its tensors. `how` its `content` is kept: fields (a named tuple), items or attributes."""

    kind: Any
    how: str
    content: dict[Any, Any]

    def filled(self, tensors: Sequence[torch.Tensor]) -> Any:
        """A new object, made without calling its constructor where it is no mapping and no tuple."""
        content = {key: fill(value, tensors) for key, value in self.content.items()}
        if self.how == "fields":
            return self.kind(*content.values())
        made: Any = self.kind() if self.how == "items" else self.kind.__new__(self.kind)
        for key, value in content.items():
            if self.how == "items":
                made[key] = value
            else:
                object.__setattr__(made, key, value)
        return made


@dataclass(frozen=True)
class Leaf:
    """A tensor, or a value that is none, with its name and the way to it."""

    name: str
    path: Path
    value: Any


@dataclass
class Parts:
    """What a value was taken apart into: its tensors; other values outside of opened objects; what may hide tensors."""

    tensors: list[Leaf] = field(default_factory=list)
    others: list[Leaf] = field(default_factory=list)
    hiding: list[Leaf] = field(default_factory=list)


def take_apart(value: Any, parts: Parts, *, name: str = "", numbered: bool = False) -> Any:
    """`value` with slots instead of its tensors, which are appended to `parts`.

    Names are joined from keys, indices and attributes; `numbered` counts the fields of named tuples instead.
    """
    return _Walk(parts, numbered).over(value, Leaf(name, (), value), ())


def fill(template: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """A new value, with `tensors` where the slots are."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Slot):
            return tensors[leaf.index]
        if isinstance(leaf, Hollow):
            return leaf.filled(tensors)
        return leaf if isinstance(leaf, _PLAIN) else copy.deepcopy(leaf)  # forward may write into it

    return pytree.tree_map(one, template, is_leaf=_is_leaf)


def follow(value: Any, path: Path) -> Any:
    """What `path` leads to inside a value."""
    for how, key in path:
        value = getattr(value, key) if how == "field" else value[key]
    return value


@dataclass(frozen=True)
class _Walk:
    parts: Parts
    numbered: bool

    def over(self, value: Any, at: Leaf, above: tuple[int, ...]) -> Any:
        """The template of a value inside the objects whose ids are `above`."""

        def visit(keys: Any, leaf: Any) -> Any:
            name, path = at.name, at.path
            for entry in keys:
                key = entry.key if isinstance(entry, pytree.MappingKey) else entry.idx
                name = (
                    f"{name}_{key}" if name else str(key) if isinstance(entry, pytree.MappingKey) else f"output_{key}"
                )
                path = (*path, ("item", key))
            return self.leaf(Leaf(name, path, leaf), above)

        return pytree.tree_map_with_path(visit, value, is_leaf=_is_leaf)

    def leaf(self, at: Leaf, above: tuple[int, ...]) -> Any:
        """The template of what is no list, tuple or dict."""
        value, found = at.value, self.parts.tensors
        if isinstance(value, torch.Tensor):
            if above and str(at.path[-1][1])[:1] == "_" and any(value is seen.value for seen in found):
                return Slot(next(i for i, seen in enumerate(found) if seen.value is value))
            found.append(at)
            return Slot(len(found) - 1)
        how, inside = _inside(value)
        count = len(found)
        if id(value) not in above:
            content = {}
            for number, (key, item) in enumerate(inside.items()):
                word = number if how == "fields" and self.numbered else key
                step = ("item" if how == "items" else "field", key)
                below = Leaf(f"{at.name}_{word}" if at.name else str(word), (*at.path, step), item)
                content[key] = self.over(item, below, (*above, id(value)))
            if len(found) > count:
                return Hollow(type(value), how, content)
        if value is not None and not above:
            (self.parts.hiding if isinstance(value, _HIDING) else self.parts.others).append(at)
        return value


def _is_leaf(value: Any) -> bool:
    return type(value) not in _NODES


def _inside(value: Any) -> tuple[str, dict[Any, Any]]:
    """How an object holds what it holds, by name; nothing for plain values."""
    if isinstance(value, _PLAIN):
        return "", {}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return "fields", dict(zip(value._fields, value, strict=True))
    if isinstance(value, Mapping):
        return "items", dict(value)
    slots = (name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if hasattr(value, name))
    found = {name: getattr(value, name) for name in slots if name not in ("__dict__", "__weakref__")}
    return "attributes", found | getattr(value, "__dict__", {})
