"""Anonymous shared memory between the host and a child, handed over by file descriptor.

Nothing has a name: nothing can clash, be found by others or be left behind in /dev/shm. The file is sealed against
resizing and its pages are reserved when it is made, so that a full memory is an error here and not a bus error later.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress

from torchship.errors import StageFailed, Unavailable
from torchship.hardware import free_memory

_PAGE = mmap.PAGESIZE
_HEADROOM = 64 * 2**20


class MemoryRegion:
    """One piece of anonymous shared memory, mapped here and handed to another process by its descriptor."""

    def __init__(self, fd: int, *, size: int) -> None:
        self.fd = fd
        self.size = size
        self.map = mmap.mmap(fd, size)
        self.memory = memoryview(self.map)

    @classmethod
    def make(cls, size: int) -> MemoryRegion:
        """Reserve `size` bytes. Raises Unavailable when this machine or container has not that much memory left."""
        size = max(_PAGE, -(-size // _PAGE) * _PAGE)
        free = free_memory()
        if size + _HEADROOM > free:
            raise Unavailable(
                f"{size / 2**20:.0f} MiB of shared memory are needed, {free / 2**20:.0f} MiB are free",
                hint="lower max_batch, copies or the queue, or give the container more memory",
            )
        fd = os.memfd_create("torchship-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(fd, 0, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, size=size)
        except OSError as fault:
            os.close(fd)
            raise Unavailable(f"cannot reserve {size} bytes of shared memory: {fault.strerror}") from None

    @classmethod
    def take(cls, fd: int) -> MemoryRegion:
        """Map what another process made; the descriptor becomes ours. Raises StageFailed when it is not sealed."""
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise OSError("it is not sealed")  # a file that can shrink under us would kill us by a bus error
            return cls(fd, size=os.fstat(fd).st_size)
        except OSError as fault:
            os.close(fd)
            raise StageFailed(f"a worker handed over memory that cannot be used: {fault}") from None

    def drop_descriptor(self) -> None:
        """Keep the memory, but not the descriptor that hands it on: descriptors are few."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Give the memory back; may be called twice. Views that still live keep their pages until they die."""
        self.drop_descriptor()
        self.memory.release()
        with suppress(BufferError):  # the last view unmaps it
            self.map.close()
