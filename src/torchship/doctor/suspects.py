"""Reads the source of every forward for lines that exporters freeze or drop without a word."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

import torch

from torchship.optimize.places import Place, is_users, place_at

_CHANGING = ("append", "extend", "insert", "update", "add", "pop", "clear", "setdefault", "remove")
_RANDOM = re.compile(r"randn?(_like)?|randint|randperm|bernoulli|multinomial|normal_|uniform_")
RECURRENT = "recurrent layer over a free axis"
PACKED = "packed sequence"
_DROPS = "dropout that eval() cannot switch off"
_VALUES = ("any", "all", "sum", "max", "min", "mean", "item", "norm", "isnan", "isinf")


def scan(module: torch.nn.Module) -> Iterator[tuple[str, Place]]:
    """Pairs of construct and place, over the distinct classes of the module's parts whose source is the user's."""
    for kind, part in {type(part): part for part in module.modules()}.items():
        forward = vars(kind).get("forward")
        if forward is not None:
            recurrent = {name for name, child in part.named_children() if isinstance(child, torch.nn.RNNBase)}
            yield from _scan(forward, kind.__name__, recurrent)


def _scan(forward: Callable[..., object], owner: str, recurrent: set[str]) -> Iterator[tuple[str, Place]]:
    try:
        file = inspect.getsourcefile(forward) or ""
        lines, first = inspect.getsourcelines(forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return
    if not is_users(file):
        return
    loose, own = _loose(forward), next(iter(inspect.signature(forward).parameters), "self")
    for name in ast.walk(tree):
        if isinstance(name, ast.Name) and name.id == own:
            name.id = "self"
    for node in ast.walk(tree):
        for look in (_on_call, _on_branch, _on_loop, _on_write, _on_mask, _on_try):
            construct = look(node) or ("side effect in Python" if _changes(node, loose) else "")
            if isinstance(node, ast.Call) and _name(node.func).removeprefix("self.") in recurrent:
                construct = RECURRENT
            if construct:
                yield construct, place_at(file, first + _line(node) - 1, f"{owner}.forward")


def _line(node: ast.AST) -> int:
    """A comprehension has no line of its own."""
    return int(getattr(node.iter if isinstance(node, ast.comprehension) else node, "lineno", 1))


def _loose(forward: Callable[..., object]) -> set[str]:
    """Names of the module-level objects that outlive a call of `forward`, and that it could change."""
    code, outside = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return {name for name in getattr(code, "co_names", ()) if isinstance(outside.get(name), list | dict | set | int)}


def _changes(node: ast.AST, loose: set[str]) -> bool:
    """Whether a statement writes to one of these names: `COUNT += 1`, `SEEN["n"] = x`, `SEEN.append(x)`."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGING:
        targets = [node.func.value]
    roots = (target.value if isinstance(target, ast.Subscript) else target for target in targets)
    return any(isinstance(root, ast.Name) and root.id in loose for root in roots)


def _on_call(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    name = _name(node.func)
    last = name.rpartition(".")[2]
    training = next((word.value for word in node.keywords if word.arg == "training"), None)
    always = isinstance(training, ast.Constant) and training.value is True
    bare = len(node.args) < 3 and training is None  # F.dropout is on unless told otherwise
    marks = (
        (last in ("item", "tolist") and not node.args, ".item()"),
        (last == "numpy" or name.startswith(("np.", "numpy.")), "numpy inside the model"),
        (name == "print", "print or logging"),
        (last in ("pack_padded_sequence", "pack_sequence"), PACKED),
        (name.startswith("self.") and last in _CHANGING and name.count(".") >= 2, "side effect in Python"),
        (last in ("view", "reshape") and _fixed(node.args), "size written into the code"),
        (bool(_RANDOM.fullmatch(last)) and name.startswith("torch."), "random numbers"),
        (last == "dropout" and "." in name and name[:5] != "self." and (bare or always), _DROPS),
        (last == "batch_norm" and always, "batch norm that eval() cannot switch off"),
    )
    return next((construct for fits, construct in marks if fits), "")


def _fixed(sizes: list[ast.expr]) -> bool:
    """Whether the first size is a plain number."""
    if sizes and isinstance(sizes[0], ast.List | ast.Tuple):
        sizes = sizes[0].elts
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
    calls = (part.func for part in ast.walk(node.test) if isinstance(part, ast.Call))
    if not any(isinstance(call, ast.Attribute) and call.attr in _VALUES for call in calls):
        return ""
    other = {ast.While: "loop as long as the data says", ast.Assert: "assertion on values"}
    return other.get(type(node), "data-dependent if")


def _on_loop(node: ast.AST) -> str:
    """`for t in range(x.shape[1])` and `for row in x.unbind()`."""
    if not isinstance(node, ast.For | ast.comprehension):
        return ""
    parts = [part.attr for part in ast.walk(node.iter) if isinstance(part, ast.Attribute)]
    return "loop over a free axis" if {"shape", "size", "unbind", "split", "chunk"}.intersection(parts) else ""


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
