"""A module written down as data, for code that cannot be exported: class names, plain attributes, and weights apart.

`draw` takes a module to pieces that JSON and safetensors hold; `raise_up` imports the classes and puts it together
again, without calling their constructors. Nothing is pickled. What is no plain data (a lambda, a hook, an open file)
is refused by its path.
"""

from __future__ import annotations

import ast
import enum
import functools
import importlib
import math
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from torchship import process
from torchship.errors import BuildFailed, NotFound
from torchship.recipe import Recipe
from torchship.tensors import Signature

if TYPE_CHECKING:
    import torch

_HOMES = ("torch", "torch.nn.functional", "torch._C._nn", "math", "operator", "builtins")
_OWN_WAYS = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
_PLACES = ("_parameters", "_buffers", "_modules")
Resolve = Callable[[str], Any]


class Part(msgspec.Struct, frozen=True):
    """One object: its class as `module:name`, and its attributes, each a mapping of one kind to its content."""

    kind: str
    state: dict[str, Any]


class Blueprint(msgspec.Struct, frozen=True):
    """`parts` hold each object once; `root` is the value they belong to."""

    root: Any
    parts: list[Part]


class Cut(msgspec.Struct, frozen=True):
    """One submodule that another backend runs. `spec`: torch's description of the containers its outputs come in."""

    path: str
    recipe: Recipe
    signature: Signature
    spec: str


class Drawing(NamedTuple):
    """A Blueprint, its tensors by name, and the classes and functions that it names."""

    blueprint: Blueprint
    tensors: dict[str, torch.Tensor]
    named: dict[str, Any]


def draw(value: Any) -> Drawing:
    """`value`, a module, written down. Raises BuildFailed with the path of what cannot be."""
    pen = _Pen()
    root = pen.write(value, "")
    parts = [part for part in pen.parts if part is not None]
    return Drawing(Blueprint(root, parts), pen.tensors, pen.named)


def raise_up(drawn: Blueprint, tensors: dict[str, torch.Tensor], *, resolve: Resolve = process.resolve) -> Any:
    """The value again. `resolve` finds a class by its name. Raises NotFound where a class is not to be had."""
    import torch

    def find(name: str) -> Any:
        try:
            return resolve(name)
        except (ImportError, AttributeError) as fault:
            hint = "install the model's package, or put its folder on PYTHONPATH"
            raise NotFound(f"{name!r} cannot be imported: {fault}", hint=hint) from fault

    blanks: list[Any] = []
    for part in drawn.parts:
        kind = find(part.kind)
        blanks.append(kind.__new__(kind))
        if isinstance(blanks[-1], torch.nn.Module):
            torch.nn.Module.__init__(blanks[-1])
    weights = {name: torch.nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}
    hand = _Hand(blanks, tensors, weights, find)
    for part, blank in zip(drawn.parts, blanks, strict=True):
        state = {name: hand.read(value) for name, value in part.state.items()}
        if hasattr(blank, "__setstate__"):  # a module's own way to fill in what it did not write down
            blank.__setstate__(state)
        else:
            blank.__dict__.update(state)
    return hand.read(drawn.root)


class _Pen:
    """Writes values down, each object and tensor once."""

    def __init__(self) -> None:
        self.parts: list[Part | None] = []
        self.tensors: dict[str, torch.Tensor] = {}
        self.named: dict[str, Any] = {}
        self._seen: dict[int, tuple[Any, Any]] = {}  # the object is held, so that its id stays its own

    def write(self, value: Any, path: str) -> Any:
        """One value as a mapping of its kind to its content."""
        if value is None or type(value) in (bool, int, float, str):
            return {"is": value} if type(value) is not float or math.isfinite(value) else {"odd": str(value)}
        if id(value) in self._seen:
            return self._seen[id(value)][1]
        found = _written_container(value, path, self) or _written_name(value, path, self)
        return found or _written_torch(value, path, self) or self._object(value, path)

    def remember(self, value: Any, found: Any) -> Any:
        """The same value is written the same way again."""
        self._seen[id(value)] = (value, found)
        return found

    def keep(self, tensor: torch.Tensor, path: str) -> str:
        """The name under which a tensor goes into the file."""
        name = _plain(path) or "value"
        name = name if name not in self.tensors else f"{name}#{len(self.tensors)}"
        self.tensors[name] = tensor.detach()
        return name

    def name(self, value: Any, path: str) -> str:
        """`module:name` of a class or a function. Raises BuildFailed for one that has none."""
        word, home = getattr(value, "__qualname__", ""), getattr(value, "__module__", "")
        for module in (home, *_HOMES):
            with suppress(ImportError, AttributeError):
                script = module == "__main__" and "<" not in word
                if module and (script or process.resolve(f"{module}:{word}") is value):
                    self.named[f"{module}:{word}"] = value
                    return f"{module}:{word}"
        raise _refusal(path, f"{getattr(value, '__qualname__', value)!s}, which no import finds")

    def _object(self, value: Any, path: str) -> Any:
        import torch

        kind = type(value)
        module = isinstance(value, torch.nn.Module)
        if isinstance(value, torch.jit.ScriptModule):
            raise _refusal(path, "TorchScript")
        own = any(getattr(kind, way, None) is not getattr(object, way, None) for way in _OWN_WAYS)
        if not hasattr(value, "__dict__") or (own and not module):
            raise _refusal(path, f"a {kind.__module__}.{kind.__qualname__}")
        number = len(self.parts)
        self.parts.append(None)
        found = self.remember(value, {"part": number})
        state = dict(_state_of(value, path) if module else vars(value))
        written = {str(name): self.write(item, f"{path}.{name}") for name, item in state.items()}
        self.parts[number] = Part(self.name(kind, path), written)
        return found


def _state_of(module: torch.nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """A module's attributes, but those that every new module has alike."""
    import torch

    fresh = vars(torch.nn.Module())
    try:
        state: dict[str, Any] = module.__getstate__() or {}  # type: ignore[no-untyped-call]
    except Exception as fault:
        raise _refusal(path, f"a {type(module).__name__}, which says: {str(fault).partition('. ')[0]}") from fault
    for name, value in state.items():
        if "hooks" in name and name in fresh:
            for hook in value.values() if name in ("_forward_hooks", "_forward_pre_hooks") else ():
                words = name.strip("_").replace("_", " ")
                raise _refusal(path, f"a module with {words} ({getattr(hook, '__qualname__', type(hook).__name__)})")
        elif name in _PLACES or name not in fresh or value != fresh[name]:
            yield name, value


def _written_container(value: Any, path: str, pen: _Pen) -> Any:
    def each(items: Iterable[Any]) -> list[Any]:
        return [pen.write(item, f"{path}.{i}") for i, item in enumerate(items)]

    if type(value) in (list, tuple, set, frozenset):
        return {type(value).__name__: each(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"named": [pen.name(type(value), path), each(value)]}
    if type(value) in (dict, OrderedDict):
        pairs = [[pen.write(key, path), pen.write(item, f"{path}.{key}")] for key, item in value.items()]
        return {"ordered" if type(value) is OrderedDict else "dict": pairs}
    if isinstance(value, slice | range):
        return {type(value).__name__: each((value.start, value.stop, value.step))}
    if isinstance(value, functools.partial):
        return {"partial": [pen.write(part, path) for part in (value.func, value.args, value.keywords)]}
    return None


def _written_name(value: Any, path: str, pen: _Pen) -> Any:
    if isinstance(value, enum.Enum):
        return {"member": [pen.name(type(value), path), value.name]}
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return {"name": pen.name(value, path)}
    return {"package": value.__name__} if isinstance(value, types.ModuleType) else None


def _written_torch(value: Any, path: str, pen: _Pen) -> Any:
    import torch

    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return {"name": f"torch:{str(value).removeprefix('torch.')}"}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        return {"array": pen.keep(torch.from_numpy(np.array(value)), path)}
    if not isinstance(value, torch.Tensor):
        return None
    if value.layout != torch.strided or value.is_quantized or type(value) not in (torch.Tensor, torch.nn.Parameter):
        raise _refusal(path, f"a tensor of a special kind ({type(value).__name__}, {value.layout})")
    kind = "weight" if isinstance(value, torch.nn.Parameter) else "tensor"
    return pen.remember(value, {kind: pen.keep(value, path)})


def _refusal(path: str, what: str) -> BuildFailed:
    return BuildFailed(
        f"{_plain(path) or 'the module'} is {what}: it cannot be written down as data",
        hint="define classes and functions at the top of a module, or name a function that makes the model: "
        'source="module:function"',
    )


def _plain(path: str) -> str:
    """The path as a user writes it."""
    return ".".join(word for word in path.split(".") if word and word not in _PLACES)


class _Hand(NamedTuple):
    """Reads values back."""

    parts: list[Any]
    tensors: dict[str, torch.Tensor]
    weights: dict[str, torch.nn.Parameter]
    find: Resolve

    def read(self, value: Any) -> Any:
        """One value from the mapping of its kind to its content, or a list of these."""
        if isinstance(value, list):
            return [self.read(item) for item in value]
        ((kind, content),) = value.items()
        return _CONTAINERS[kind](self.read(content)) if kind in _CONTAINERS else _READERS[kind](content, self)


_CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "ordered": OrderedDict,
    "slice": lambda items: slice(*items),
    "range": lambda items: range(*items),
    "partial": lambda items: functools.partial(items[0], *items[1], **items[2]),
}
_READERS: dict[str, Callable[[Any, _Hand], Any]] = {
    "is": lambda content, hand: content,
    "odd": lambda content, hand: float(content),
    "part": lambda content, hand: hand.parts[content],
    "named": lambda content, hand: hand.find(content[0])(*hand.read(content[1])),
    "member": lambda content, hand: hand.find(content[0])[content[1]],
    "name": lambda content, hand: hand.find(content),
    "package": lambda content, hand: importlib.import_module(content),
    "device": lambda content, hand: process.resolve("torch:device")(content),
    "size": lambda content, hand: process.resolve("torch:Size")(content),
    "array": lambda content, hand: hand.tensors[content].cpu().numpy()[()],  # a number where it has no axes
    "tensor": lambda content, hand: hand.tensors[content],
    "weight": lambda content, hand: hand.weights[content],
}


def excerpt(source: str, *, names: Collection[str], file: str) -> str:
    """The statements of `source` that bind `names`, and those that these need, in their order.

    What a script does besides (loading data, training, calling the search) stays out. Raises BuildFailed where a name
    is not bound at the top of the script.
    """
    lines = ast.parse(source).body
    binding: dict[str, list[int]] = {}
    for number, statement in enumerate(lines):
        for name in _bound(statement):
            binding.setdefault(name, []).append(number)
    wanted, kept = [name.partition(".")[0] for name in names], set[int]()
    missing = [name for name in wanted if name not in binding]
    if missing:
        raise BuildFailed(f"{missing[0]} is not defined at the top of {file}", hint="put it into a module of its own")
    while wanted:
        for number in binding.get(wanted.pop(), ()):
            if number not in kept:
                kept.add(number)
                wanted += [node.id for node in ast.walk(lines[number]) if isinstance(node, ast.Name)]
    kept |= {
        number for number, line in enumerate(lines) if isinstance(line, ast.ImportFrom) and line.module == "__future__"
    }
    return "\n\n".join(ast.get_source_segment(source, _whole(lines[number])) or "" for number in sorted(kept)) + "\n"


def _whole(statement: ast.stmt) -> ast.stmt:
    """The statement with its decorators."""
    decorators = getattr(statement, "decorator_list", [])
    if decorators:
        statement.lineno = min(decorator.lineno for decorator in decorators)
        statement.col_offset = 0
    return statement


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of a module binds."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        for alias in statement.names:
            yield (alias.asname or alias.name).partition(".")[0]
    elif isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield statement.name
    else:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Import | ast.ImportFrom):
                yield from _bound(node)
