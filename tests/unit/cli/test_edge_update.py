"""`torchship edge update`: what becomes current, what does not, and a power cut at any step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.unit.artifact.made import linear
from tests.unit.cli.test_artifact_commands import torchship
from torchship import process
from torchship.artifact import Store, open_artifact, signing
from torchship.artifact.package import amend, pack
from torchship.errors import BadConfig, Unavailable, UnsafeArtifact, WrongMachine


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with `linear`, a new signed version of it in `new`, and the key `me` that is trusted."""
    monkeypatch.setenv("TORCHSHIP_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("TORCHSHIP_KEYS", str(tmp_path / "keys"))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "me.pub").write_text(signing.make_key(tmp_path / "my.key"))
    linear(tmp_path / "old")
    linear(tmp_path / "new", labels=("a", "b"))
    signed(tmp_path / "new", tmp_path / "my.key")
    Store().publish(tmp_path / "old", name="linear")
    return Store()


def signed(folder: Path, key: Path) -> None:
    signing.sign(folder, digest=open_artifact(folder).digest, key=key)


def test_a_signed_version_becomes_current_once(shelf: Store, tmp_path: Path) -> None:
    assert "published linear@2, signed by me" in torchship("edge", "update", tmp_path / "new").output
    assert open_artifact(shelf.resolve("linear")).manifest.labels == ("a", "b")
    assert "is this already" in torchship("edge", "update", tmp_path / "new").output
    torchship("store", "export", f"{tmp_path}/new", tmp_path / "new.tar")
    assert "is this already" in torchship("edge", "update", tmp_path / "new.tar").output
    assert shelf.versions("linear") == (1, 2)


def test_what_is_not_signed_or_answers_otherwise_is_not_published(shelf: Store, tmp_path: Path) -> None:
    with pytest.raises(UnsafeArtifact, match="is not signed"):
        torchship("edge", "update", tmp_path / "old")
    with pytest.raises(BadConfig, match="only https"):
        torchship("edge", "update", "http://127.0.0.1:9/linear.tar")
    with pytest.raises(Unavailable, match="cannot be pulled"):
        torchship("edge", "update", "https://127.0.0.1:9/linear.tar")
    found = open_artifact(tmp_path / "new")
    kept = {field: getattr(found.manifest, field) for field in ("name", "signature", "recipe", "provenance")}
    pack(found.path, **kept, inputs=found.inputs(), outputs={"y": found.outputs()["y"] * 2})
    signed(found.path, tmp_path / "my.key")
    with pytest.raises(WrongMachine, match="does not run here"):
        torchship("edge", "update", tmp_path / "new")
    assert (shelf.versions("linear"), shelf.current("linear")) == ((1,), 1)


def test_a_server_that_does_not_take_it_brings_the_old_one_back(shelf: Store, tmp_path: Path) -> None:
    amend(tmp_path / "new", labels=("c", "d"))
    signed(tmp_path / "new", tmp_path / "my.key")
    with pytest.raises(Unavailable, match="linear@1 is current again"):
        torchship("edge", "update", tmp_path / "new", "--server", "http://127.0.0.1:9", "--wait", "0.1")
    assert shelf.current("linear") == 1


def test_a_power_cut_at_any_step_leaves_the_old_or_the_new(
    shelf: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "run", lambda *_, **__: process.Outcome())  # it writes nothing
    old, new = open_artifact(tmp_path / "old").digest, open_artifact(tmp_path / "new").digest
    seen = []
    for step in range(1, 200):
        child = os.fork()
        if child == 0:
            dies_at(step)
            torchship("edge", "update", tmp_path / "new")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        seen.append(open_artifact(shelf.resolve("linear")).digest)
        if not os.WIFSIGNALED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert seen[-1] in (old, new)
        if seen[-1] == new:
            shelf.set_current("linear", version=1)
    assert seen[-1] == new
    assert seen.count(old) > 5


def dies_at(step: int) -> None:
    """From now on this process is killed before its call number `step` that changes the disk."""
    left = step

    def counted(name: str) -> None:
        call = getattr(os, name)

        def tried(*words: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*words, **options)

        setattr(os, name, tried)

    for name in ("fsync", "rename", "replace", "mkdir", "unlink"):
        counted(name)
