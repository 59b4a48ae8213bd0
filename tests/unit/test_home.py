"""Folders of users with a home, without one, and without a name."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import msgspec
import pytest

from tests.unit.artifact.made import linear
from torchship import hardware, home
from torchship.artifact import Store, open_artifact, signing
from torchship.errors import BadConfig, NotFound, UnsafeArtifact

HOMES = {"none": None, "a file": "/dev/null", "below a file": "/dev/null/x"}


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry, in an environment that says nothing."""

    def missing(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", missing)
    names = ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "XDG_CACHE_HOME")
    for name in (*names, "TORCHSHIP_STORE", "TORCHSHIP_CACHE", "TORCHSHIP_KEYS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("unknown")
class TestWithoutHome:
    @pytest.mark.parametrize("place", HOMES.values(), ids=HOMES)
    def test_the_variable_that_helps_is_named(self, place: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        if place:
            monkeypatch.setenv("HOME", place)
        with pytest.raises(BadConfig) as fault:
            home.folder("TORCHSHIP_CACHE", ".cache", "torchship")
        assert "TORCHSHIP_CACHE" in fault.value.hint
        monkeypatch.setenv("TORCHSHIP_CACHE", "/there")
        assert home.folder("TORCHSHIP_CACHE", ".cache", "torchship") == Path("/there")

    def test_a_home_that_may_not_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".config").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert home.folder("X", ".config") == tmp_path / ".config"  # what is there can be read
        with pytest.raises(BadConfig, match="cannot be made"):
            home.folder("X", ".config", "new")

    def test_a_home_that_will_be_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "later"))
        assert home.folder("X", ".cache") == tmp_path / "later" / ".cache"

    def test_a_path_with_a_tilde(self) -> None:
        with pytest.raises(BadConfig, match="~/net"):
            home.expand("~/net")
        assert home.expand("net") == Path("net")

    def test_folders_need_no_store_and_names_do(self, tmp_path: Path) -> None:
        linear(tmp_path / "a")
        store = Store()
        assert store.resolve(str(tmp_path / "a")) == tmp_path / "a"
        with pytest.raises(BadConfig) as fault:
            store.resolve("net")
        assert "TORCHSHIP_STORE" in fault.value.hint
        with pytest.raises(NotFound):
            Store(tmp_path / "store").resolve("net")

    def test_nobody_is_trusted_and_a_check_is_not_remembered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = signing.make_key(tmp_path / "my.key")
        artifact = linear(tmp_path / "a")
        signing.sign(artifact.path, digest=artifact.digest, key=tmp_path / "my.key")
        assert signing.trusted_keys() == {}
        assert not signing.is_trusted(artifact.path, digest=artifact.digest)
        with pytest.raises(UnsafeArtifact) as fault:
            signing.check(artifact.path, digest=artifact.digest)
        assert "TORCHSHIP_KEYS" in fault.value.hint
        assert signing.check(artifact.path, digest=artifact.digest, key=key)
        other = msgspec.structs.replace(hardware.here(), processor="another one")
        monkeypatch.setattr(hardware, "here", lambda: other)
        open_artifact(artifact.path).open(threads=1).close()  # the examples are asked, and that is nowhere noted
        assert open_artifact(artifact.path).digest == artifact.digest

    def test_the_process_gets_a_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("USER", "")
        home.name_user()
        assert os.environ["USER"] == f"uid{os.getuid()}"
        home.name_user()
        assert os.environ["USER"] == f"uid{os.getuid()}"


def test_a_name_that_is_known_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "somebody")
    home.name_user()
    assert os.environ["USER"] == "somebody"
