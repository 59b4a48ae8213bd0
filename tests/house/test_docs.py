"""The documents keep their word: their Python runs, their TOML and commands are accepted, their tables are true."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from tests.house.documents import DOCUMENTS, ROOT, anchors, blocks, commands, links, prose, tables
from torchship import errors, plugins, stages
from torchship.cli import app
from torchship.pipeline.config import StageConfig
from torchship.serve import config as servers
from torchship.stage import declared_parameters
from torchship.stages.remote import Options
from torchship.wire.status import status_of

DOCS = ROOT / "docs"
FOLLOWED = {
    path: name for path in DOCUMENTS if blocks(path, "python", "toml") for name in [str(path.relative_to(ROOT))]
}
OPTIMIZING = [name for path, name in FOLLOWED.items() if "torchship.optimize(" in path.read_text()]
LINES = [(str(path.relative_to(ROOT)), line) for path in DOCUMENTS for line in commands(path)]
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "### `[http]`": servers.Http,
    "### `[grpc]`": servers.Grpc,
    "### `[tls]`": servers.Tls,
    "### `[store]`": servers.StorePlace,
    "### `[log]`": servers.Logs,
    "### `[trace]`": servers.TraceConfig,
    "### `[control]`": servers.Control,
    "### `[[token]]`": servers.Token,
    "### `[[mount]]`": servers.Mount,
    "### `[[model]]`": servers.ModelConfig,
    "### `versions`": servers.Versions,
    "### Stages": StageConfig,
}
GRPC = {1: "CANCELLED", 3: "INVALID_ARGUMENT", 4: "DEADLINE_EXCEEDED", 5: "NOT_FOUND", 7: "PERMISSION_DENIED",
        12: "UNIMPLEMENTED", 13: "INTERNAL", 14: "UNAVAILABLE", 16: "UNAUTHENTICATED"}  # fmt: skip


def followed(world: Path, *names: str) -> str:
    """What `tests.house.follow` says about documents; empty when all goes well."""
    words = [sys.executable, "-m", "tests.house.follow", str(world), *names]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr[-2000:]


def test_python_runs_and_toml_is_accepted(tmp_path: Path) -> None:
    assert not followed(tmp_path, *(name for name in FOLLOWED.values() if name not in OPTIMIZING))


def test_python_that_optimizes_runs(tmp_path: Path) -> None:
    assert {"README.md", "docs/optimize.md"} <= set(OPTIMIZING)
    assert not followed(tmp_path, *OPTIMIZING)


def test_a_document_that_lies_is_found(tmp_path: Path) -> None:
    (tmp_path / "lie.md").write_text(
        "```python\nprint(undefined)\n```\n\n```toml\n[[model]]\nname = 'm'\nartefact = 'x'\n```\n\n"
        "```toml\nstages = [{run = 'torchship.stages.labels:TopK', parameters = {top_j = 3}}]\n```\n"
    )
    found = followed(tmp_path, str(tmp_path / "lie.md"))
    assert "lie.md:1: NameError" in found
    assert "unknown field `artefact`" in found
    assert "no parameter ['top_j']" in found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").rglob("*.toml")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_of_the_examples_are_accepted(path: Path) -> None:
    from torchship.optimize.targets import recipes_at

    assert recipes_at(str(path)) if path.name == "recipes.toml" else servers.read(path).model


@pytest.mark.parametrize(("document", "line"), LINES, ids=[f"{name}: {line[:50]}" for name, line in LINES])
def test_a_command_exists_with_its_options(document: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    understood(line, monkeypatch)


@pytest.mark.parametrize("line", ["serv x", "serve --http_port 8000 x", "store lst", "inspect", "bench x --rows none"])
def test_a_wrong_command_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(click.ClickException):
        understood(line, monkeypatch)


def understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command line as click would, files not looked for and nothing run."""
    command: click.Command = app
    arguments = shlex.split(line)
    context: click.Context | None = None
    while True:
        for parameter in command.params:
            if isinstance(parameter.type, click.Path | click.File):
                monkeypatch.setattr(parameter, "type", click.STRING)
        try:
            context = command.make_context(command.name, arguments, parent=context)
        except click.exceptions.Exit:  # --help, --version
            return
        if not isinstance(command, click.Group):
            return
        _, found, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command = found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in links(path):
        file, _, fragment = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        assert not fragment or fragment in anchors(there), target


def test_make_targets_and_benchmarks_exist() -> None:
    texts = [text for path in DOCUMENTS for text in (prose(path), *(b.text for b in blocks(path, "", "sh", "bash")))]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in texts:
        assert set(re.findall(r"(?:`|^|\n)make ([a-z]+)", text)) <= targets
        for name in re.findall(r"python -m benchmarks\.(\w+)", text):
            assert (ROOT / "benchmarks" / f"{name}.py").is_file(), name


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_reference_of_the_configuration_is_complete(heading: str) -> None:
    told = {name: cells[0] for name, cells in tables(DOCS / "serve.md", heading).items()}
    assert told == {field.name: shown(field) for field in msgspec.structs.fields(SECTIONS[heading])}


def shown(field: Any) -> str:
    """A default as the tables write it."""
    if field.default is msgspec.NODEFAULT and field.default_factory is msgspec.NODEFAULT:
        return "-"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, msgspec.Struct):
        return "{}"
    if isinstance(value, str):
        return f'"{value}"'
    return str(list(value)).replace("'", '"') if isinstance(value, tuple) else str(value)


def test_the_options_of_remote_stages_are_complete() -> None:
    told = {name: cells[0] for name, cells in tables(DOCS / "pipelines.md", "## Remote stages").items()}
    assert told == {field.name: shown(field) for field in msgspec.structs.fields(Options)}


def test_every_path_that_is_served_is_told() -> None:
    from torchship.serve.api.front import Front
    from torchship.serve.api.rest import all_routes

    told = set(re.findall(r"/[\w/{}.]+", " ".join(tables(DOCS / "serve.md", "## Endpoints"))))
    routes = all_routes(Front(None))  # type: ignore[arg-type]
    served = {route.pattern.replace("/versions/{version}", "") for route in routes}
    families = ("/v2/systemsharedmemory", "/v2/cudasharedmemory", "/v2/models/{model}/trace")
    left = {path for path in served - told if not path.startswith(families)}
    assert left == {"/", "/v2/repository/models/{model}/unload"}
    assert told - served == {"/unload", "/v2/systemsharedmemory/..."}


def test_every_metric_is_told_and_told_ones_exist() -> None:
    from torchship.serve import prometheus

    told = set(re.findall(r"`((?:nv|torchship)_\w+)`", (DOCS / "serve.md").read_text()))
    code = Path(prometheus.__file__ or "").read_text()
    there = set(re.findall(r'"((?:nv_(?:inference|cpu|gpu|energy)|torchship)_\w+)"', code))
    assert told <= there
    assert {name for name in there if not name.startswith("nv_inference_compute")} <= told


def test_the_tree_of_errors_is_told_with_its_codes() -> None:
    told = tables(DOCS / "errors.md", "## The tree")
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert told.keys() == {name for name, kind in kinds.items() if issubclass(kind, errors.TorchshipError)}
    for name, (_, http, grpc, code) in told.items():
        fault = kinds[name]("")
        status = status_of(fault)
        assert (int(http), grpc) == (status.http, GRPC[status.grpc]), name
        assert int(code) == (2 if isinstance(fault, errors.BadInput | errors.BadConfig) else 1), name


@pytest.mark.parametrize(("heading", "kind"), [("## Backends", "backends"), ("Transforms run", "transforms")])
def test_every_plugin_is_told(heading: str, kind: str) -> None:
    told = tables(DOCS / "optimize.md", heading)
    assert sorted(told) == plugins.names(kind)
    if kind == "backends":
        assert {name: cells[-1] for name, cells in told.items()} == {
            name: plugins.load(kind, name=name).KIND for name in told
        }


def test_the_guards_limits_are_told() -> None:
    from torchship.optimize import guard

    rows = tables(DOCS / "optimize.md", "### Limits by precision")
    told = {words: tuple(map(float, cells)) for words, cells in rows.items()}
    assert list(told.values()) == [(guard.DRIFT[kind], guard.LAW_LIMITS[kind]) for kind in ("fp32", "half", "int8")]


def ready_made() -> dict[str, Any]:
    """Every declared function or class in the plain modules of ready-made stages."""
    found = {}
    for place in pkgutil.iter_modules(stages.__path__):
        module = importlib.import_module(f"torchship.stages.{place.name}")
        for name, body in vars(module).items():
            if not place.ispkg and hasattr(body, "torchship_stage") and name == body.__name__:
                found[f"{module.__name__}:{name}"] = body
    return found


def test_ready_made_stages_are_told_with_their_options_and_parameters() -> None:
    told = tables(DOCS / "pipelines.md", "## Ready-made stages")
    bodies = ready_made()
    assert told.keys() == bodies.keys()
    for name, (_, options, values) in told.items():
        body = bodies[name]
        made = isinstance(body, type)
        known = {parameter.name for parameter in declared_parameters(vars(body)["__call__"] if made else body)}
        taken = set(inspect.signature(body).parameters) if made else set()
        if "those of `Nms" not in values:
            assert set(re.findall(r"\w+", values)) == known, name
            named = set(re.findall(r"`(\w+)`", f"`{options}`")) - {"imagenet"}
            assert named == taken, name
