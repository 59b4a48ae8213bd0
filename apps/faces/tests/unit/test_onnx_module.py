"""An ONNX file as a module gives the numbers of ONNX Runtime."""

from __future__ import annotations

import pytest
from apps.faces.tests import face_kit

from torchship.errors import NotFound
from torchship_faces import weights
from torchship_faces.embedders import embedder


def test_unknown_names_are_told() -> None:
    with pytest.raises(NotFound) as caught:
        weights.fetch("nothing")
    assert "retinaface" in caught.value.hint
    with pytest.raises(NotFound):
        embedder("nothing")


def test_the_models_agree_with_onnxruntime() -> None:
    import subprocess
    import sys

    code = """
import numpy as np, onnxruntime, torch
from torchship_faces.prepare import DetectorNet, EmbedderNet
from torchship_faces import weights
from torchship_faces.embedders import embedder
random = np.random.default_rng(0)
x = random.integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
with torch.inference_mode():
    ours = DetectorNet(weights.fetch("retinaface")).eval()(torch.from_numpy(x))
given = x[..., ::-1].astype(np.float32) - np.array([104, 117, 127], np.float32)
theirs = onnxruntime.InferenceSession(weights.fetch("retinaface")).run(
    None, {"input": np.ascontiguousarray(given.transpose(0, 3, 1, 2))})
for name, value in zip(("loc", "face", "landmarks"), theirs, strict=True):
    value = value[..., 1] if name == "face" else value
    assert np.allclose(ours[name].numpy(), value, atol=1e-4), name
x = random.integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
with torch.inference_mode():
    ours = EmbedderNet(embedder()).eval()(torch.from_numpy(x))["embedding"].numpy()
session = onnxruntime.InferenceSession(weights.fetch("fr_feature"))
for row in range(3):
    given = ((x[row : row + 1, ..., ::-1].astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2)
    value = session.run(None, {"input": np.ascontiguousarray(given)})[0][0]
    assert np.allclose(ours[row], value / np.linalg.norm(value), atol=1e-5)
"""
    assert face_kit.ROOT.is_dir()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
