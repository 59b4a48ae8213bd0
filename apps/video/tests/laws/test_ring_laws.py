"""Law: whatever is written, held, released, dropped and lost, who reads a frame reads that frame or StaleFrame."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from torchship_video import ring
from torchship_video.messages import Frame, decode, encode
from torchship_video.ring import RingReader, RingSlot, RingWriter, StaleFrame

SLOTS, WIDTH, HEIGHT = 3, 4, 2


class RingKeepsWhatIsHeld(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.writer = RingWriter.make(size=WIDTH * HEIGHT * 3, slots=SLOTS)
        self.name = self.writer.name
        # two readers, as two processes would have: each with its own locks
        self.readers = [RingReader(ring._opened(self.name, writable=False)) for _ in range(2)]
        self.frames: dict[int, Frame] = {}  # by sequence
        self.held: list[tuple[int, int]] = []  # reader, sequence
        self.claimed: RingSlot | None = None
        self.sequence = 0

    def slots_held(self) -> set[int]:
        return {self.frames[sequence].slot for _, sequence in self.held}

    @precondition(lambda self: self.claimed is None)
    @rule()
    def claim(self) -> None:
        self.claimed = self.writer.claim()
        assert (self.claimed is None) == (len(self.slots_held()) == SLOTS)
        if self.claimed:
            assert self.claimed.number not in self.slots_held()

    @precondition(lambda self: self.claimed is not None)
    @rule()
    def publish(self) -> None:
        assert self.claimed
        self.claimed.pixels(WIDTH, HEIGHT, "RGB")[:] = self.sequence % 251
        frame = self.claimed.publish("door", sequence=self.sequence)
        assert decode(encode(frame)) == frame
        self.frames[self.sequence] = frame
        self.sequence += 1
        self.claimed = None

    @precondition(lambda self: self.claimed is not None)
    @rule()
    def drop(self) -> None:
        assert self.claimed
        self.claimed.drop()
        self.claimed = None

    @rule()
    def writer_dies(self) -> None:
        self.writer.close(remove=False)  # its descriptor is closed, as the kernel does for a process that was killed
        self.claimed = None
        self.writer = RingWriter.take(self.name)

    @rule(reader=st.integers(0, 1), back=st.integers(1, 6))
    def hold(self, reader: int, back: int) -> None:
        if frame := self.frames.get(self.sequence - back):
            with suppress(StaleFrame):
                self.readers[reader].hold(frame)
                self.held.append((reader, frame.sequence))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reader, sequence = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.readers[reader].release(self.frames[sequence])

    @rule(reader=st.integers(0, 1))
    def reader_dies(self, reader: int) -> None:
        self.readers[reader].close()
        self.held = [(other, sequence) for other, sequence in self.held if other != reader]
        self.readers[reader] = RingReader(ring._opened(self.name, writable=False))

    @invariant()
    def read(self) -> None:
        newest: dict[int, int] = {}
        for sequence, frame in self.frames.items():
            newest[frame.slot] = sequence
        for sequence, frame in self.frames.items():
            for number, reader in enumerate(self.readers):
                try:
                    with reader.read(frame) as pixels:
                        assert pixels.shape == (HEIGHT, WIDTH, 3)
                        assert np.all(pixels == sequence % 251)
                        assert newest[frame.slot] == sequence
                except StaleFrame:
                    assert (number, sequence) not in self.held

    def teardown(self) -> None:
        for reader in self.readers:
            reader.close()
        self.writer.close()


TestRingKeepsWhatIsHeld = RingKeepsWhatIsHeld.TestCase
TestRingKeepsWhatIsHeld.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
