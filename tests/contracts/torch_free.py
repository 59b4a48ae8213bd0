"""The child's side of the test that opens artifacts where torch cannot be imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from torchship import plugins
from torchship.tensors import Signature


def open_and_run(argument: list[str]) -> dict[str, Any]:
    """Open a backend's folder with torch and onnx blocked; give back what went in and what came out."""
    for name in ("torch", "onnx", "onnxscript", "nncf"):
        sys.modules[name] = None  # type: ignore[assignment]
    backend, path, text = argument
    module = plugins.load("backends", name=backend)
    stage = module.open(Path(path), signature=Signature.parse(text), options={}, threads=1)
    given: dict[str, Any] = {"ids": np.arange(12).reshape(3, 4), "mask": np.ones((3, 4), np.float32)}
    found = stage(given)
    return {
        "inputs": {name: array.tolist() for name, array in given.items()},
        "outputs": {name: np.asarray(array).tolist() for name, array in found.items()},
    }
