"""The store: versions, `current`, names, concurrent publishers, and no path outside it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.artifact.made import linear
from torchship import process
from torchship.artifact import Store, open_artifact
from torchship.artifact.store import Entry
from torchship.errors import BadConfig, CorruptArtifact, NotFound, TorchshipError


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


def as_person(number: int, umask: int, call: Callable[[], object]) -> str:
    """What a call gives or raises in a process of another user of group 5000."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.umask(umask)
            os.setgroups([5000])
            os.setresgid(5000, 5000, 5000)
            os.setresuid(number, number, number)
            found = str(call())
        except BaseException as fault:
            found = f"{type(fault).__name__}: {fault}"
        os.write(writing, found.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


@pytest.fixture
def shared() -> Iterator[tuple[Path, Path]]:
    """A folder of group 5000 and an artifact that everybody may read."""
    if os.geteuid():
        pytest.skip("needs root to be two users")
    with tempfile.TemporaryDirectory() as place:
        root, source = Path(place) / "shared", Path(place) / "source"
        linear(source)
        root.mkdir()
        for path in (Path(place), *Path(place).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.chown(root, 0, 5000)
        yield root, source


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_store_of_a_group_is_written_by_all_of_it(shared: tuple[Path, Path], umask: int) -> None:
    root, source = shared
    root.chmod(0o2775)
    for number, person in enumerate((1001, 1002, 1001), 1):
        assert as_person(person, umask, lambda: Store(root).publish(source, name="net")) == str(number)
    assert as_person(1002, umask, lambda: open_artifact(Store(root).resolve("net")).manifest.name) == "linear"
    assert as_person(1002, umask, lambda: Store(root).set_current("net", version=1)) == "None"
    assert as_person(1001, umask, lambda: Store(root).remove("net", version=2)) == "None"
    assert Store(root).list() == (Entry("net", (1, 3), 1),)


def test_missing_rights_are_named(shared: tuple[Path, Path]) -> None:
    root, source = shared
    Store(root).publish(source, name="net")
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    root.chmod(0o755)
    for call in (
        lambda: Store(root).publish(source, name="net"),
        lambda: Store(root).remove("net"),
        lambda: Store(root).set_current("net", version=1),
    ):
        found = as_person(1001, 0o022, call)
        assert found.startswith(f"Unavailable: {root}")
        assert "Permission denied" in found
    (root / "mine").mkdir(mode=0o700)
    assert as_person(1001, 0o022, lambda: [entry.name for entry in Store(root).list()]) == "['net']"
    assert as_person(1001, 0o022, lambda: Store(root).resolve("mine")).startswith(f"Unavailable: {root / 'mine'}")
    assert "there is net" in as_person(1001, 0o022, lambda: message(lambda: Store(root).resolve("nett")))


def message(call: Callable[[], object]) -> str:
    """The whole line of what a call raises."""
    try:
        return str(call())
    except TorchshipError as fault:
        return fault.line


def test_without_locks_no_version_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    linear(tmp_path / "a")
    store = Store(tmp_path / "store")
    monkeypatch.setattr("torchship.artifact.store.fcntl.flock", refuse)
    monkeypatch.setattr(Store, "versions", lambda self, name: ())  # as if another one published at the same moment
    assert [store.publish(tmp_path / "a", name="net") for _ in range(2)] == [1, 2]
    (tmp_path / "store" / "net" / "state.json").unlink()
    assert store.publish(tmp_path / "a", name="net") == 3


def test_another_clock_does_not_sweep_what_is_being_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear(tmp_path / "a")
    store = Store(tmp_path / "store")
    other, old = (tmp_path / "store" / ".incoming" / name for name in ("1-other", "2-old"))
    for place in (other, old):
        place.mkdir(parents=True)
    os.utime(old, (0, 0))
    monkeypatch.setattr("time.time", lambda: 4e9)
    store.publish(tmp_path / "a", name="net")
    assert other.exists()
    assert not old.exists()


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHSHIP_STORE", "~/store")
    assert Store().root == Store("~/store").root == tmp_path / "store"
