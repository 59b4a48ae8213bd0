"""gzip and deflate, both ways, with a limit on what a small body may grow to."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping

from torchship.serve.http.exchange import Exchange, Headers, HttpFault
from torchship.wire.raw import Buffer

CODINGS = ("gzip", "deflate")
COMPRESS_FROM = 1 << 14  # bytes; less is sent as fast as it is packed
OFF_LOOP_FROM = 1 << 16  # compressing more than this would hold up everybody else
INFLATE_OFF_LOOP_FROM = 1 << 12  # so would unpacking this, which may become a thousand times as large


def decompress(data: Buffer, *, coding: str, limit: int) -> bytes:
    """Undo `Content-Encoding`. Raises HttpFault 415 for another coding, 413 above `limit` bytes, 400 for bad data."""
    if coding == "identity":
        return bytes(data)
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise HttpFault(415, f"Content-Encoding {coding[:40]!r} is not understood", hint="use gzip or deflate")
    try:
        return _inflate(data, wbits=47 if coding != "deflate" else zlib.MAX_WBITS, limit=limit)
    except zlib.error as fault:
        if coding == "deflate":  # some clients mean deflate without the zlib header
            try:
                return _inflate(data, wbits=-zlib.MAX_WBITS, limit=limit)
            except zlib.error:
                pass
        raise HttpFault(400, f"the body is not {coding}: {fault}") from None


def _inflate(data: Buffer, *, wbits: int, limit: int) -> bytes:
    machine = zlib.decompressobj(wbits)
    plain = machine.decompress(data, limit + 1)
    if len(plain) > limit:
        raise HttpFault(413, f"the body is larger than {limit} bytes when unpacked")
    if not machine.eof:
        raise HttpFault(400, "the compressed body ends too early")
    if machine.unused_data:
        raise HttpFault(400, "there are bytes after the compressed body")
    return plain


def compress(data: bytes, *, coding: str) -> bytes:
    """`data` with the `Content-Encoding` gzip or deflate, at the fastest level."""
    machine = zlib.compressobj(1, zlib.DEFLATED, 31 if coding == "gzip" else zlib.MAX_WBITS)
    return machine.compress(data) + machine.flush()


def acceptable(header: str) -> str:
    """The coding to use for an `Accept-Encoding` header (RFC 9110 section 12.5.3): gzip, deflate, or "" for none."""
    wishes: dict[str, float] = {}
    for item in header.lower().split(","):
        name, _, parameter = item.strip().partition(";")
        try:
            wishes[name.strip()] = float(parameter.strip().removeprefix("q=")) if parameter else 1.0
        except ValueError:
            continue
    named = [(wishes[name], -place, name) for place, name in enumerate(CODINGS) if wishes.get(name, 0) > 0]
    return max(named)[2] if named else ""


def offer(headers: Mapping[str, str]) -> tuple[str, Headers]:
    """The coding for an answer to a request with these headers ("" for none), and the headers that tell it."""
    coding = acceptable(headers.get("accept-encoding", ""))
    return coding, (("content-encoding", coding), ("vary", "accept-encoding")) if coding else ()


def pack(body: bytes, *, coding: str, then: Callable[[bytes], None]) -> None:
    """Call `then` with the compressed body: at once, or for a large one when a thread has done it."""
    if len(body) < OFF_LOOP_FROM:
        then(compress(body, coding=coding))
        return
    work = asyncio.get_running_loop().run_in_executor(None, lambda: compress(body, coding=coding))
    work.add_done_callback(lambda done: then(done.result()))


def packs(exchange: Exchange, body: bytes, *, then: Callable[[bytes, Headers], None]) -> bool:
    """Whether the caller takes this body compressed: then `then` gets it so, sooner or later, and the headers that
    tell it, unless the caller has left meanwhile."""
    coding, told = ("", ()) if exchange.plain else offer(exchange.head.headers)
    if not coding:
        return False

    def packed(data: bytes) -> None:
        if not exchange.gone:
            then(data, told)

    pack(body, coding=coding, then=packed)
    return True


def unpack(
    data: Buffer, *, coding: str, limit: int, then: Callable[[bytes], object], fail: Callable[[Exception], object]
) -> asyncio.Future[bytes] | None:
    """Call `then` with the plain body, or `fail`: at once, or for a large one when a thread has done it.

    What waits for the thread is returned and may be cancelled: then neither is called.
    """
    if len(data) < INFLATE_OFF_LOOP_FROM:
        try:
            then(decompress(data, coding=coding, limit=limit))
        except Exception as fault:
            fail(fault)
        return None

    def unpacked(done: asyncio.Future[bytes]) -> None:
        try:
            if not done.cancelled():
                then(done.result())
        except Exception as fault:
            fail(fault)

    work = asyncio.get_running_loop().run_in_executor(None, lambda: decompress(data, coding=coding, limit=limit))
    work.add_done_callback(unpacked)
    return work


def enter(exchange: Exchange, *, limit: int) -> None:
    """Decompress the body of a request, then hand it to its endpoint."""

    def then(data: bytes) -> None:
        exchange.body, exchange.job = data, None
        if not exchange.gone:
            exchange.head.endpoint(exchange)

    work = unpack(exchange.body, coding=exchange.head.encoding, limit=limit, then=then, fail=exchange.fail)
    if work is not None:
        exchange.job = work
