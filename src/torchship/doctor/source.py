"""Reads the source of every forward for what the catalog's rows look for: lines that exporters freeze or drop."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

import torch

from torchship.doctor.catalog import constructs
from torchship.optimize.places import Place, is_users, place_at


def scan(module: torch.nn.Module) -> Iterator[tuple[str, Place]]:
    """Pairs of construct and place, over the distinct classes of the module's parts whose source is the user's."""
    for kind, part in {type(part): part for part in module.modules()}.items():
        forward = vars(kind).get("forward")
        if forward is not None:
            recurrent = {name for name, child in part.named_children() if isinstance(child, torch.nn.RNNBase)}
            yield from _scan(forward, kind.__name__, recurrent)


def _scan(forward: Callable[..., object], owner: str, recurrent: set[str]) -> Iterator[tuple[str, Place]]:
    forward = inspect.unwrap(forward)
    try:
        file = inspect.getsourcefile(forward) or ""
        lines, first = inspect.getsourcelines(forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return
    if not is_users(file):
        return
    outside, own = _outside(forward), next(iter(inspect.signature(forward).parameters), "self")
    for name in ast.walk(tree):
        if isinstance(name, ast.Name):
            name.id = "self" if name.id == own else "<outside>" if name.id in outside else name.id
    rows = [row for row in constructs().values() if row.source]
    for node in ast.walk(tree):
        text = _spelt(node, recurrent)
        construct = next((row.name for row in rows if text and re.search(row.source, text)), "")
        if construct:
            # a comprehension has no line of its own
            line = getattr(node.iter if isinstance(node, ast.comprehension) else node, "lineno", 1)
            yield construct, place_at(file, first + line - 1, f"{owner}.forward")


def _outside(forward: Callable[..., object]) -> set[str]:
    """Names of the module-level objects that outlive a call of `forward`, and that it could change."""
    code, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return {name for name in getattr(code, "co_names", ()) if isinstance(known.get(name), list | dict | set | int)}


def _spelt(node: ast.AST, recurrent: set[str]) -> str:
    """What a row's `source` is searched in: the kind of a node and what it looks at; empty for all other nodes.

    `recurrent` are the attributes of self that hold recurrent layers.
    """
    words = ""
    match node:
        case ast.Call():
            name = _name(node.func)
            name = "<recurrent>" if name.removeprefix("self.") in recurrent else name
            given = [*map(_argument, node.args), *(f"{word.arg}={_argument(word.value)}" for word in node.keywords)]
            words = f"call {name}({', '.join(given)})"
        case ast.If() | ast.IfExp() | ast.While() | ast.Assert():
            kind = {ast.While: "while", ast.Assert: "assert"}.get(type(node), "if")
            words = f"{kind} {ast.unparse(node.test)}"
        case ast.For() | ast.comprehension():
            words = f"for {ast.unparse(node.iter)}"
        case ast.Assign():
            words = f"set {', '.join(map(ast.unparse, node.targets))}"
        case ast.AugAssign():
            words = f"set {ast.unparse(node.target)}"
        case ast.Subscript(slice=ast.Compare(), ctx=ast.Load()):
            words = f"pick {ast.unparse(node)}"
        case ast.Try():
            words = "try"
    return words


def _name(node: ast.expr) -> str:
    """The dotted name of what is called, with `[]` for an index; what begins with another call has no beginning."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return f"{_name(node.value)}[]"
    return node.id if isinstance(node, ast.Name) else ""


def _argument(node: ast.expr) -> str:
    """A literal as it is written, `_` for all else."""
    return ast.unparse(node) if isinstance(node, ast.Constant | ast.List | ast.Tuple) else "_"
