"""Refuses torch archives that would run code when they are opened, before torch sees them.

`torch.export.load` falls back to the unrestricted unpickler, hands expressions to `sympy.sympify` (which evaluates
Python) and follows any dotted name below `torch`; `torch.jit.load` runs TorchScript that may write files. Here an
archive is read as plain data first and must hold nothing but tensors, expressions of numbers and known operators.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchship.errors import CorruptArtifact, UnsafeArtifact

_PLAIN = re.compile(
    r"^(data/weights/[\w.]+|data/constants/[\w.]+|models/[\w.]+\.json|data/sample_inputs/[\w.]+\.pt"
    r"|archive_format|archive_version|version|\.data/version|byteorder|\.data/serialization_id)$"
)
_OPERATOR = re.compile(
    r"^(torch\.ops\.(?!(?:aten\.(?:from_file|save)|inductor|profiler)\b)[a-z]\w*\."
    r"(?:(?!_*__)\w+|__i?(?:and|or|xor|lshift|rshift)__)(\.(?!__)\w+)?"
    r"|torch\.ops\.higher_order\.\w+|torch\.(sym_\w+|_sym_\w+)"
    r"|_operator\.(?!attrgetter|methodcaller|call\b)\w+|math\.\w+)$"
)
_NODES = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Call, ast.Name, ast.Load, ast.Constant,
          ast.keyword, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.Tuple)  # fmt: skip
_GUARD_NODES = (*_NODES, ast.Attribute, ast.Subscript)
_FUNCTIONS = re.compile(
    r"^(Symbol|Dummy|Integer|Rational|Float|Half|Add|Mul|Pow|Mod|PythonMod|CleanDiv|CeilDiv|FloorDiv|CeilToInt"
    r"|FloorToInt|TruncToInt|TruncToFloat|IntTrueDiv|FloatTrueDiv|FloatPow|PowByNatural|RoundToInt|RoundDecimal"
    r"|ToFloat|Where|ModularIndexing|Identity|Min|Max|Abs|And|Or|Not|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality"
    r"|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|ITE|Piecewise|ExprCondPair|Tuple|floor|ceiling|sqrt|log"
    r"|exp|LShift|RShift|BitwiseFn_bitwise_and|BitwiseFn_bitwise_or|BitwiseFn_bitwise_xor|OpaqueUnaryFn_sqrt"
    r"|OpaqueUnaryFn_exp|OpaqueUnaryFn_log|OpaqueUnaryFn_log2|IsNonOverlappingAndDenseIndicator)$"
)
_WORD = re.compile(r"^[\w.+\-]*$")
_SCRIPT_SIDE_EFFECT = re.compile(r"\b(?:torch|ops\.\w+)\.(?:save|from_file|load|_save_parameter)\b")


def refuse_code_in_program(path: Path) -> None:
    """Raise UnsafeArtifact unless the exported program at `path` is plain data; CorruptArtifact if it is no archive."""
    with _archive(path) as archive:
        for name in archive.namelist():
            inside = name.partition("/")[2]
            if not _PLAIN.match(inside):
                raise UnsafeArtifact(f"{path.name} holds {name!r}, which no plain exported program has")
            if inside.endswith(".json"):
                _check_json(json.loads(archive.read(name)), path)
            elif inside.startswith("data/sample_inputs/"):
                _check_pickle(archive.read(name), path)


def refuse_code_in_script(path: Path) -> None:
    """Raise UnsafeArtifact when the TorchScript archive at `path` can touch files; CorruptArtifact if it is none."""
    with _archive(path) as archive:
        for name in archive.namelist():
            if name.endswith(".py") and _SCRIPT_SIDE_EFFECT.search(archive.read(name).decode(errors="replace")):
                raise UnsafeArtifact(f"{path.name} reads or writes files in {name!r}")


def _archive(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as fault:
        raise CorruptArtifact(f"{path.name} cannot be read: {fault}", hint="pack the artifact again") from None


def _check_pickle(data: bytes, path: Path) -> None:
    import torch

    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as fault:
        line = " ".join(str(fault).split())[:120]
        raise UnsafeArtifact(f"{path.name} holds example inputs that are not plain tensors: {line}") from None


def _check_json(content: Any, path: Path) -> None:
    for key, value in _walk(content):
        if key == "use_pickle" and value:
            raise UnsafeArtifact(f"{path.name} holds a pickled weight")
        if key == "expr_str":
            _check_expression(value, path)
        if key == "guards_code":
            for guard in value:
                _check_expression(guard, path, guard=True)
        if key == "target" and isinstance(value, str) and "." in value and not _OPERATOR.match(value):
            raise UnsafeArtifact(f"{path.name} calls {value!r}, which is no operator of torch")


def _check_expression(text: Any, path: Path, *, guard: bool = False) -> None:
    try:
        tree = ast.parse(str(text), mode="eval")
    except SyntaxError:
        raise UnsafeArtifact(f"{path.name} holds an expression that cannot be read: {str(text)[:80]!r}") from None
    if not all(_harmless(node, guard) for node in ast.walk(tree)):
        raise UnsafeArtifact(f"{path.name} holds an expression that could run code: {str(text)[:80]!r}")


def _harmless(node: ast.AST, guard: bool) -> bool:
    if not isinstance(node, _GUARD_NODES if guard else _NODES):
        return False
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or bool(_WORD.match(node.value))
    if isinstance(node, ast.Call):
        called = node.func
        size = guard and isinstance(called, ast.Attribute) and called.attr in ("size", "stride", "storage_offset")
        return size or (isinstance(called, ast.Name) and _FUNCTIONS.match(called.id) is not None)
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return not name.startswith("__")


def _walk(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _walk(value)
    elif isinstance(content, list):
        for value in content:
            yield from _walk(value)
