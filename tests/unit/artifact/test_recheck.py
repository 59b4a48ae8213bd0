"""Another machine: native code is refused or replaced, and the stored examples are asked once."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.unit.artifact.made import linear
from tests.unit.artifact.test_opening import edit
from torchship import hardware
from torchship.artifact import open_artifact, recheck, tensorfile
from torchship.artifact.manifest import Manifest
from torchship.artifact.package import add_fallback, amend
from torchship.errors import BadConfig, UnsafeArtifact, WrongMachine
from torchship.stage import Stage
from torchship.tensors import Array, Signature, Tensors

X = np.eye(3, dtype=np.float32)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact in `a`, on a machine of another kind than it was packed on; a cache of its own."""
    linear(tmp_path / "a")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = msgspec.structs.replace(hardware.here(), processor="another one")
    monkeypatch.setattr(hardware, "here", lambda: other)
    return tmp_path / "a"


def test_examples_are_asked_once(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    really = recheck.check

    def check(stage: Stage, manifest: Manifest, *, inputs: Tensors, outputs: Tensors) -> None:
        asked.append(manifest.name)
        really(stage, manifest, inputs=inputs, outputs=outputs)

    monkeypatch.setattr(recheck, "check", check)
    for _ in range(2):
        open_artifact(elsewhere).open(threads=1).close()
    assert len(asked) == 1


def test_on_the_same_machine_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear(tmp_path / "a")
    monkeypatch.setattr(recheck, "check", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_artifact(tmp_path / "a").open(threads=1).close()


def answer(folder: Path, change: float) -> None:
    """Let the artifact remember other outputs than it will give."""
    artifact = open_artifact(folder)
    wrong = {"y": artifact.outputs()["y"] * np.float32(1 + change)}
    (folder / "examples" / "outputs.safetensors").unlink()
    edit(folder, lambda m: m.update(files=[f for f in m["files"] if "outputs" not in f["path"]]))
    (folder / "examples" / "outputs.safetensors").write_bytes(tensorfile.encode(wrong))
    amend(folder)


def test_other_answers_are_refused(elsewhere: Path) -> None:
    answer(elsewhere, 0.5)
    for _ in range(2):  # a refusal is not remembered as a pass
        with pytest.raises(WrongMachine, match=r"answers its stored examples differently here: y is off by 0\.333"):
            open_artifact(elsewhere).open(threads=1)


def test_small_differences_pass(elsewhere: Path) -> None:
    answer(elsewhere, 0.03)
    open_artifact(elsewhere).open(threads=1).close()


def native(folder: Path) -> None:
    """Mark what lies under `backend/` as native code."""
    edit(folder, lambda m: [f.update(kind="native") for f in m["files"] if f["path"].startswith("backend/")])


def test_native_code_of_another_machine_is_refused(elsewhere: Path) -> None:
    native(elsewhere)
    with pytest.raises(UnsafeArtifact):
        open_artifact(elsewhere).open()
    with pytest.raises(WrongMachine, match="holds native code for"):
        open_artifact(elsewhere).open(trust=True)


def test_the_portable_fallback_is_opened_instead(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(elsewhere, elsewhere.parent / "other")
    add_fallback(elsewhere, other=elsewhere.parent / "other")
    native(elsewhere)
    for trust in (False, True):
        stage = open_artifact(elsewhere).open(threads=1, trust=trust)
        assert stage({"x": X})["y"].shape == (3, 2)
        stage.close()
    assert "opening its portable fallback" in caplog.text


def test_what_is_no_fallback(elsewhere: Path) -> None:
    other = elsewhere.parent / "other"
    shutil.copytree(elsewhere, other)
    native(other)
    with pytest.raises(BadConfig, match="holds native code"):
        add_fallback(elsewhere, other=other)
    edit(other, lambda m: m["signature"]["inputs"][0].update(name="z"))
    with pytest.raises(BadConfig, match="another signature"):
        add_fallback(elsewhere, other=other)


def test_faults() -> None:
    signature = Signature.parse("x:FP32[-1] -> y:FP32[-1], n:INT64[-1], b:BYTES[-1]")
    good: dict[str, Array] = {
        "y": np.array([1, np.nan, np.inf], np.float32),
        "n": np.arange(3),
        "b": np.array([b"a", b"b", b"c"], object),
    }
    assert recheck.faults(signature, good, good, allowed=0.05) == {}
    bad: dict[str, Array] = {
        "y": np.array([1, 2, np.nan], np.float32),
        "n": np.arange(3) + 1,
        "b": np.array([b"a", b"b"], object),
    }
    assert set(recheck.faults(signature, good, bad, allowed=0.05)) == {"y", "n", "b"}
    assert set(recheck.faults(signature, good, {}, allowed=0.05)) == {"y", "n", "b"}
