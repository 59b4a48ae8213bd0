"""The journeys lead through code that is there: every file and function that they name exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests.house.documents import ROOT

PAGES = ("journeys.md", "house.md")
STEP = re.compile(r"`((?:\w+/)*\w+\.py):([\w.]+)`")


def places() -> list[tuple[str, str]]:
    """Every `file.py:name` of the pages."""
    return [found for page in PAGES for found in STEP.findall((ROOT / "docs" / page).read_text())]


def named(file: str, name: str) -> bool:
    """Whether a file of the engine defines a function, class, method or constant of this dotted name."""
    path = ROOT / "src" / "torchship" / file
    if not path.is_file():
        return False
    inside: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in name.split("."):
        found = [node for node in inside if part in names_of(node)]
        if not found:
            return False
        inside = list(getattr(found[-1], "body", []))
    return True


def names_of(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_the_pages_name_places() -> None:
    assert len(places()) > 30


@pytest.mark.parametrize(("file", "name"), places(), ids=":".join)
def test_a_place_of_a_journey_exists(file: str, name: str) -> None:
    assert named(file, name)


@pytest.mark.parametrize(
    ("file", "name"), [("model.py", "Modell"), ("nowhere.py", "Model"), ("model.py", "Model.nowhere")]
)
def test_a_place_that_is_not_there_is_found(file: str, name: str) -> None:
    assert not named(file, name)
