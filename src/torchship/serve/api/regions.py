"""System shared memory that clients register: their tensors lie there instead of in the body.

Nothing is mapped: bytes are read and written through the file descriptor, because a client that shortens its file
would otherwise kill the server with a bus error. Our own arenas have no names and cannot be reached from here.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchship.errors import BadInput, NotFound, Unsupported
from torchship.wire.messages import Request

_KEY = re.compile(r"/?([A-Za-z0-9_.\-]{1,200})")
_NAME = re.compile(r"[^\x00-\x1f]{1,200}")
_MOST = 256


@dataclass(slots=True)
class SharedRegion:
    """A registered part of a shared memory file."""

    name: str
    key: str
    offset: int
    size: int
    descriptor: int
    users: int = 0  # requests that will write into it
    idle: asyncio.Future[None] | None = None  # set while it leaves: done when nobody uses it


class SharedMemory:
    """The regions of all clients of a server, by name."""

    def __init__(self, *, folder: Path = Path("/dev/shm"), kind: str = "system") -> None:  # noqa: S108
        """Only files of `folder` can be registered; `kind` is what callers are told."""
        self._folder = folder
        self._kind = kind
        self._regions: dict[str, SharedRegion] = {}
        self._leaving: dict[str, SharedRegion] = {}

    def register(self, name: str, *, key: str, offset: int, size: int) -> None:
        """Open the shared memory `key` and give `size` bytes from `offset` on a name.

        Raises BadInput for a name that is taken, a key that is not one, or a range outside the file.
        """
        found = _KEY.fullmatch(key)
        if not _NAME.fullmatch(name) or not found or found[1] in (".", ".."):
            raise BadInput("a region needs a name, and a key as in shm_open: a slash and a file name")
        if name in self._regions:
            raise BadInput(f"shared memory region '{name}' already in manager", hint="unregister it first")
        if len(self._regions) >= _MOST:
            raise BadInput(f"there are {_MOST} shared memory regions already", hint="unregister some")
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(self._folder / found[1], flags)
        except OSError:
            raise BadInput(f"unable to open shared memory region: '{name}'", hint="does the key exist?") from None
        about = os.fstat(descriptor)
        fits = offset >= 0 and size > 0 and offset + size <= about.st_size
        if not stat.S_ISREG(about.st_mode) or about.st_uid not in (os.getuid(), os.geteuid()) or not fits:
            os.close(descriptor)
            raise BadInput(f"shared memory region '{name}' is not {size} bytes at {offset} of a file of this user")
        self._regions[name] = SharedRegion(name, key, offset, size, descriptor)

    async def unregister(self, name: str = "") -> None:
        """Forget one region, or all of them; an unknown name is no error. Waits for the requests that use it."""
        for region in [self._regions[name]] if name in self._regions else [] if name else [*self._regions.values()]:
            del self._regions[region.name]
            if region.users:
                self._leaving[region.name] = region
                region.idle = asyncio.get_running_loop().create_future()
                await region.idle
                del self._leaving[region.name]
            os.close(region.descriptor)

    def hold(self, request: Request) -> list[SharedRegion]:
        """The regions into which the answer to a request goes: they stay until `release`."""
        names = {str(wish.parameters.get("shared_memory_region", "")) for wish in request.outputs}
        found = [self._regions[name] for name in names if name in self._regions]
        for region in found:
            region.users += 1
        return found

    @staticmethod
    def release(held: list[SharedRegion]) -> None:
        """The request is answered, or will never be."""
        for region in held:
            region.users -= 1
            if not region.users and region.idle is not None:
                region.idle.set_result(None)

    def status(self, name: str = "") -> list[dict[str, Any]]:
        """`name`, `key`, `offset` and `byte_size` of one region or of all. Raises NotFound."""
        if name and name not in self._regions:
            raise NotFound(f"Unable to find {self._kind} shared memory region: '{name}'")
        return [
            {"name": one.name, "key": one.key, "offset": one.offset, "byte_size": one.size}
            for one in self._regions.values()
            if name in ("", one.name)
        ]

    def _range(self, region: str, offset: int, size: int) -> SharedRegion:
        found = self._regions.get(region) or self._leaving.get(region)
        if found is None:
            raise BadInput(f"Unable to find shared memory region: '{region}'", hint="register it first")
        if offset < 0 or size < 0 or offset + size > found.size:
            raise BadInput(f"Invalid offset + byte size for shared memory region: '{region}' has {found.size} bytes")
        return found

    def read(self, region: str, *, offset: int, size: int) -> memoryview:
        """A copy of `size` bytes. Raises BadInput for what is not registered, or not there any more."""
        found = self._range(region, offset, size)
        data = bytearray(size)
        if size and os.preadv(found.descriptor, [data], found.offset + offset) != size:
            raise BadInput(f"shared memory region '{region}' has become shorter")
        return memoryview(data)

    def write(self, region: str, data: bytes, *, offset: int, size: int) -> None:
        """Put `data` into at most `size` bytes. Raises BadInput where it does not fit."""
        found = self._range(region, offset, size)
        if len(data) > size:
            raise BadInput(f"the output has {len(data)} bytes, the shared memory for it {size}")
        if os.fstat(found.descriptor).st_size < found.offset + offset + len(data):
            raise BadInput(f"shared memory region '{region}' has become shorter")
        os.pwrite(found.descriptor, data, found.offset + offset)


NO_CUDA = SharedMemory(kind="cuda")  # in which nothing is ever registered


def refuse_cuda(name: str) -> None:
    """Raises Unsupported for a region of a GPU's memory."""
    text = f"failed to register CUDA shared memory region '{name}': this server does not take CUDA memory"
    raise Unsupported(text, hint="use system shared memory or binary tensors")
