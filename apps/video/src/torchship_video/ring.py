"""A camera's ring of shared memory: one process decodes into its slots, others read them in place.

The ring is a file in /dev/shm that only its user may open. A slot is claimed by the writer, filled, published as a
`Frame`, and overwritten when its turn comes round again; its generation is even while it holds a frame and odd while
it is written. Who reads a slot holds a shared lock on one byte of the file, who writes it an exclusive one. They are
open file description locks (Linux, fcntl(2)), which the kernel takes back when a process ends in whatever way: a
reader that is killed gives its slots back, a writer that is killed leaves slots that nobody takes for a frame.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import shutil
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from torchship.errors import BadConfig, BadInput, NotFound, Unavailable
from torchship.hardware import free_memory
from torchship_video.messages import Frame, Layout
from torchship_video.pixels import Pixels, pixel_bytes, pixel_shape

FOLDER = Path("/dev/shm")  # noqa: S108  # files of mode 0600, made with O_EXCL, opened with O_NOFOLLOW
SLOTS = 12
_NAME = re.compile(r"torchship-ring-[A-Za-z0-9._-]{1,120}")
_HEAD = struct.Struct("=8sQQQ")  # magic, slots, bytes of a slot, bytes from one slot to the next
_MAGIC = b"tsring01"
_PAGES = mmap.PAGESIZE  # the head, and the generations from its byte 64 on
_MOST_SLOTS = (_PAGES - 64) // 8
_WRITER, _USED = 2**20, 2**20 + 1  # locked by the one writer; by every process that has the ring open
_HEADROOM = 16 * 2**20
_SETTLED = 10.0  # seconds after which a ring that nobody has open is one that was left behind


class StaleFrame(Unavailable):
    """The slot of a frame was written again, or its ring is gone: the frame was dropped."""


class _RingFile:
    """The file of a ring, mapped, with the locks of this process on it. Each instance locks for itself."""

    def __init__(self, fd: int, name: str, *, writable: bool) -> None:
        self.fd, self.name = fd, name
        head = os.pread(fd, _HEAD.size, 0)
        magic, slots, size, step = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0, 0)
        if magic != _MAGIC or not 0 < slots <= _MOST_SLOTS or os.fstat(fd).st_size < _PAGES + slots * step:
            raise BadInput(f"{name} is not a ring of frames", hint="a ring is made by the process that decodes")
        self.slots, self.size, self.step = int(slots), int(size), int(step)
        self.map = mmap.mmap(fd, _PAGES + slots * step, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self.generations = np.frombuffer(self.map, np.uint64, self.slots, 64)
        self.lock(_USED, fcntl.F_RDLCK)

    def lock(self, byte: int, kind: int) -> bool:
        """Lock or unlock one byte of the file without waiting; False when another holds it."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
        except OSError:
            return False
        return True

    def view(self, slot: int, width: int, height: int, layout: Layout) -> Pixels:
        """The pixels of a slot. Raises BadInput when they do not fit into one."""
        wanted = pixel_bytes(width, height, layout)
        if wanted > self.size:
            raise BadInput(
                f"a frame of {width}x{height} in {layout} has {wanted} bytes, a slot of {self.name} has {self.size}",
                hint="make a ring for the largest frame of the camera",
            )
        flat: Pixels = np.frombuffer(self.map, np.uint8, wanted, _PAGES + slot * self.step)
        return flat.reshape(pixel_shape(width, height, layout))

    def close(self) -> None:
        """Give up the locks and the memory; views that still live keep their pages until they die."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            del self.generations
            with suppress(BufferError):
                self.map.close()


def _opened(name: str, *, writable: bool) -> _RingFile:
    """The ring of that name. Raises NotFound, or BadInput for what is none of ours."""
    if not _NAME.fullmatch(name):
        raise BadInput(f"{name[:80]!r} is not the name of a ring", hint="it is given by a frame's handle")
    try:
        fd = os.open(FOLDER / name, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as fault:
        raise NotFound(f"no ring {name}: {fault.strerror}", hint="its camera was removed or is opened anew") from None
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise BadInput(f"{name} is not a ring of this user", hint="a ring is made by the process that decodes")
        return _RingFile(fd, name, writable=writable)
    except BaseException:
        os.close(fd)
        raise


class RingSlot:
    """A claimed slot: fill its `pixels`, then `publish` it, or `drop` it."""

    def __init__(self, ring: _RingFile, number: int) -> None:
        self._ring, self.number = ring, number
        self._facts: tuple[int, int, Layout] | None = None

    def pixels(self, width: int, height: int, layout: Layout) -> Pixels:
        """The memory to decode into: see `pixel_shape`."""
        self._facts = (width, height, layout)
        return self._ring.view(self.number, width, height, layout)

    def publish(self, camera: str, *, sequence: int, taken: float = 0.0, position: float = 0.0) -> Frame:
        """The handle of what was written; from here on others may read it. `taken` is now unless it is given."""
        if self._facts is None:
            raise BadInput("a slot was published before it was written", hint="call pixels first")
        width, height, layout = self._facts
        self._ring.generations[self.number] += np.uint64(1)
        frame = Frame(
            camera=camera,
            ring=self._ring.name,
            slot=self.number,
            generation=int(self._ring.generations[self.number]),
            sequence=sequence,
            taken=taken or time.time(),
            position=position,
            width=width,
            height=height,
            layout=layout,
        )
        self.drop()
        return frame

    def drop(self) -> None:
        """Give the slot back; unless it was published, nobody reads it."""
        self._ring.lock(self.number, fcntl.F_UNLCK)


class RingWriter:
    """The one process that writes a ring."""

    def __init__(self, ring: _RingFile) -> None:
        if not ring.lock(_WRITER, fcntl.F_WRLCK):
            ring.close()
            raise Unavailable(f"another process writes {ring.name}", hint="a ring has one writer: end the other")
        self._ring = ring
        self._next = int(np.argmin(ring.generations))

    @classmethod
    def make(cls, *, size: int, slots: int = SLOTS, name: str = "") -> RingWriter:
        """A new ring of `slots` frames of at most `size` bytes.

        Raises Unavailable when /dev/shm has no room for it, before anything is written.
        """
        if not 2 <= slots <= _MOST_SLOTS or size < 1:
            raise BadConfig(f"a ring of {slots} slots of {size} bytes", hint=f"from 2 to {_MOST_SLOTS} slots")
        name = name or new_name()
        if not _NAME.fullmatch(name):
            raise BadInput(f"{name[:80]!r} is not a name for a ring", hint="torchship-ring- and letters, digits or .-_")
        step = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = _PAGES + slots * step
        _check_room(whole)
        path = FOLDER / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, whole)  # a full memory is an error here, and not a bus error later
            os.pwrite(fd, _HEAD.pack(_MAGIC, slots, size, step), 0)
            return cls(_RingFile(fd, name, writable=True))
        except OSError as fault:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise Unavailable(f"cannot reserve {whole} bytes in {FOLDER}: {fault.strerror}", hint=_ROOM_HINT) from None

    @classmethod
    def take(cls, name: str) -> RingWriter:
        """Go on with a ring whose writer ended. Raises NotFound, and Unavailable while another writes it."""
        return cls(_opened(name, writable=True))

    @property
    def name(self) -> str:
        """What readers attach to."""
        return self._ring.name

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return self._ring.slots

    @property
    def size(self) -> int:
        """Bytes of the largest frame that fits."""
        return self._ring.size

    def claim(self) -> RingSlot | None:
        """The slot that was written longest ago among those that nobody reads; None when all are read."""
        ring = self._ring
        for turn in range(ring.slots):
            number = (self._next + turn) % ring.slots
            if ring.lock(number, fcntl.F_WRLCK):
                self._next = (number + 1) % ring.slots
                odd = int(ring.generations[number]) % 2  # a writer died here
                ring.generations[number] += np.uint64(1 + odd)
                return RingSlot(ring, number)
        return None

    def close(self, *, remove: bool = True) -> None:
        """Give the memory back, and remove the ring: readers keep what they hold."""
        if remove:
            discard(self._ring.name)
        self._ring.close()


class RingReader:
    """This process's view of a ring. Any number of threads may use it."""

    def __init__(self, ring: _RingFile) -> None:
        self._ring = ring
        self._guard = threading.Lock()
        self._marks: Counter[int] = Counter()

    @classmethod
    def attach(cls, name: str) -> RingReader:
        """The reader of that ring, the same for the whole process. Raises StaleFrame when the ring is gone."""
        return _readers.get(name)

    @property
    def held(self) -> int:
        """How many slots this process keeps from being overwritten."""
        return len(self._marks)

    @property
    def removed(self) -> bool:
        """Whether the ring has no name any more: nothing new will come."""
        return os.fstat(self._ring.fd).st_nlink == 0

    def hold(self, frame: Frame) -> None:
        """Keep a frame from being overwritten until `release`, which is called as often. Raises StaleFrame."""
        ring, slot = self._ring, frame.slot
        if not 0 <= slot < ring.slots:
            raise BadInput(f"a frame in slot {slot} of {ring.slots}", hint="handles come from the ring's writer")
        with self._guard:
            fresh = not self._marks[slot]
            if fresh and (ring.fd < 0 or not ring.lock(slot, fcntl.F_RDLCK)):
                del self._marks[slot]
                raise _stale(frame)
            if int(ring.generations[slot]) != frame.generation or frame.generation % 2:
                if fresh:
                    ring.lock(slot, fcntl.F_UNLCK)
                    del self._marks[slot]
                raise _stale(frame)
            self._marks[slot] += 1

    def release(self, frame: Frame) -> None:
        """Let a frame go that was held."""
        with self._guard:
            if self._marks[frame.slot] > 1:
                self._marks[frame.slot] -= 1
            elif self._marks.pop(frame.slot):
                self._ring.lock(frame.slot, fcntl.F_UNLCK)

    @contextmanager
    def read(self, frame: Frame) -> Iterator[Pixels]:
        """The pixels in place, read-only; do not use them after the block. Raises StaleFrame."""
        self.hold(frame)
        try:
            yield self._ring.view(frame.slot, frame.width, frame.height, frame.layout)
        finally:
            self.release(frame)

    def close(self) -> None:
        """Let go of everything."""
        with self._guard:
            self._marks.clear()
            self._ring.close()


class _Readers:
    """The rings that this process reads. Those that were removed are let go when nothing of them is held."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew: after a fork the locks belong to both processes."""
        self._guard = threading.Lock()
        self._readers: dict[str, RingReader] = {}
        self._looked = 0.0

    def get(self, name: str) -> RingReader:
        with self._guard:
            found = self._readers.get(name)
            now = time.monotonic()
            if found is None or now > self._looked + 5:
                self._looked = now
                self._let_go(spared=name)
            if found is None:
                try:
                    found = self._readers[name] = RingReader(_opened(name, writable=False))
                except NotFound as fault:
                    raise StaleFrame(str(fault), hint=fault.hint) from None
            return found

    def _let_go(self, *, spared: str) -> None:
        for name, reader in list(self._readers.items()):
            if name != spared and reader.removed and not reader.held:
                del self._readers[name]
                reader.close()


_readers = _Readers()
os.register_at_fork(after_in_child=_readers.forget)


@contextmanager
def read(frame: Frame) -> Iterator[Pixels]:
    """The pixels of a frame in place, read-only, for as long as the block lasts. Raises StaleFrame."""
    with RingReader.attach(frame.ring).read(frame) as pixels:
        yield pixels


def hold(frame: Frame) -> None:
    """Keep a frame from being overwritten until this process releases it or ends. Raises StaleFrame."""
    RingReader.attach(frame.ring).hold(frame)


def release(frame: Frame) -> None:
    """Let a frame go that was held; nothing happens when its ring is gone."""
    with suppress(StaleFrame):
        RingReader.attach(frame.ring).release(frame)


def discard(name: str) -> None:
    """Remove a ring's file: nobody can attach to it any more, and its memory is back once nobody reads it."""
    if _NAME.fullmatch(name):
        (FOLDER / name).unlink(missing_ok=True)


def new_name() -> str:
    """A name for a ring, or with a dot and more behind it for a family of them, that nobody else has."""
    return f"torchship-ring-{secrets.token_hex(8)}"


def discard_family(name: str, *, spared: str = "") -> None:
    """Remove all rings whose names begin with `name` and a dot, but one."""
    for path in FOLDER.glob(f"{name}.*"):
        if path.name != spared:
            discard(path.name)


def sweep() -> list[str]:
    """Remove the rings of this user that no living process has open, left by hosts that were killed; their names."""
    removed = []
    for path in FOLDER.glob("torchship-ring-*"):
        with suppress(OSError, NotFound, BadInput):
            facts = path.lstat()
            if facts.st_uid != os.geteuid() or time.time() - facts.st_ctime < _SETTLED:
                continue
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, _USED, 1, 0))
                path.unlink()
                removed.append(path.name)
            finally:
                os.close(fd)
    return removed


_ROOM_HINT = "fewer slots or cameras, or more shared memory (docker run --shm-size)"


def _check_room(wanted: int) -> None:
    free = min(shutil.disk_usage(FOLDER).free, free_memory())
    if wanted + _HEADROOM > free:
        raise Unavailable(
            f"a ring of {wanted / 2**20:.0f} MiB is needed in {FOLDER}, {free / 2**20:.0f} MiB are free",
            hint=_ROOM_HINT,
        )


def _stale(frame: Frame) -> StaleFrame:
    return StaleFrame(
        f"frame {frame.sequence} of {frame.camera} was overwritten",
        hint="hold frames that wait, or give the ring slots",
    )
