"""Bodies known by their bytes: a steady client's requests differ in their data alone, and only that is read again.

What comes before the data (and after it) is read once in the general way and then recognized. The parser of JSON is
in the same state after the same bytes, so a well-formed value between known bytes makes a known request.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec

from torchship.wire.messages import RawInputs, RawLayout, Request, layout_of
from torchship.wire.oip_json import reread
from torchship.wire.raw import LONG

_MARK = b'"data":'
_LONGEST = 1024  # bytes of what is remembered of a body
_MOST = 64  # different ones
_FLOATS = msgspec.json.Decoder(list[float]).decode
_WHOLE = msgspec.json.Decoder(list[int]).decode
_CODES = {"e": "e", "f": "f", "d": "d", "b": "b", "B": "B", "h": "h", "H": "H", "i": "i", "I": "I", "l": "q", "L": "Q"}


class _Template(msgspec.Struct, eq=False):
    """A request without its data: of JSON the text after it, its reader and writer; of binary data the cuts."""

    request: Request
    layout: RawLayout
    tail: bytes = b""
    read: Callable[[bytes], list[Any]] = list
    pack: Callable[..., bytes] = bytes
    cuts: tuple[tuple[int, int], ...] = ()
    size: int = 0

    def fill(self, raws: tuple[bytes, ...]) -> Request:
        """The request with this data."""
        old = self.request
        return Request(
            old.model, RawInputs(self.layout, raws), old.version, "", dict(old.parameters), old.outputs, old.deadline,
            old.priority, {}, old.binary,
        )  # fmt: skip


class TemplateCache:
    """The bodies of one model and version; `length` is that of the JSON where binary data follow it, else None."""

    def __init__(self, length: int | None) -> None:
        self._length = length
        self._known: dict[bytes, _Template] = {}

    def read(self, body: bytes) -> Request | None:
        """The request in a body that differs from a known one in its data; None for any other."""
        length = self._length
        if length is not None:
            template = self._known.get(body[:length])
            if template is None or template.size != len(body):
                return None
            return template.fill(tuple([body[start:end] for start, end in template.cuts]))
        start = body.find(_MARK) + 7
        template = self._known.get(body[:start])
        if template is None or len(body) > LONG or not body.endswith(template.tail):
            return None
        try:
            return template.fill((template.pack(*template.read(body[start : len(body) - len(template.tail)])),))
        except (msgspec.MsgspecError, struct.error, OverflowError, RecursionError):
            return None  # the general way tells what is wrong: no list of numbers, too many, too large

    def learn(self, body: bytes, request: Request) -> None:
        """Remember a body that was read in the general way, where only its data can differ the next time."""
        if request.id or len(body) > 64 * _LONGEST or any(wish.classification for wish in request.outputs):
            return
        if any(array.dtype.char not in _CODES or not array.size for array in request.inputs.values()):
            return
        layout = layout_of(request.inputs)
        kept = msgspec.structs.replace(request, inputs={})
        found = self._binary(body, kept, layout) if self._length is not None else _text(body, kept, layout)
        if found is not None and len(found[0]) + len(found[1].tail) <= _LONGEST:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[found[0]] = found[1]

    def _binary(self, body: bytes, request: Request, layout: RawLayout) -> tuple[bytes, _Template] | None:
        """All data follow the JSON, in the order of the inputs."""
        end = self._length or 0
        cuts = []
        for size in layout.sizes:
            cuts.append((end, end + size))
            end += size
        if end != len(body):
            return None  # some are in the JSON
        return body[: self._length], _Template(request, layout, cuts=tuple(cuts), size=end)


def _text(body: bytes, request: Request, layout: RawLayout) -> tuple[bytes, _Template] | None:
    """One input, whose data are a flat list of numbers. What is taken for it is tried with other data first."""
    start = body.find(_MARK) + len(_MARK)
    data = reread(body)
    if start < len(_MARK) or data is None or len(layout.names) != 1:
        return None
    begin = body.find(data, start)
    tail = body[begin + len(data) :]
    if body[start:begin].strip() or any(reread(body[:start] + other + tail) != other for other in (b"[7]", b"[8]")):
        return None
    dtype = layout.dtypes[0]
    packer = struct.Struct(f"<{layout.sizes[0] // dtype.itemsize}{_CODES[dtype.char]}")
    return body[:start], _Template(request, layout, tail, _FLOATS if dtype.kind == "f" else _WHOLE, packer.pack)
