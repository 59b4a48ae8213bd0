"""The base install holds no torch, yet it opens an artifact and serves it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

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


@pytest.fixture(scope="module")
def base_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds only what `pip install torchship` brings."""
    folder = tmp_path_factory.mktemp("base") / "venv"
    python = folder / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True, timeout=120)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(python), str(ROOT)], check=True, timeout=280)
    return python


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
    answer = ask_a_server([str(base_python.parent / "torchship"), "serve", str(path), "--http-port", "0"])
    assert np.allclose(np.reshape(answer["outputs"][0]["data"], (1, 2)), expected[:1], atol=1e-5)


def ask_a_server(command: list[str]) -> dict[str, list[dict[str, list[float]]]]:
    """Start a server, send it one row, stop it, and give back its answer."""
    environment = os.environ | {"PYTHONPATH": ""}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd="/")
    try:
        assert server.stderr is not None
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://127[^\s]*?:\d+(?=/)", line)))
        body = {"inputs": [{"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}
        with urllib.request.urlopen(f"{url}/v2/models/tiny/infer", json.dumps(body).encode(), timeout=30) as response:
            answer: dict[str, list[dict[str, list[float]]]] = json.load(response)
        return answer
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
        if server.stderr is not None:
            server.stderr.close()
