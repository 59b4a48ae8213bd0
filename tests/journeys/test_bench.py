"""`torchship bench ARTIFACT`: a server is started for it, measured, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
from click.testing import CliRunner

from tests.unit.artifact.made import colour
from torchship.artifact import Store
from torchship.cli.bench import command
from torchship.errors import Unavailable


def test_an_artifact_is_served_and_measured(tmp_path: Path) -> None:
    colour(tmp_path / "a", labels=())
    Store(tmp_path / "store").publish(tmp_path / "a", name="colour")
    words = ["colour", "--store", str(tmp_path / "store"), "--concurrency", "2", "--seconds", "0.3", "--json"]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    (run,) = json.loads(done.output)["runs"]
    assert run["answers"] > 0
    assert run["faults"] == 0
    assert [child for child in psutil.Process().children() if "serve" in child.cmdline()] == []


def test_what_cannot_be_served_says_why(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["none", "--store", str(tmp_path), "--seconds", "0.1"])
    assert isinstance(done.exception, Unavailable)
    assert str(done.exception).startswith("the server did not start: ")
    assert "none" in str(done.exception)
