"""Header blocks of HTTP/2 to Heads; blocks of a steady client are decoded once and then known by their bytes."""

from __future__ import annotations

import re

import hpack

from torchship.serve.http.exchange import Head
from torchship.wire.frames import COMPRESSION_ERROR, ENHANCE_YOUR_CALM, ConnectionFault, read_integer

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_HOP_BY_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNITS = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class WrongHead(Exception):
    """The fields of one stream do not make a request: PROTOCOL_ERROR for that stream."""


class Fields:
    """Decodes the header blocks of one connection, in order.

    A block that only looks things up in the table, and does not change it, means the same as long as no other block
    changes the table: such blocks are cached by their bytes until then.
    """

    def __init__(self, *, limit: int) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=limit)
        self._decoder.max_allowed_table_size = 4096
        self._known: dict[bytes, Head | None] = {}

    def lookup(self, block: bytes) -> Head | None:
        """The head of a block that is known, or None."""
        return self._known.get(block)

    def decode(self, block: bytes) -> list[tuple[bytes, bytes]]:
        """The fields of a block. Raises ConnectionFault: the table is lost after a block that cannot be read."""
        try:
            fields = self._decoder.decode(block, raw=True)
        except hpack.OversizedHeaderListError:
            raise ConnectionFault(ENHANCE_YOUR_CALM, "the header list is too large") from None
        except (hpack.HPACKError, ValueError, IndexError):
            raise ConnectionFault(COMPRESSION_ERROR, "the header block cannot be read") from None
        return [(bytes(name), bytes(value)) for name, value in fields]

    def remember(self, block: bytes, head: Head) -> None:
        """Keep the head of a block that left the table as it was; forget all where it did not."""
        if changes_table(block):
            self._known.clear()
        elif len(block) <= 512:
            if len(self._known) >= 64:
                self._known.clear()
            self._known[block] = head

    def forget(self, block: bytes) -> None:
        """A block that was decoded for its effect on the table only."""
        if changes_table(block):
            self._known.clear()


def changes_table(block: bytes) -> bool:
    """Whether any representation in a valid block adds to the dynamic table or resizes it."""
    place, size = 0, len(block)
    while place < size:
        first = block[place]
        if first & 0x80:
            _, place = read_integer(block, place)
        elif first & 0x40 or first & 0x20:
            return True
        else:
            index, place = read_integer(block, place, bits=4)
            for _ in range(1 if index else 2):
                length, place = read_integer(block, place)
                place += length
    return False


def head_of(fields: list[tuple[bytes, bytes]]) -> Head:
    """The Head of a request. Raises WrongHead for what RFC 9113 section 8.2 and 8.3 call malformed."""
    pseudo: dict[bytes, bytes] = {}
    headers: dict[str, str] = {}
    for name, value in fields:
        if name[:1] == b":":
            if headers or name in pseudo or name not in (b":method", b":scheme", b":path", b":authority"):
                raise WrongHead
            pseudo[name] = value
            continue
        if not _NAME.fullmatch(name) or not _VALUE.fullmatch(value) or name in _HOP_BY_HOP:
            raise WrongHead
        if name == b"te" and value != b"trailers":
            raise WrongHead
        key, text = name.decode(), value.decode("latin-1")
        if key in headers:
            if key in ("content-length", "host", "authorization"):
                raise WrongHead
            text = headers[key] + ("; " if key == "cookie" else ", ") + text
        headers[key] = text
    path = pseudo.get(b":path", b"")
    if not pseudo.get(b":method") or b":scheme" not in pseudo or path[:1] != b"/":
        raise WrongHead
    target, _, query = path.decode("latin-1").partition("?")
    headers.setdefault("host", pseudo.get(b":authority", b"").decode("latin-1"))
    head = Head(pseudo[b":method"].decode("latin-1"), target.partition("#")[0], query, headers)
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or len(length) > 15:
        raise WrongHead
    head.length = int(length) if "content-length" in headers else -1
    head.encoding = headers.get("content-encoding", "").strip().lower()
    head.timeout = timeout_of(headers.get("grpc-timeout", ""))
    return head


def timeout_of(text: str) -> float:
    """`grpc-timeout` in seconds; 0 for none."""
    found = _TIMEOUT.fullmatch(text)
    return max(int(found[1]) * _UNITS[found[2]], 1e-9) if found else 0.0


def check_trailers(fields: list[tuple[bytes, bytes]]) -> None:
    """Raises WrongHead for trailers that no request may have."""
    for name, value in fields:
        if name[:1] == b":" or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise WrongHead
