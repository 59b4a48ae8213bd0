"""What is acknowledged is on disk, and what is forgotten is gone: restores under an open gallery, and full disks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from torchship.errors import CorruptArtifact, NotFound, Unavailable
from torchship_faces.gallery import Enrolment, Gallery, gallery, snapshot, transfer

WIDTH = 16


def opened(root: Path) -> Gallery:
    return Gallery(root, model="m", width=WIDTH)


def vector(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((1, WIDTH), dtype=np.float32)


def enrol(book: Gallery, *people: str, face: bytes = b"", replace: bool = False) -> None:
    for person in people:
        faces = (face,) if face else ()
        item = Enrolment(person=person, vectors=vector(len(person)), faces=faces, replace=replace)
        book.enrol([item])


def copy_over(backup: Path, live: Path) -> None:
    subprocess.run(["cp", "-a", f"{backup}/.", str(live)], check=True)


def rename_over(backup: Path, live: Path) -> None:
    """As rsync does: each file that differs is written beside and renamed."""
    for path in backup.iterdir():
        there = live / path.name
        if path.is_file() and not (there.is_file() and path.read_bytes() == there.read_bytes()):
            shutil.copy2(path, live / f".{path.name}.new")
            (live / f".{path.name}.new").rename(live / path.name)


def another_folder(backup: Path, live: Path) -> None:
    live.rename(live.with_name("old"))
    shutil.copytree(backup, live)


@pytest.mark.parametrize("restore", [copy_over, rename_over, another_folder])
@pytest.mark.parametrize("compacted", ["", "before", "after"])
def test_a_restored_backup_is_read_and_written_on(
    tmp_path: Path, restore: Callable[[Path, Path], None], compacted: str
) -> None:
    live, backup = tmp_path / "live", tmp_path / "backup"
    running = opened(live)
    enrol(running, "a", "bb", "ccc")
    if compacted == "before":
        running.compact()
        enrol(running, "dddd")
    before = running.page()
    shutil.copytree(live, backup)
    enrol(running, "a-mistake", "another")
    if compacted == "after":
        running.compact()
    restore(backup, live)
    assert running.page() == before
    enrol(running, "newest")
    assert running.page() == opened(live).page() == [*before, "newest"]
    assert running.nearest(vector(len("newest")))[0][0].person == "newest"


def test_a_restored_log_that_is_longer_than_the_one_that_was_read(tmp_path: Path) -> None:
    live, old, newer = tmp_path / "live", tmp_path / "old", tmp_path / "newer"
    first = opened(live)
    enrol(first, "a")
    shutil.copytree(live, old)
    enrol(first, "bb", "ccc", "dddd")
    shutil.copytree(live, newer)
    copy_over(old, live)
    enrol(first, "eeeee")
    copy_over(newer, live)
    assert first.page() == ["a", "bb", "ccc", "dddd"]
    enrol(first, "ffffff")
    assert opened(live).page() == ["a", "bb", "ccc", "dddd", "ffffff"]


def test_writers_take_turns_by_the_lock_file_that_is_there_now(tmp_path: Path) -> None:
    running = opened(tmp_path / "live")
    enrol(running, "a")
    shutil.copytree(tmp_path / "live", tmp_path / "backup")
    another_folder(tmp_path / "backup", tmp_path / "live")
    other = opened(tmp_path / "live")
    with other._exclusive():
        writing = threading.Thread(target=enrol, args=(running, "bb"))
        writing.start()
        writing.join(0.3)
        assert writing.is_alive()
    writing.join(30)
    assert other.page() == ["a", "bb"]


def test_a_log_that_is_gone_is_said(tmp_path: Path) -> None:
    running = opened(tmp_path)
    enrol(running, "a")
    next(tmp_path.glob("log-*")).unlink()
    with pytest.raises(CorruptArtifact, match="log-"):
        running.page()


def test_what_another_thread_reads_meanwhile_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = opened(tmp_path)
    synced = os.fdatasync

    def read_then_sync(file: int) -> None:
        assert running.page() == ["a"]  # the record is in the file already
        synced(file)

    monkeypatch.setattr(os, "fdatasync", read_then_sync)
    enrol(running, "a")
    assert running.count() == (1, 1)


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["vectors", "publish"])
def test_no_room_for_a_snapshot_is_no_fault_of_an_enrolment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    running = opened(tmp_path)
    enrol(running, "a")
    files = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(gallery, "_LOG_FLOOR", 0)
    with monkeypatch.context() as full:
        full.setattr(snapshot.Writer, step, no_room)
        enrol(running, "bb")
        assert "could not be compacted: No space left on device" in caplog.text
        with pytest.raises(Unavailable, match="No space left"):
            running.compact()
        with pytest.raises(Unavailable, match="'a' is forgotten, the vectors are on disk still"):
            running.forget("a", compact=True)
        enrol(running, "a")
        assert {path.name for path in tmp_path.iterdir()} == files  # nothing half done is left behind
        caplog.clear()
        enrol(running, "ccc")  # it is not tried again at once
        assert not caplog.text
    assert running.page() == opened(tmp_path).page() == ["bb", "a", "ccc"]
    running.compact()
    assert running.page() == opened(tmp_path).page() == ["bb", "a", "ccc"]


def kept(root: Path) -> set[bytes]:
    return {path.read_bytes() for path in (root / "faces").rglob("*") if path.is_file()}


def test_faces_of_an_enrolment_that_failed_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = opened(tmp_path)
    enrol(running, "a", face=b"face of a")
    with monkeypatch.context() as full:
        full.setattr(os, "fdatasync", no_room)
        for face in (b"face of b", b"face of a"):
            with pytest.raises(Unavailable):
                enrol(running, "bb", face=face)
    assert running.page() == ["a"]
    assert kept(tmp_path) == {b"face of a"}
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", no_room)
        with pytest.raises(Unavailable, match="could not be kept: No space left"):
            enrol(running, "bb", face=b"face of b")
    assert kept(tmp_path) == {b"face of a"}


def test_replaced_faces_go_at_once(tmp_path: Path) -> None:
    running = opened(tmp_path)
    enrol(running, "a", face=b"first")
    enrol(running, "bb", face=b"shared")
    enrol(running, "ccc", face=b"shared")
    enrol(running, "a", face=b"second", replace=True)
    assert kept(tmp_path) == {b"second", b"shared"}
    enrol(running, "ccc", face=b"", replace=True)
    assert kept(tmp_path) == {b"second", b"shared"}
    running.forget("bb")
    assert kept(tmp_path) == {b"second"}
    assert list(running.faces_of("a").values()) == [b"second"]


@pytest.mark.parametrize("serial", [0, -1, 7, 2**64, 2**70])
def test_a_template_that_is_not_there_takes_nobody_along(tmp_path: Path, serial: int) -> None:
    running = opened(tmp_path)
    enrol(running, "a", "bb")
    with pytest.raises(NotFound, match=f"no template {serial} of person 'a'"):
        running.forget("a", serial=serial)
    with pytest.raises(NotFound, match="no template 2 of"):
        running.forget("a", serial=2)  # that is bb's
    assert running.page() == opened(tmp_path).page() == ["a", "bb"]
    assert running.count() == (2, 2)


def test_an_export_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = opened(tmp_path / "g")
    enrol(running, "a")
    with pytest.raises(Unavailable, match="could not be written: No such file"):
        transfer.export(running, tmp_path / "none" / "x.safetensors")
    monkeypatch.setattr(os, "fsync", no_room)
    with pytest.raises(Unavailable, match="could not be written: No space left"):
        transfer.export(running, tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["g"]


def test_a_folder_that_cannot_be_a_gallery_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="cannot be opened"):
        opened(tmp_path / "file" / "below")
    (tmp_path / "taken" / "lock").mkdir(parents=True)
    with pytest.raises(Unavailable, match="cannot be opened: Is a directory"):
        opened(tmp_path / "taken")
