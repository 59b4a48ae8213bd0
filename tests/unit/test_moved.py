"""Module names that an application took with it: imports, stages of a pipeline and mounts go on saying them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STAGE = """
from torchship.stage import stage

@stage("x:FP32[1] -> y:FP32[1]")
def double(x):
    return x * 2
"""


@pytest.fixture
def application(tmp_path: Path) -> Path:
    """An installed application, as far as imports and entry points see: a package, and what its wheel says."""
    package = tmp_path / "weather" / "forecast"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "stages.py").write_text(STAGE)
    said = tmp_path / "weather-1.0.dist-info"
    said.mkdir()
    (said / "METADATA").write_text("Metadata-Version: 2.4\nName: weather\nVersion: 1.0\n")
    (said / "entry_points.txt").write_text(
        "[torchship.moved]\n"
        "torchship.stages.weather = weather.forecast\n"
        "torchship.gone.since.then = weather.forecast.stages\n"
        "torchship.stages.weather.old = weather.forecast.stages\n"
    )
    return tmp_path


def run(code: str, *, path: Path | None) -> subprocess.CompletedProcess[str]:
    places = [*([str(path)] if path else []), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_an_old_name_is_the_very_module_of_the_new_one(application: Path) -> None:
    found = run(
        "from torchship.stages.weather.stages import double\n"
        "import weather.forecast.stages as new, torchship.stages.weather.stages as old\n"
        "assert double is new.double and old is new\n"
        "assert new.__spec__.name == new.__name__ == 'weather.forecast.stages'\n"
        "import weather.forecast, torchship.stages.weather as room; assert room is weather.forecast\n"
        "import torchship.gone.since.then as then; assert then is new\n"
        "import torchship.stages.weather.old as one; assert one is new\n"
        "from torchship.stages import boxes; assert boxes.__name__ == 'torchship.stages.boxes'\n",
        path=application,
    )
    assert found.returncode == 0, found.stderr
    notes = found.stderr.splitlines()
    assert "torchship.stages.weather.stages has moved: write weather.forecast.stages" in notes
    assert len(notes) == len(set(notes)) == 4  # each name is told once


def test_a_pipeline_that_says_the_old_name_runs(application: Path) -> None:
    found = run(
        "import numpy as np\n"
        "from torchship.artifact import Store\n"
        "from torchship.pipeline import Composed, convert, plan\n"
        "stages = [{'run': 'torchship.stages.weather.stages:double'}]\n"
        "store = Store('.')\n"
        "pipeline = Composed(plan(convert({'name': 'p', 'stages': stages}), store), store)\n"
        "print(pipeline({'x': np.array([21], np.float32)}, {})['y'])\n",
        path=application,
    )
    assert found.stdout.strip() == "[42.]", found.stderr


@pytest.mark.parametrize("name", ["torchship.stages.weather", "torchship.gone.since.then", "torchship.gone", "other"])
def test_without_the_application_the_name_is_missing(name: str) -> None:
    found = run(f"import torchship, {name}", path=None)
    assert found.returncode == 1
    assert "ModuleNotFoundError: No module named" in found.stderr


def test_what_nobody_claims_is_missing_still(application: Path) -> None:
    for name in ("torchship.stages.rain", "torchship.stages.weather.rain", "torchship.gone.since.ever"):
        found = run(f"import {name}", path=application)
        assert "ModuleNotFoundError: No module named" in found.stderr


def test_nothing_is_looked_up_before_a_name_is_missing(application: Path) -> None:
    code = "import importlib.metadata as m; m.entry_points = None; import torchship.stages.boxes, torchship.stages"
    assert run(code, path=application).returncode == 0
    assert "TypeError" in run(f"{code}.weather", path=application).stderr  # here it is asked for
