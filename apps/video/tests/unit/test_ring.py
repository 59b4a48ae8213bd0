"""A camera's ring: who dies gives back, what does not fit is refused, nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from torchship import process
from torchship.errors import BadInput, NotFound, Unavailable
from torchship_video import ring
from torchship_video.messages import Frame, encode
from torchship_video.ring import RingReader, RingWriter, StaleFrame

CHILDREN = "apps.video.tests.unit.ring_children"


@pytest.fixture
def writer() -> Iterator[RingWriter]:
    made = RingWriter.make(size=24, slots=3)
    yield made
    made.close()


def written(writer: RingWriter, value: int) -> Frame:
    slot = writer.claim()
    assert slot
    slot.pixels(4, 2, "RGB")[:] = value
    return slot.publish("door", sequence=value)


def test_a_frame_is_read_in_place_and_read_only(writer: RingWriter) -> None:
    frame = written(writer, 7)
    with ring.read(frame) as pixels:
        assert pixels.tolist() == [[[7] * 3] * 4] * 2
        assert not pixels.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            pixels[:] = 0


def test_an_overwritten_frame_is_stale_and_a_held_one_is_never_overwritten(writer: RingWriter) -> None:
    first = written(writer, 1)
    ring.hold(first)
    later = [written(writer, value) for value in (2, 3, 4, 5)]
    assert first.slot not in {frame.slot for frame in later}
    with ring.read(first) as pixels:
        assert pixels[0, 0, 0] == 1
    with pytest.raises(StaleFrame):
        ring.hold(later[0])
    ring.release(first)
    assert first.slot in {written(writer, value).slot for value in (6, 7, 8)}
    with pytest.raises(StaleFrame), ring.read(first):
        pass


def test_a_frame_that_is_held_twice_is_kept_until_it_is_released_twice(writer: RingWriter) -> None:
    frame = written(writer, 1)
    ring.hold(frame)
    ring.hold(frame)
    ring.release(frame)
    for value in range(2, 8):
        assert written(writer, value).slot != frame.slot
    ring.release(frame)
    assert frame.slot in {written(writer, value).slot for value in (8, 9, 10)}


def test_a_killed_reader_gives_its_slots_back(writer: RingWriter) -> None:
    child, line = process.converse(f"{CHILDREN}:hold_forever", argument="")
    with line:
        try:
            for value in (1, 2, 3):
                line.send(encode(written(writer, value)))
                assert line.recv(16) == b"held"
            assert writer.claim() is None
        finally:
            process.stop(child)  # kill -9
    assert {written(writer, value).slot for value in (4, 5, 6)} == {0, 1, 2}


def test_a_killed_writer_leaves_no_frame_and_the_next_one_goes_on(writer: RingWriter) -> None:
    frames = [written(writer, value) for value in (1, 2, 3)]
    name = writer.name
    writer.close(remove=False)
    child, line = process.converse(f"{CHILDREN}:write_half", argument=name)
    with line:
        try:
            assert line.recv(16) == b"written"
            with pytest.raises(Unavailable, match="another process writes"):
                RingWriter.take(name)
        finally:
            process.stop(child)
    for frame in frames[:1]:
        with pytest.raises(StaleFrame):
            ring.hold(frame)  # half of another frame is in it
    with ring.read(frames[1]) as pixels:
        assert np.all(pixels == 2)
    again = RingWriter.take(name)
    fresh = [written(again, value) for value in (4, 5, 6)]
    assert {frame.slot for frame in fresh} == {0, 1, 2}
    assert all(frame.generation % 2 == 0 for frame in fresh)
    with ring.read(fresh[0]) as pixels:
        assert np.all(pixels == 4)
    again.close()


def test_a_ring_that_does_not_fit_is_refused_before_it_is_made() -> None:
    before = set(ring.FOLDER.iterdir())
    with pytest.raises(Unavailable, match="MiB are free") as fault:
        RingWriter.make(size=2**50, slots=4)
    assert "shm-size" in fault.value.hint
    assert set(ring.FOLDER.iterdir()) == before


def test_a_frame_that_does_not_fit_into_a_slot_is_refused(writer: RingWriter) -> None:
    slot = writer.claim()
    assert slot
    with pytest.raises(BadInput, match="has 48 bytes"):
        slot.pixels(4, 4, "RGB")
    with pytest.raises(BadInput, match="a frame of 5x2"):
        slot.pixels(5, 2, "I420")
    slot.drop()


@pytest.mark.parametrize("name", ["../etc/passwd", "torchship-ring-/../x", "", "sem.mp", "torchship-ring-" + "x" * 200])
def test_a_handle_names_rings_alone(writer: RingWriter, name: str) -> None:
    with pytest.raises(BadInput, match="not the name of a ring"):
        ring.hold(msgspec.structs.replace(written(writer, 1), ring=name))


def test_what_is_no_ring_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "FOLDER", tmp_path)
    (tmp_path / "torchship-ring-a").write_bytes(b"x" * 8192)
    (tmp_path / "torchship-ring-a").chmod(0o600)
    with pytest.raises(BadInput, match="is not a ring of frames"):
        RingReader.attach("torchship-ring-a")
    (tmp_path / "torchship-ring-b").symlink_to("/etc/passwd")
    with pytest.raises(StaleFrame):
        RingReader.attach("torchship-ring-b")
    made = RingWriter.make(size=24, slots=3, name="torchship-ring-c")
    (tmp_path / "torchship-ring-c").chmod(0o644)
    with pytest.raises(BadInput, match="not a ring of this user"):
        RingReader.attach("torchship-ring-c")
    made.close()


@pytest.mark.parametrize(("field", "value"), [("slot", 3), ("slot", -1), ("width", 4000), ("height", 0), ("width", -4)])
def test_a_made_up_handle_reads_nothing(writer: RingWriter, field: str, value: int) -> None:
    frame = msgspec.structs.replace(written(writer, 1), **{field: value})
    with pytest.raises((BadInput, StaleFrame)), ring.read(frame):
        pass
    assert RingReader.attach(writer.name).held == 0


def test_a_removed_ring_stays_readable_while_it_is_held(writer: RingWriter) -> None:
    frame = written(writer, 1)
    ring.hold(frame)
    writer.close()
    with ring.read(frame) as pixels:
        assert np.all(pixels == 1)
    ring.release(frame)
    with pytest.raises(NotFound):
        RingWriter.take(writer.name)


def test_rings_that_were_left_behind_are_removed_and_living_ones_are_not(
    writer: RingWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = RingWriter.make(size=24, slots=2)
    left.close(remove=False)
    assert left.name not in ring.sweep()  # it may be someone's who has not locked it yet
    monkeypatch.setattr(ring, "_SETTLED", -1.0)
    assert left.name in ring.sweep()
    assert (ring.FOLDER / writer.name).exists()


def test_a_reader_lets_go_of_rings_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = 0
    for turn in range(6):
        made = RingWriter.make(size=24, slots=2)
        with ring.read(written(made, turn)):
            pass
        made.close()
        if turn == 2:
            before = descriptors()
    assert descriptors() == before
