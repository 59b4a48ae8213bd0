"""The part of a script that some of its classes need: their own text, and the imports and definitions they name."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

from torchship.errors import BuildFailed


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
