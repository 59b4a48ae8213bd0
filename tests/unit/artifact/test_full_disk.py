"""A full disk while packing or publishing: a clear error, and nothing half-written that anyone would open."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.unit.artifact.made import linear
from torchship.artifact import Store, folder
from torchship.errors import Unavailable


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies and writes fail half way, as on a disk that fills up."""

    def copy(given: Any, taken: Any, *_: Any) -> None:
        taken.write(given.read(10))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", copy)
    monkeypatch.setattr(os, "fsync", sync)


def test_publishing_leaves_the_old_version(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    linear(tmp_path / "linear")
    store = Store(tmp_path / "store")
    store.publish(tmp_path / "linear", name="linear")
    request.getfixturevalue("full")
    with pytest.raises(Unavailable, match="store cannot be written: No space left on device"):
        store.publish(tmp_path / "linear", name="linear")
    assert store.versions("linear") == (1,)
    assert not list((tmp_path / "store" / ".incoming").iterdir())
    assert store.resolve("linear").name == "1"


def test_packing_leaves_no_artifact(tmp_path: Path, full: None) -> None:
    with pytest.raises(Unavailable, match="No space left on device"):
        linear(tmp_path / "linear")
    assert not (tmp_path / "linear" / folder.MANIFEST).exists()
    assert not list((tmp_path / "linear").rglob(".*"))  # no temporary files either
