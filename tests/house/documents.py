"""Takes the documents apart: code blocks, commands, links, headings, tables; and makes the world they speak of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "apps").rglob("*.md")),
]
_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the document on which it begins."""

    language: str
    text: str
    line: int


def blocks(path: Path, *languages: str) -> list[Block]:
    """The fenced blocks of these languages ("" is none)."""
    text = path.read_text()
    found = [Block(m["language"], m["text"], text.count("\n", 0, m.start()) + 1) for m in _FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


def prose(path: Path) -> str:
    """The text outside fenced blocks."""
    return _FENCE.sub("", path.read_text())


def links(path: Path) -> Iterator[str]:
    """Targets of links that do not leave the repository."""
    for target in _LINK.findall(prose(path)):
        if not target.startswith(("http://", "https://", "mailto:")):
            yield target


def anchors(path: Path) -> set[str]:
    """What a #fragment of this document may be, as GitHub makes it from headings."""
    heads = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", head).lower()).replace(" ", "-") for head in heads}


def commands(path: Path) -> Iterator[str]:
    """Every torchship command line: in blocks without a language or of a shell, and in `code` that begins so."""
    for block in blocks(path, "", "sh", "bash", "console"):
        whole = block.text.replace("\\\n", " ")
        for line in whole.splitlines():
            yield from _commands_in(line.strip().removeprefix("$ "))
    for code in re.findall(r"`(torchship [^`]+)`", prose(path)):
        if "..." not in code:
            named = re.fullmatch(r"torchship [a-z-]+( [a-z-]+)?", code)  # text may name a command without its arguments
            yield from _commands_in(f"{code} --help" if named else code)


def _commands_in(line: str) -> Iterator[str]:
    """`a | b`, `a && b`, `(cd x; b)`: the parts that call torchship, without redirections and comments."""
    for part in re.split(r"\s(?:\||&&|;)\s", line):
        words = re.sub(r"\s+#\s.*$|\s\d?>+&?\s*\S+|\s&$", "", part).strip()
        found = re.match(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?torchship (.*)$", words)
        if found:
            yield found[1]


def tables(path: Path, heading: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading that begins so, by their first cell, code marks taken off."""
    _, found, rest = path.read_text().partition(f"\n{heading}")
    assert found, f"{path.name} has no heading {heading!r}"
    rows = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert rows, f"{path.name} has no table below {heading!r}"
    cells = [[cell.strip() for cell in row.strip()[1:-1].split("|")] for row in rows[0].splitlines()[2:]]
    return {row[0].strip("`"): [cell.strip("`") for cell in row[1:]] for row in cells}
