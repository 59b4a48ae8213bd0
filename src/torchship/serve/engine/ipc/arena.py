"""The arena: anonymous shared memory between the host and one worker, handed over by file descriptor.

It has `depth` slots; a slot has an input half, written by the host only, and an output half, written by the worker
only, so that a batch in flight owns one slot. The rows of a batch lie in it as one contiguous slice per tensor.
What does not fit into a slot travels in a `MemoryRegion` of its own that goes with the message.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from torchship.errors import BadInput, StageFailed
from torchship.serve.ipc.memory import MemoryRegion
from torchship.tensors import Array
from torchship.wire.raw import decode_raw, encode_raw

ALIGN = 64
_LENGTH = 4  # bytes before each element of BYTES


class ArenaBlock(msgspec.Struct, array_like=True, frozen=True):
    """One tensor in shared memory: its shape, where it begins and how many bytes it takes."""

    shape: tuple[int, ...]
    offset: int
    size: int


class Arena:
    """`depth` slots of an input and an output half each, in one MemoryRegion. `free` are those that hold no batch: the
    owner pops one off, and appends it when it is free again."""

    def __init__(self, region: MemoryRegion, *, depth: int, input_size: int, output_size: int) -> None:
        self.region = region
        self.depth = depth
        self.input_size = input_size
        self.output_size = output_size
        self.free = list(range(depth))

    @classmethod
    def make(cls, *, depth: int, input_size: int, output_size: int) -> Arena:
        """Reserve the memory of an arena; sizes are bytes a slot. Raises Unavailable when there is not enough."""
        input_size, output_size = aligned(input_size), aligned(output_size)
        region = MemoryRegion.make(depth * (input_size + output_size))
        return cls(region, depth=depth, input_size=input_size, output_size=output_size)

    def input_span(self, slot: int) -> tuple[int, int]:
        """Where the input half of a slot begins and ends."""
        start = slot * (self.input_size + self.output_size)
        return start, start + self.input_size

    def output_span(self, slot: int) -> tuple[int, int]:
        """Where the output half of a slot begins and ends."""
        start = slot * (self.input_size + self.output_size) + self.input_size
        return start, start + self.output_size


def aligned(size: int) -> int:
    """`size` rounded up to where the next tensor may begin."""
    return -(-size // ALIGN) * ALIGN


def size_of(array: Array) -> int:
    """Bytes that `write` needs for an array: BYTES are packed as lengths and contents."""
    if array.dtype == object:
        return int(sum(map(len, array.flat))) + _LENGTH * array.size
    return array.nbytes


def write(arrays: Sequence[Array], *, memory: memoryview, offset: int) -> ArenaBlock:
    """Write the rows of several arrays one after the other at `offset`; the block that they make together.

    The arrays agree in dtype and in every axis but the first; a single array may have any shape.
    """
    first = arrays[0]
    shape = first.shape if len(arrays) == 1 else (sum([len(array) for array in arrays]), *first.shape[1:])
    if first.dtype == object:
        packed = b"".join([encode_raw(array) for array in arrays])
        memory[offset : offset + len(packed)] = packed
        return ArenaBlock(shape, offset, len(packed))
    native = first.dtype if first.dtype.isnative else first.dtype.newbyteorder("=")
    view = np.ndarray(shape, native, memory, offset)
    if len(arrays) == 1:
        view[...] = first
    else:
        np.concatenate(arrays, out=view)
    return ArenaBlock(shape, offset, view.nbytes)


def write_raw(raws: Sequence[bytes], *, memory: memoryview, offset: int, shape: tuple[int, ...]) -> ArenaBlock:
    """The same for rows that are bytes already; `shape` is that of the block that they make."""
    data = b"".join(raws)
    memory[offset : offset + len(data)] = data
    return ArenaBlock(shape, offset, len(data))


def read(block: ArenaBlock, *, dtype: np.dtype[np.generic], memory: memoryview) -> Array:
    """The tensor of a block: a view of the memory, or an array of `bytes` objects. Raises StageFailed when cut off."""
    if block.offset < 0 or block.offset + block.size > len(memory):
        raise StageFailed(f"a block of {block.size} bytes at {block.offset} lies outside of its memory")
    try:
        if dtype.hasobject:
            data = memory[block.offset : block.offset + block.size]
            return decode_raw(data, name="of a block", datatype="BYTES", shape=block.shape)
        return np.ndarray(block.shape, dtype, memory, block.offset)
    except (BadInput, TypeError, ValueError) as fault:
        raise StageFailed(f"a block does not hold its shape {list(block.shape)}: {fault}") from None
