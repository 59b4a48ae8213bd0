"""Proposed edits: small rewrites of one statement of the user's source, as old and new lines."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

_SIZED = ("reshape", "view", "expand")


def propose(file: str, line: int, *, rewrite: str) -> tuple[str, str]:
    """Old and new source for the statement at a line: no new source where it should go, neither where none is known.

    `rewrite` is a name in REWRITES, or empty for constructs that have no safe rewrite.
    """
    if not rewrite:
        return "", ""
    try:
        source = Path(file).read_text()
        found = _statement(ast.parse(source), line)
    except (OSError, SyntaxError, ValueError):
        return "", ""
    if found is None:
        return "", ""
    statement, following = found
    new = REWRITES[rewrite](statement, following)
    if new is None:
        return "", ""
    old = _as_written(source, statement)
    if following and isinstance(statement, ast.If) and new.startswith("return ") and not statement.orelse:
        old += "\n" + _as_written(source, following)
    return old, new


def removed(statement: ast.stmt, following: ast.stmt | None) -> str | None:
    """The statement goes."""
    return "" if isinstance(statement, ast.Expr | ast.Assert) else None


def _as_written(source: str, statement: ast.stmt) -> str:
    """The user's own text of a statement, without its indentation."""
    lines = source.splitlines()[statement.lineno - 1 : statement.end_lineno]
    return textwrap.dedent("\n".join(lines))


def _statement(tree: ast.Module, line: int) -> tuple[ast.stmt, ast.stmt | None] | None:
    """The innermost statement that begins at `line` (or holds it, where it is no block), and the one after it."""
    best: tuple[ast.stmt, ast.stmt | None] | None = None
    for node in ast.walk(tree):
        for _, body in ast.iter_fields(node):
            if not (isinstance(body, list) and body and isinstance(body[0], ast.stmt)):
                continue
            for index, statement in enumerate(body):
                if statement.lineno <= line <= _head_end(statement):
                    best = (statement, body[index + 1] if index + 1 < len(body) else None)
    return best


def _head_end(statement: ast.stmt) -> int:
    """The last line of a statement, or of its head where it opens a block."""
    if not hasattr(statement, "body"):
        return statement.end_lineno or statement.lineno
    heads = (node.end_lineno or 0 for node in ast.iter_child_nodes(statement) if isinstance(node, ast.expr))
    return max([statement.lineno, *heads])


def _outcome(body: list[ast.stmt]) -> tuple[str, str] | None:
    """What a branch of one statement comes to: `return ` or `name = `, and the source of a tensor."""
    match body:
        case [ast.Return(value=ast.expr() as value)] if _is_tensor(value):
            return "return ", ast.unparse(value)
        case [ast.Assign(targets=[target], value=value)] if _is_tensor(value):
            return f"{ast.unparse(target)} = ", ast.unparse(value)
    return None


def _where(condition: ast.expr, a: str, b: str) -> str:
    text = ast.unparse(condition)
    for name in ("bool", "float", "int"):
        if text.startswith(f"{name}(") and text.endswith(")") and isinstance(condition, ast.Call):
            text = text[len(name) + 1 : -1]
    return f"torch.where({text.replace('.item()', '')}, {a}, {b})"


def branch(statement: ast.stmt, following: ast.stmt | None) -> str | None:
    """`if c: return a` then `return b`, `if c: v = a` else `v = b`, or the only `v = a if c else b`, as torch.where."""
    if isinstance(statement, ast.If):
        yes, no = _outcome(statement.body), _outcome(statement.orelse or ([following] if following else []))
        if yes and not statement.orelse and yes[0] != "return ":
            no = yes[0], yes[0].removesuffix(" = ")
        fits = yes and no and yes[0] == no[0] and _decides(statement.test)
        return f"{yes[0]}{_where(statement.test, yes[1], no[1])}" if fits and yes and no else None
    copy = ast.parse(ast.unparse(statement))
    choices = [node for node in ast.walk(copy) if isinstance(node, ast.IfExp)]
    sides = [side for choice in choices for side in (choice.body, choice.orelse) if _is_tensor(side)]
    if hasattr(statement, "body") or len(choices) != 1 or len(sides) != 2 or not _decides(choices[0].test):
        return None
    new = _where(choices[0].test, *map(ast.unparse, sides))
    return ast.unparse(ast.parse(ast.unparse(copy).replace(ast.unparse(choices[0]), new)))


def _decides(test: ast.expr) -> bool:
    """Whether a test is one value of a tensor: lengths, `is`, `and` and `not` are Python's own."""
    own = any(isinstance(part, ast.BoolOp | ast.Not | ast.Is | ast.IsNot) for part in ast.walk(test))
    return not own and not re.search(r"\blen\(|\.shape\b|\.size\(", ast.unparse(test))


def _is_tensor(value: ast.expr) -> bool:
    """Whether an expression can be one tensor: no tuple, text or None."""
    words = isinstance(value, ast.Constant) and not isinstance(value.value, int | float)
    return not words and not isinstance(value, ast.Tuple | ast.List | ast.Dict | ast.JoinedStr)


class _DropItem(ast.NodeTransformer):
    """`float(x.item())` and `x.item()` become `x`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "item" and not node.args:
            return node.func.value
        if isinstance(node.func, ast.Name) and node.func.id in ("float", "bool") and len(node.args) == 1:
            return node.args[0]
        return node


def no_item(statement: ast.stmt, following: ast.stmt | None) -> str | None:
    """The statement without taking numbers out of tensors."""
    if isinstance(statement, ast.For | ast.While | ast.FunctionDef) or "int(" in ast.unparse(statement):
        return None
    if isinstance(statement, ast.If):
        return branch(statement, following)
    new = ast.unparse(_DropItem().visit(ast.parse(ast.unparse(statement))))
    return new if new != ast.unparse(statement) else None


def no_size(statement: ast.stmt, following: ast.stmt | None) -> str | None:
    """The statement with -1 for the number that a view or reshape begins with."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.If | ast.For | ast.While):
        return None
    copy, changed = ast.parse(ast.unparse(statement)), False
    for node in ast.walk(copy):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _SIZED:
            sizes = node.args[0].elts if node.args and isinstance(node.args[0], ast.Tuple | ast.List) else node.args
            words = [ast.unparse(size) for size in sizes]
            if words and words[0].isdigit() and "-1" not in words:
                sizes[0] = ast.parse("-1", mode="eval").body
                changed = True
    return ast.unparse(copy) if changed else None


def out_of_place(statement: ast.stmt, following: ast.stmt | None) -> str | None:
    """`x.add_(1)` as `x = x.add(1)`: enough where x is no view that something else reads."""
    if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
        return None
    function = statement.value.func
    if not (isinstance(function, ast.Attribute) and function.attr.endswith("_") and not function.attr.endswith("__")):
        return None
    owner = ast.unparse(function.value)
    arguments = ", ".join(ast.unparse(item) for item in [*statement.value.args, *statement.value.keywords])
    return f"{owner} = {owner}.{function.attr[:-1]}({arguments})" if owner.isidentifier() else None


REWRITES: dict[str, Callable[[ast.stmt, ast.stmt | None], str | None]] = {
    rewrite.__name__: rewrite for rewrite in (removed, branch, no_item, no_size, out_of_place)
}
