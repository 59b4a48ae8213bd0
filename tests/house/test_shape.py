"""The house keeps its shape: sizes, names, docstrings, the error tree, light imports.

`benchmarks.size` measures; here are the bounds. The tables of what still breaks a rule may only become shorter.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import size

from torchship import errors

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in (ROOT / "src", *ROOT.glob("apps/*/src")) for path in folder.rglob("*.py"))
EVERYTHING = [
    path
    for folder in ("src", "apps", "tests", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
FILES = size.sources()
GENERATED = "_pb2.py"
FORBIDDEN_NAMES = {
    "utils",
    "util",
    "helper",
    "helpers",
    "manager",
    "handler",
    "factory",
    "base",
    "common",
    "misc",
    "core",
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", EVERYTHING, ids=relative)
def test_a_file_has_at_most_600_lines_and_says_what_it_is(path: Path) -> None:
    if path.name.endswith(GENERATED):
        return
    text = path.read_text()
    assert len(text.splitlines()) <= 600
    assert ast.get_docstring(ast.parse(text)), "a module begins with one sentence"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_function_has_at_most_50_lines(path: Path) -> None:
    if path.name.endswith(GENERATED):
        return
    long = {
        f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno and f.end_lineno - f.lineno >= 50
    }
    assert not long


def test_the_median_file_is_small() -> None:
    sizes = sorted(len(path.read_text().splitlines()) for path in SOURCES)
    assert sizes[len(sizes) // 2] < 200


# Lines of code a room may have. Raised only by a commit that says what it took out in return.
ENGINE = 37_316

# The same for each room; a package that is not here counts to the one it lies in.
ROOMS = {
    "torchship": 1_965,
    "torchship.artifact": 1_756,
    "torchship.backends": 1_975,
    "torchship.cli": 1_908,
    "torchship.client": 1_411,
    "torchship.doctor": 1_800,
    "torchship.lowering": 3_159,
    "torchship.optimize": 8_184,
    "torchship.optimize.transforms": 453,
    "torchship.pipeline": 1_529,
    "torchship.serve": 2_604,
    "torchship.serve.api": 1_358,
    "torchship.serve.engine": 2_802,
    "torchship.serve.http": 3_447,
    "torchship.stages": 1_392,
    "torchship.wire": 1_573,
    "torchship_faces": 2_149,
    "torchship_faces.gallery": 1_935,
    "torchship_video": 3_858,
    "torchship_video.identity": 1_327,
    "torchship_video.sinks": 1_218,
    "torchship_video.sources": 257,
}

FORBIDDEN_WORDS = re.compile(r"\b(faces?|persons?|people|gallery|galleries)\b", re.IGNORECASE)


def test_the_engine_keeps_to_its_budget() -> None:
    assert sum(source.lines for source in FILES if source.engine) <= ENGINE


def test_every_room_keeps_to_its_budget() -> None:
    found = dict.fromkeys(ROOMS, 0)
    for package, lines in size.rooms(FILES).items():
        found[next(room for room in sorted(ROOMS, reverse=True) if f"{package}.".startswith(f"{room}."))] += lines
    assert {room: (lines, ROOMS[room]) for room, lines in found.items() if lines > ROOMS[room]} == {}


def test_a_class_or_file_name_means_one_thing() -> None:
    assert size.doubled_classes(FILES) | size.doubled_files(FILES) == {}


def test_no_package_takes_the_private_names_of_another() -> None:
    assert size.private_imports(FILES) == []


def test_private_names_of_other_packages_are_found(tmp_path: Path) -> None:
    text = (
        "from torchship.wire import raw\nfrom torchship.wire.raw import _join\nfrom torchship.cli import _shown\n"
        "raw._split()\nfrom torchship.wire.raw import join\nraw.join()\n_shown.console\n"
    )
    path = size.ROOT / "src" / "torchship" / "cli" / "made_up.py"
    made = size.Source(path, "torchship.cli.made_up", "torchship.cli")
    vars(made)["text"] = text
    others = [
        size.Source(path, name, name.rpartition(".")[0])
        for name in ("torchship.wire", "torchship.cli", "torchship.wire.raw", "torchship.cli._shown")
    ]
    for other in others:
        vars(other)["text"] = ""
    found = [use.split()[-1] for use in size.private_imports([made, *others])]
    assert sorted(found) == ["torchship.wire.raw._join", "torchship.wire.raw._split"]


@pytest.mark.parametrize("source", FILES, ids=lambda source: source.name)
def test_a_file_holds_an_idea_not_a_splinter(source: size.Source) -> None:
    plugin = source.package in ("torchship.backends", "torchship.optimize.transforms")
    door = "__all__" in source.text  # what others may use, gathered from where it is
    if source.path.name.startswith("__") or plugin or door:
        return
    assert source.lines >= 40


@pytest.mark.parametrize("source", FILES, ids=lambda source: source.name)
def test_the_engine_does_not_speak_of_its_applications(source: size.Source) -> None:
    if not source.engine:
        return
    assert FORBIDDEN_WORDS.findall(source.text) == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_names_say_what_a_thing_is(path: Path) -> None:
    words = set(re.split(r"[_\W]+", relative(path).removesuffix(".py")))
    classes = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    words |= {word.lower() for name in classes for word in re.findall(r"[A-Z][a-z]+", name)}
    assert not words & FORBIDDEN_NAMES


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_public_functions_are_documented(path: Path) -> None:
    bare = [f.name for f in ast.parse(path.read_text()).body
            if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not f.name.startswith("_") and not ast.get_docstring(f)]  # fmt: skip
    assert not bare


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"^([│ ├└─]*)([A-Z]\w+)(?:\s|$)", line)
        if found and inspect.isclass(getattr(errors, found[2], None)):
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            drawn[found[2]] = path[depth - 1] if depth else "Exception"
    real = {
        name: thing.__bases__[0].__name__
        for name, thing in vars(errors).items()
        if inspect.isclass(thing) and issubclass(thing, Exception) and thing.__module__ == errors.__name__
    }
    assert drawn == real


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in found.stdout.split()}


HEAVY = {"torch", "numpy", "onnxruntime", "onnx", "openvino", "PIL", "rich", "uvloop", "zmq", "psutil", "msgspec"}


def test_importing_the_package_is_light() -> None:
    assert not loaded_after("import torchship") & HEAVY


def test_help_is_light() -> None:
    run = "try: torchship.cli.main()\nexcept SystemExit: pass"
    statement = f"import sys, torchship.cli\nsys.argv = ['torchship', '--help']\n{run}"
    assert not loaded_after(statement) & HEAVY


def test_a_worker_holds_nothing_of_servers_and_clients_in_memory() -> None:
    """There is one for each copy of each stage; the client of remote stages alone takes 12 MiB."""
    assert not loaded_after("import torchship.serve.engine.worker") & {"asyncio", "google", "uvloop", "ssl", "jinja2"}


@pytest.mark.parametrize("room", ["serve", "client", "artifact", "wire", "stages", "pipeline"])
def test_the_serving_half_starts_without_torch(room: str) -> None:
    statement = (
        "import importlib, pkgutil, torchship\n"
        f"import torchship.{room} as room\n"
        "for found in pkgutil.walk_packages(room.__path__, room.__name__ + '.'): importlib.import_module(found.name)"
    )
    assert not loaded_after(statement) & {"torch", "onnx", "openvino", "torchvision"}


def test_nothing_unpickles() -> None:
    allowed = {"src/torchship/optimize"}  # the search and its own trial children: docs/decisions/0003
    pattern = re.compile(r"\bpickle\.loads?\b|recv_pyobj|weights_only=False|allow_pickle=True|cloudpickle")
    found = [relative(path) for path in SOURCES if pattern.search(path.read_text())]
    assert [path for path in found if not any(path.startswith(room) for room in allowed)] == []
