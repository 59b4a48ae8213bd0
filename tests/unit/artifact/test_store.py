"""The store: versions, `current`, names, concurrent publishers, and no path outside it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.artifact.made import linear
from torchship import process
from torchship.artifact import Store
from torchship.errors import BadConfig, CorruptArtifact, NotFound


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store beside an artifact in `a`."""
    linear(tmp_path / "a")
    return Store(tmp_path / "store")


def test_versions_and_current(store: Store, tmp_path: Path) -> None:
    assert store.list() == ()
    assert [store.publish(tmp_path / "a", name="net") for _ in range(3)] == [1, 2, 3]
    assert store.resolve("net") == store.resolve("net@current") == store.resolve("net@3") == store.root / "net" / "3"
    store.set_current("net", version=1)
    assert store.resolve("net") == store.root / "net" / "1"
    assert store.resolve("net@latest") == store.root / "net" / "3"
    assert store.publish(tmp_path / "a", name="net", current=False) == 4
    assert store.current("net") == 1
    store.remove("net", version=4)
    store.remove("net", version=1)
    assert store.current("net") == 3
    assert store.publish(tmp_path / "a", name="net") == 5  # a number is never used twice
    store.remove("net")
    assert store.list() == ()
    assert store.publish(tmp_path / "a", name="net") == 6
    assert not list((store.root / ".incoming").iterdir())


def test_paths_and_unknown_targets(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.resolve(str(tmp_path / "a")) == tmp_path / "a"
    store.publish(tmp_path / "a", name="network")
    with pytest.raises(NotFound) as caught:
        store.resolve("netwrk")
    assert "network" in caught.value.hint
    with pytest.raises(NotFound, match="no version 7"):
        store.resolve("network@7")
    with pytest.raises(BadConfig, match="not a version"):
        store.resolve("network@newest")
    with pytest.raises(NotFound):
        store.remove("nothing")
    monkeypatch.chdir(tmp_path)
    assert store.resolve("a") == Path("a")  # a folder here, where the store has no such name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "1net", "a b", "a\n", "é", "-x", "a" * 101, ".incoming"])
def test_names_never_lead_out_of_the_store(store: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(BadConfig, match="is not a name"):
        store.publish(tmp_path / "a", name=name)
    with pytest.raises(BadConfig, match="is not a name"):
        store.remove(name)
    assert not store.root.exists() or not any(store.root.iterdir())


def test_a_damaged_artifact_is_never_published(store: Store, tmp_path: Path) -> None:
    (tmp_path / "a" / "backend" / "model.onnx").write_bytes(b"")
    with pytest.raises(CorruptArtifact):
        store.publish(tmp_path / "a", name="net")
    assert store.list() == ()
    assert not list((store.root / ".incoming").iterdir())


def publish_some(argument: list[str]) -> list[int]:
    """Run in a child: publish three times."""
    root, folder = argument
    return [Store(root).publish(folder, name="net") for _ in range(3)]


def test_concurrent_publishers_get_versions_of_their_own(store: Store, tmp_path: Path) -> None:
    argument = [str(store.root), str(tmp_path / "a")]

    def child(_: int) -> process.Outcome:
        return process.run(f"{__name__}:publish_some", argument=argument, timeout=60)

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(child, range(3)))
    assert [outcome.fault for outcome in outcomes] == [""] * 3
    assert sorted(version for outcome in outcomes for version in outcome.value) == list(range(1, 10))
    assert store.list()[0].versions == tuple(range(1, 10))


def test_leftovers_of_killed_publishers_go(store: Store, tmp_path: Path) -> None:
    old, new = (store.root / ".incoming" / name for name in ("1-old", "2-new"))
    for place in (old, new):
        (place / "backend").mkdir(parents=True)
    os.utime(old, (0, 0))
    store.publish(tmp_path / "a", name="net")
    assert not old.exists()
    assert new.exists()


def test_a_lost_pointer_means_the_newest(store: Store, tmp_path: Path) -> None:
    for _ in range(2):
        store.publish(tmp_path / "a", name="net")
    (store.root / "net" / "state.json").write_text("{")
    assert store.current("net") == 2
    assert store.publish(tmp_path / "a", name="net") == 3
