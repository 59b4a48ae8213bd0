"""How large the house is: lines a room, the longest file and function, class names, and what breaks its rules.

    python -m benchmarks.size

A room is a package with the files that lie directly in it. The rules are those that tests/house/test_shape.py holds:
class names are unique over engine and applications, a file name occurs once below each top package, and no module
takes a name that begins with an underscore from another package.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import click

ROOT = Path(__file__).parents[1]
Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file of the engine or of an application; `module` is its dotted name, `package` that of its folder."""

    path: Path
    module: str
    package: str

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def lines(self) -> int:
        return self.text.count("\n")

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def top(self) -> str:
        """`torchship.serve` for all that lies below it; an application's package for all of that."""
        parts = self.package.split(".")
        return ".".join(parts[: 2 if self.engine else 1])

    @property
    def engine(self) -> bool:
        """Whether it belongs to the engine, not to an application."""
        return self.package.partition(".")[0] == "torchship"

    def functions(self) -> Iterator[tuple[str, int]]:
        """Name and length of every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1

    def classes(self) -> list[str]:
        return [node.name for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef)]


def sources() -> list[Source]:
    """Every Python file of the engine and of the applications, generated ones left out."""
    found = []
    for folder in (ROOT / "src", *sorted(ROOT.glob("apps/*/src"))):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if not path.name.endswith("_pb2.py"):
                names = parts[:-1] if parts[-1] == "__init__" else parts
                found.append(Source(path, ".".join(names), ".".join(parts[:-1])))
    return found


def rooms(files: list[Source]) -> dict[str, int]:
    """Lines of each package, those of its subpackages not counted."""
    found: dict[str, int] = defaultdict(int)
    for source in files:
        found[source.package] += source.lines
    return dict(found)


def doubled_classes(files: list[Source]) -> dict[str, list[str]]:
    """Class names that are defined more than once, and where."""
    found: dict[str, list[str]] = defaultdict(list)
    for source in files:
        for name in source.classes():
            found[name].append(source.name)
    return {name: places for name, places in sorted(found.items()) if len(places) > 1}


def doubled_files(files: list[Source]) -> dict[str, list[str]]:
    """File names that occur more than once below one top package, and where."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source in files:
        if source.path.name != "__init__.py":
            found[source.top, source.path.name].append(source.name)
    return {f"{top}: {name}": places for (top, name), places in sorted(found.items()) if len(places) > 1}


def private_imports(files: list[Source]) -> list[str]:
    """Every use of a name with an underscore that another package owns: imported by name, or reached by its module."""
    packages = {source.module: source.package for source in files}
    return [
        f"{source.name}:{line} {name}"
        for source in files
        for line, name in _foreign_names(source, packages)
        if any(part.startswith("_") and not part.startswith("__") for part in name.split(".")[1:])
    ]


def _foreign_names(source: Source, packages: dict[str, str]) -> Iterator[tuple[int, str]]:
    """The dotted names that a file takes from other packages of this house, each with its line."""
    bound: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom) and node.module in packages:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                owner = packages.get(whole, packages[node.module])
                if owner != source.package:
                    yield node.lineno, whole
                    if whole in packages:
                        bound[alias.asname or alias.name] = whole
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            yield node.lineno, f"{bound[node.value.id]}.{node.attr}"


@click.command(help="Print lines a room, the longest file and function, and what breaks the rules of the house.")
def main() -> None:
    files = sources()
    counted = rooms(files)
    width = max(map(len, counted))
    for room, lines in sorted(counted.items()):
        print(f"{room:{width}} {lines:7,}")
    longest = max(files, key=lambda source: source.lines)
    length, function = max((lines, f"{source.name}:{name}") for source in files for name, lines in source.functions())
    public = [name for source in files for name in source.classes() if not name.startswith("_")]
    print(f"longest file      {longest.lines} {longest.name}")
    print(f"longest function  {length} {function}")
    print(f"public classes    {len(public)}")
    doubled = doubled_classes(files) | doubled_files(files)
    private = private_imports(files)
    for name, places in doubled.items():
        print(f"doubled           {name}: {', '.join(places)}")
    for use in private:
        print(f"private           {use}")
    engine = sum(source.lines for source in files if source.engine)
    apps = sum(source.lines for source in files if not source.engine)
    print(
        f"engine_lines={engine} apps_lines={apps} doubled_names={len(doubled)} private_imports={len(private)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
