"""Signatures: who signed what, whom we trust, and that nothing else counts."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.unit.artifact.made import linear
from tests.unit.artifact.test_opening import edit, first_file
from torchship.artifact import Store, archive, open_artifact, signing
from torchship.artifact.package import amend
from torchship.cli import app
from torchship.errors import BadConfig, CorruptArtifact, NotFound, UnsafeArtifact


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of trusted keys."""
    folder = tmp_path / "keys"
    folder.mkdir()
    monkeypatch.setenv("TORCHSHIP_KEYS", str(folder))
    return folder


def test_signed_trusted_and_untrusted(tmp_path: Path, keys: Path) -> None:
    linear(tmp_path / "a")
    artifact = open_artifact(tmp_path / "a")
    public = signing.make_key(tmp_path / "my.key")
    assert stat.S_IMODE((tmp_path / "my.key").stat().st_mode) == 0o600
    with pytest.raises(UnsafeArtifact, match="is not signed"):
        signing.check(artifact.path, digest=artifact.digest)
    assert signing.sign(artifact.path, digest=artifact.digest, key=tmp_path / "my.key").key == public
    with pytest.raises(UnsafeArtifact, match="which is not trusted"):
        signing.check(artifact.path, digest=artifact.digest)
    assert signing.check(artifact.path, digest=artifact.digest, key=public) == "the given key"
    (keys / "alice.pub").write_text(public)
    assert signing.check(artifact.path, digest=artifact.digest) == "alice"
    assert open_artifact(tmp_path / "a").digest == artifact.digest  # the signature is no unknown file


def test_a_trusted_signature_opens_native_code(tmp_path: Path, keys: Path) -> None:
    linear(tmp_path / "a")
    edit(tmp_path / "a", lambda m: first_file(m, kind="native"))
    artifact = open_artifact(tmp_path / "a")
    public = signing.make_key(tmp_path / "my.key")
    signing.sign(artifact.path, digest=artifact.digest, key=tmp_path / "my.key")
    with pytest.raises(UnsafeArtifact, match="native code"):
        artifact.open()
    (keys / "alice.pub").write_text(public)
    artifact.open(threads=1).close()


def test_what_was_changed_after_signing_is_refused(tmp_path: Path, keys: Path) -> None:
    linear(tmp_path / "a")
    artifact = open_artifact(tmp_path / "a")
    (keys / "me.pub").write_text(signing.make_key(tmp_path / "my.key"))
    signing.sign(artifact.path, digest=artifact.digest, key=tmp_path / "my.key")
    edit(tmp_path / "a", lambda m: m.update(name="other"))
    changed = open_artifact(tmp_path / "a")
    with pytest.raises(CorruptArtifact, match="signature"):
        signing.check(changed.path, digest=changed.digest)
    (tmp_path / "a" / "manifest.sig").write_text("{}")
    with pytest.raises(CorruptArtifact, match="signature"):
        signing.signer(changed.path, digest=changed.digest)
    amended = amend(tmp_path / "a", labels=("x", "y"))
    assert signing.signer(amended.path, digest=amended.digest) == ""


def test_signatures_travel(tmp_path: Path, keys: Path) -> None:
    linear(tmp_path / "a")
    artifact = open_artifact(tmp_path / "a")
    (keys / "me.pub").write_text(signing.make_key(tmp_path / "my.key"))
    signing.sign(artifact.path, digest=artifact.digest, key=tmp_path / "my.key")
    with archive.extracted(archive.export(tmp_path / "a", to=tmp_path / "a.tar")) as found:
        store = Store(tmp_path / "store")
        store.publish(found.path, name="net")
    there = open_artifact(store.resolve("net"))
    assert signing.check(there.path, digest=there.digest) == "me"


def test_keys_that_are_none(tmp_path: Path, keys: Path) -> None:
    linear(tmp_path / "a")
    digest = open_artifact(tmp_path / "a").digest
    with pytest.raises(NotFound):
        signing.sign(tmp_path / "a", digest=digest, key=tmp_path / "nope")
    (tmp_path / "bad").write_text("hello")
    with pytest.raises(BadConfig, match="no private key"):
        signing.sign(tmp_path / "a", digest=digest, key=tmp_path / "bad")
    (keys / "bad.pub").write_text("hello")
    with pytest.raises(BadConfig, match="no public key"):
        signing.trusted_keys()
    signing.make_key(tmp_path / "my.key")
    with pytest.raises(BadConfig, match="exists"):
        signing.make_key(tmp_path / "my.key")
    (tmp_path / "my.key").chmod(0o640)
    with pytest.raises(BadConfig, match="open to others") as caught:
        signing.sign(tmp_path / "a", digest=digest, key=tmp_path / "my.key")
    assert "chmod 600" in caught.value.hint
    (tmp_path / "other.pub").write_text("someone's")
    with pytest.raises(BadConfig, match=r"other\.pub exists"):
        signing.make_key(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(BadConfig, match="cannot be written"):
        signing.make_key(tmp_path / "no" / "folder")
    (tmp_path / "a" / "manifest.sig").mkdir()
    with pytest.raises(CorruptArtifact, match="is no file"):
        signing.signer(tmp_path / "a", digest=digest)


def test_the_commands(tmp_path: Path, keys: Path) -> None:
    linear(tmp_path / "a")
    Store(tmp_path / "store").publish(tmp_path / "a", name="net")

    def store(*words: str) -> str:
        found = CliRunner().invoke(app, ["store", "--store", str(tmp_path / "store"), *words])
        if found.exception:
            raise found.exception
        return found.output

    key = str(tmp_path / "my.key")
    assert "my.key.pub" in store("keygen", key)
    assert "signed net" in store("sign", "net", "--key", key)
    assert "the given key" in store("verify", "net", "--key", f"{key}.pub")
    with pytest.raises(UnsafeArtifact):
        store("verify", "net")
    inspected = CliRunner().invoke(app, ["inspect", "net", "--store", str(tmp_path / "store")])
    assert "which is not trusted" in inspected.output
