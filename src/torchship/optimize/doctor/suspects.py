"""Reads the source of every forward for lines that exporters freeze or drop without a word."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator

import torch

from torchship.optimize.places import Place, is_users, place_at

_CHANGING = ("append", "extend", "insert", "update", "add", "pop", "clear", "setdefault", "remove")
_RANDOM = (
    "rand",
    "randn",
    "randint",
    "rand_like",
    "randn_like",
    "bernoulli",
    "multinomial",
    "randperm",
    "normal_",
    "uniform_",
)
_VALUES = ("any", "all", "sum", "max", "min", "mean", "item", "norm", "isnan", "isinf")


def scan(module: torch.nn.Module) -> Iterator[tuple[str, Place]]:
    """Pairs of construct and place, over the distinct classes of the module's parts whose source is the user's."""
    for kind in dict.fromkeys(type(part) for part in module.modules()):
        forward = vars(kind).get("forward")
        if forward is not None:
            yield from _scan(forward, kind.__name__)


def _scan(forward: Callable[..., object], owner: str) -> Iterator[tuple[str, Place]]:
    try:
        file = inspect.getsourcefile(forward) or ""
        lines, first = inspect.getsourcelines(forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return
    if not is_users(file):
        return
    for node in ast.walk(tree):
        for look in (_on_call, _on_branch, _on_write, _on_mask, _on_try):
            construct = look(node)
            if construct:
                yield construct, place_at(file, first + getattr(node, "lineno", 1) - 1, f"{owner}.forward")


def _on_call(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    name = _name(node.func)
    last = name.rpartition(".")[2]
    bare_dropout = name.endswith(("F.dropout", "functional.dropout")) and len(node.args) < 3
    marks = (
        (last in ("item", "tolist") and not node.args, ".item()"),
        (last == "numpy" or name.startswith(("np.", "numpy.")), "numpy inside the model"),
        (name == "print", "print or logging"),
        (name.startswith("self.") and last in _CHANGING and name.count(".") >= 2, "side effect in Python"),
        (last in ("view", "reshape") and _fixed(node.args), "size written into the code"),
        (last in _RANDOM and name.startswith("torch."), "random numbers"),
        (
            bare_dropout and all(word.arg != "training" for word in node.keywords),
            "dropout that eval() cannot switch off",
        ),
    )
    return next((construct for fits, construct in marks if fits), "")


def _fixed(sizes: list[ast.expr]) -> bool:
    """Whether the first size is a plain number."""
    return bool(sizes) and isinstance(sizes[0], ast.Constant) and isinstance(sizes[0].value, int)


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _on_branch(node: ast.AST) -> str:
    """A test that calls a reduction of a tensor: `x.sum() > 0`, `torch.any(...)`."""
    if not isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
        return ""
    if any(isinstance(part, ast.Attribute) and part.attr in ("shape", "size") for part in ast.walk(node.test)):
        return "size written into the code"
    calls = (_name(part.func).rpartition(".") for part in ast.walk(node.test) if isinstance(part, ast.Call))
    return "data-dependent if" if any(owner and last in _VALUES for owner, _, last in calls) else ""


def _on_write(node: ast.AST) -> str:
    """Assignments to attributes of self."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
    own = any(isinstance(part, ast.Attribute) and _name(part).startswith("self.") for part in targets)
    return "side effect in Python" if own else ""


def _on_mask(node: ast.AST) -> str:
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Compare) and isinstance(node.ctx, ast.Load):
        return "output length depends on data"
    return ""


def _on_try(node: ast.AST) -> str:
    return "try and except" if isinstance(node, ast.Try) else ""
