"""Packing and opening: nothing that was changed, added, linked or invented after packing gets through."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.unit.artifact.made import PROVENANCE, WEIGHT, linear
from torchship import plugins
from torchship.artifact import open_artifact, open_stage
from torchship.artifact.manifest import Verdict
from torchship.artifact.package import amend, pack
from torchship.errors import (
    BadConfig,
    BadInput,
    CorruptArtifact,
    NotFound,
    TorchshipError,
    UnsafeArtifact,
    Unsupported,
)
from torchship.recipe import Recipe
from torchship.tensors import Signature


def test_what_was_packed_opens_and_runs(tmp_path: Path) -> None:
    packed = linear(tmp_path / "a", labels=("a", "b"))
    opened = open_artifact(tmp_path / "a")
    assert opened == packed
    assert opened.size > 0
    stage = opened.open(threads=1)
    np.testing.assert_array_equal(stage(opened.inputs())["y"], opened.outputs()["y"])
    stage.close()
    stage = open_stage(str(tmp_path / "a"), threads=1)
    np.testing.assert_array_equal(stage({"x": np.eye(3, dtype=np.float32)})["y"], WEIGHT)
    stage.close()


def test_amend_takes_in_files_but_no_changes(tmp_path: Path) -> None:
    linear(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    verdict = Verdict(passed=True, error=0.0, cosine=1.0)
    amended = amend(tmp_path, verdict=verdict)
    assert open_artifact(tmp_path) == amended
    assert amended.manifest.verdict == verdict
    assert "report/report.json" in [entry.path for entry in amended.manifest.files]
    with pytest.raises(BadConfig, match="no field"):
        amend(tmp_path, nope=1)
    (tmp_path / "backend" / "model.onnx").write_bytes(b"other")
    with pytest.raises(CorruptArtifact):
        amend(tmp_path, verdict=None)


def test_examples_must_fit(tmp_path: Path) -> None:
    (tmp_path / "backend").mkdir()
    with pytest.raises(BadInput, match="example inputs: tensor 'x' has datatype FP64"):
        pack(
            tmp_path,
            name="n",
            signature=Signature.parse("x:FP32[-1,3] -> y:FP32[-1,2]"),
            recipe=Recipe("onnxruntime"),
            provenance=PROVENANCE,
            inputs={"x": np.zeros((1, 3))},
        )
    assert not (tmp_path / "manifest.json").exists()


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as an attacker would."""
    path = root / "manifest.json"
    manifest = msgspec.json.decode(path.read_bytes())
    change(manifest)
    path.write_bytes(msgspec.json.encode(manifest))


def flip(root: Path) -> None:
    """Change one byte, not the size."""
    path = root / "backend" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def swap_for_link(root: Path) -> None:
    """The same content, but through a link."""
    path = root / "backend" / "model.onnx"
    moved = root.parent / "moved.onnx"
    path.rename(moved)
    path.symlink_to(moved)


def first_file(manifest: dict[str, Any], **changes: Any) -> None:
    """Change the first file's entry."""
    manifest["files"][0].update(changes)


@pytest.mark.parametrize(
    ("harm", "error", "words"),
    [
        (flip, CorruptArtifact, "its hash is wrong"),
        (lambda root: (root / "backend" / "model.onnx").write_bytes(b""), CorruptArtifact, "0 bytes"),
        (lambda root: (root / "backend" / "model.onnx").unlink(), CorruptArtifact, "lacks backend/model.onnx"),
        (lambda root: (root / "backend" / "more.so").write_bytes(b"x"), CorruptArtifact, "does not list"),
        (lambda root: (root / "manifest.json").unlink(), CorruptArtifact, "has no manifest.json"),
        (lambda root: (root / "manifest.json").write_bytes(b"\xff"), CorruptArtifact, "not a manifest"),
        (lambda root: (root / "manifest.json").write_bytes(b" " * (17 << 20)), UnsafeArtifact, "larger than"),
        (swap_for_link, UnsafeArtifact, "is a link"),
        (lambda root: (root / "sub").symlink_to("/etc"), UnsafeArtifact, "is a link"),
        (lambda root: os.mkfifo(root / "pipe"), UnsafeArtifact, "not a plain file"),
        (lambda root: edit(root, lambda m: m.update(format=99)), Unsupported, "format version 99"),
        (lambda root: edit(root, lambda m: m.update(nope=1)), CorruptArtifact, "nope"),
        (lambda root: edit(root, lambda m: first_file(m, path="../x")), UnsafeArtifact, "leaves"),
        (lambda root: edit(root, lambda m: first_file(m, path="/etc/passwd")), UnsafeArtifact, "leaves"),
        (lambda root: edit(root, lambda m: first_file(m, path="a/./b")), UnsafeArtifact, "leaves"),
        (lambda root: edit(root, lambda m: first_file(m, path="a\\..\\b")), UnsafeArtifact, "leaves"),
        (lambda root: edit(root, lambda m: first_file(m, path="manifest.json")), CorruptArtifact, "itself"),
        (lambda root: edit(root, lambda m: m["files"].append(m["files"][0])), CorruptArtifact, "twice"),
        (lambda root: edit(root, lambda m: first_file(m, size=2**62)), UnsafeArtifact, "impossible size"),
        (lambda root: edit(root, lambda m: first_file(m, size=-1)), UnsafeArtifact, "impossible size"),
        (lambda root: edit(root, lambda m: first_file(m, kind="other")), CorruptArtifact, "kind"),
    ],
)
def test_harm_is_refused(
    tmp_path: Path, harm: Callable[[Path], object], error: type[TorchshipError], words: str
) -> None:
    root = tmp_path / "a"
    linear(root)
    harm(root)
    with pytest.raises(error) as caught:
        open_artifact(root)
    assert words in str(caught.value)
    assert caught.value.hint


def test_native_code_needs_trust(tmp_path: Path) -> None:
    linear(tmp_path)
    edit(tmp_path, lambda m: first_file(m, kind="native"))
    artifact = open_artifact(tmp_path)
    with pytest.raises(UnsafeArtifact, match="holds native code"):
        artifact.open()
    artifact.open(trust=True, threads=1).close()


def test_a_manifest_cannot_call_native_code_data(tmp_path: Path) -> None:
    linear(tmp_path)
    edit(tmp_path, lambda m: m["recipe"].update(backend="aoti"))
    with pytest.raises(UnsafeArtifact, match="holds native code"):
        open_artifact(tmp_path).open()


def test_files_of_a_native_backend_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins.load("backends", name="onnxruntime"), "KIND", "native")
    artifact = linear(tmp_path)
    kinds = {entry.path: entry.kind for entry in artifact.manifest.files}
    assert kinds["backend/model.onnx"] == "native"
    assert kinds["examples/inputs.safetensors"] == "data"


def test_no_folder_and_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no artifact at"):
        open_artifact(tmp_path / "nope")
    linear(tmp_path)
    edit(tmp_path, lambda m: m["recipe"].update(backend="nope"))
    with pytest.raises(BadConfig, match="unknown backend 'nope'"):
        open_artifact(tmp_path).open()
