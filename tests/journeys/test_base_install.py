"""Wheels, built and installed into empty environments: the engine alone holds no torch and opens and serves artifacts.

An application's wheel beside it brings its commands, stages and routes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import torchship

ROOT = Path(__file__).parents[2]
ASK = """
import importlib.util, json, sys
import numpy as np
import torchship

assert importlib.util.find_spec("torch") is None, "the base install must not bring torch"
stage = torchship.open(sys.argv[1])
print(json.dumps(stage({"input": np.ones((3, 4), np.float32)})["output"].tolist()))
"""


UV = [sys.executable, "-m", "uv"]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel of each package in this repository."""
    folder = tmp_path_factory.mktemp("wheels")
    for source in (ROOT, *(path.parent for path in ROOT.glob("apps/*/pyproject.toml"))):
        subprocess.run([*UV, "build", "--quiet", "--wheel", str(source), "-o", str(folder)], check=True, timeout=280)
    return folder


def environment_with(requirement: str, *, wheels: Path, folder: Path) -> Path:
    """The interpreter of a new environment in `folder` that holds only what `pip install REQUIREMENT` brings."""
    python = folder / "bin" / "python"
    subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, timeout=120)
    install = [*UV, "pip", "install", "--quiet", "--python", str(python), "--find-links", str(wheels)]
    subprocess.run([*install, requirement], check=True, timeout=280)
    return python


@pytest.fixture(scope="module")
def base_python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the engine alone."""
    return environment_with("torchship", wheels=wheels, folder=tmp_path_factory.mktemp("base") / "venv")


@pytest.fixture(scope="module")
def faces_python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the engine and the faces application."""
    return environment_with("torchship[faces]", wheels=wheels, folder=tmp_path_factory.mktemp("faces") / "venv")


def installed(python: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of an environment, without a trace of this one."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"NO_COLOR": "1"}
    program = str(python.parent / command[0])
    return subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, timeout=60, cwd=cwd, env=environment, check=False
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    folder = tmp_path_factory.mktemp("store")
    report = torchship.optimize(
        module,
        torch.randn(2, 4),
        name="tiny",
        backends=["onnxruntime"],
        recipes=[torchship.Recipe("onnxruntime", {"precision": "fp32"})],
        store=folder / "store",
        cache=folder / "cache",
        goal="size",
    )
    assert report.artifact is not None
    return report.artifact.path, module


def test_it_opens_and_serves_without_torch(base_python: Path, artifact: tuple[Path, torch.nn.Module]) -> None:
    path, module = artifact
    expected = module(torch.ones(3, 4)).detach().numpy()
    found = subprocess.run(
        [base_python, "-c", ASK, str(path)], capture_output=True, text=True, check=True, timeout=60, cwd=path
    )
    assert np.allclose(json.loads(found.stdout), expected, atol=1e-5)
    body = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}
    with server([str(base_python.parent / "torchship"), "serve", str(path), "--http-port", "0"]) as url:
        answer = answer_of(f"{url}/v2/models/tiny/infer", json.dumps(body).encode())
    assert np.allclose(np.reshape(answer["outputs"][0]["data"], (1, 2)), expected[:1], atol=1e-5)


def test_importing_the_wheel_is_light(base_python: Path, tmp_path: Path) -> None:
    code = "import sys, torchship; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = installed(base_python, "python", "-c", code, cwd=tmp_path).stdout.split()
    assert "torchship" in loaded
    assert not {"torch", "numpy", "onnxruntime", "msgspec", "PIL", "psutil", "rich", "uvloop"}.intersection(loaded)


def test_without_its_wheel_an_application_says_how_to_get_it(base_python: Path, tmp_path: Path) -> None:
    found = installed(base_python, "torchship", "faces", "people", cwd=tmp_path)
    assert found.returncode == 1
    assert "'faces' belongs to the application torchship-faces, which is not installed" in found.stderr
    assert "pip install 'torchship[faces]'" in found.stderr
    assert "faces" not in installed(base_python, "torchship", "--help", cwd=tmp_path).stdout
    unknown = installed(base_python, "torchship", "violins", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "No such command" in unknown.stderr


PEOPLE = """
import importlib.util, sys
import numpy as np
from torchship.pipeline import Composed, convert, plan
from torchship.artifact import Store
from torchship.stages.gallery import Enrolment, Gallery  # the name before it moved

import torchship.serve.protocols.faces, torchship_faces.routes
assert torchship.serve.protocols.faces is torchship_faces.routes  # as an old [[mount]] names it
assert importlib.util.find_spec("torch") is None, "the application must not bring torch"
vectors = np.eye(8, dtype=np.float32)
Gallery("staff", model="m", width=8).enrol([Enrolment(person="ann", vectors=vectors[:1])])
for room in ("torchship.stages.gallery", "torchship_faces.gallery"):
    stage = {"run": f"{room}:Match", "options": {"gallery": "staff", "model": "m", "width": 8}}
    pipeline = Composed(plan(convert({"name": "who", "stages": [stage]}), Store(".")), Store("."))
    assert pipeline({"embedding": vectors[:2]}, {})["person"].tolist() == [b"ann", b""], room
    pipeline.close()
"""


def test_with_its_wheel_an_application_brings_commands_and_stages(faces_python: Path, tmp_path: Path) -> None:
    shown = installed(faces_python, "torchship", "--help", cwd=tmp_path)
    assert "Recognize faces: enrol people" in shown.stdout
    found = installed(faces_python, "python", "-c", PEOPLE, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "torchship.stages.gallery has moved: write torchship_faces.gallery" in found.stderr
    people = installed(faces_python, "torchship", "faces", "people", "-g", "staff", cwd=tmp_path)
    assert people.stdout.split()[:3] == ["ann", "1", "templates"], people.stderr
    (tmp_path / "one.jpg").touch()
    missing = installed(
        faces_python, "torchship", "faces", "verify", "one.jpg", "one.jpg", "--store", ".", cwd=tmp_path
    )
    assert "make the face models first: torchship faces prepare" in missing.stderr
    prepare = installed(faces_python, "torchship", "faces", "prepare", "--store", ".", cwd=tmp_path)
    assert "pip install 'torchship-faces[prepare]'" in prepare.stderr


def test_the_application_of_the_documentation_works(faces_python: Path, tmp_path: Path) -> None:
    for language, text in re.findall(r"^```(ini|py)\n(.*?)^```$", (ROOT / "docs/apps.md").read_text(), re.M | re.S):
        place = tmp_path / text.partition("\n")[0].removeprefix("# ")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        assert language == ("py" if place.suffix == ".py" else "ini")
    install = [*UV, "pip", "install", "--quiet", "--python", str(faces_python), str(tmp_path)]
    subprocess.run(install, check=True, timeout=280)
    assert "Say how bright a picture is" in installed(faces_python, "torchship", "--help", cwd=tmp_path).stdout
    picture = tmp_path / "grey.png"
    Image.new("RGB", (8, 8), (51, 51, 51)).save(picture)
    found = installed(faces_python, "torchship", "brightness", "grey.png", cwd=tmp_path)
    assert found.stdout.strip() == "0.20", found.stderr
    missing = installed(faces_python, "torchship", "brightness", "none.png", cwd=tmp_path)
    assert missing.returncode == 2
    assert "none.png: No such file" in missing.stderr
    served = [str(faces_python.parent / "torchship"), "serve", str(tmp_path / "brightness.toml"), "--http-port", "0"]
    with server(served) as url:
        assert answer_of(f"{url}/v1/brightness", picture.read_bytes()) == {"brightness": 0.2}
        with pytest.raises(urllib.error.HTTPError, match="400"):
            answer_of(f"{url}/v1/brightness", b"")


@contextmanager
def server(command: list[str]) -> Iterator[str]:
    """A server with this command line; its URL."""
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ""}, cwd="/")
    try:
        assert child.stderr is not None
        yield next(found[0] for line in child.stderr if (found := re.search(r"http://127[^\s]*?:\d+(?=/)", line)))
    finally:
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=60) == 0
        if child.stderr is not None:
            child.stderr.close()


def answer_of(url: str, body: bytes) -> Any:
    """What a POST of this body is answered."""
    with urllib.request.urlopen(url, body, timeout=60) as response:
        return json.load(response)
