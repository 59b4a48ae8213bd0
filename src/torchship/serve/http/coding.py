"""gzip and deflate, both ways, with a limit on what a small body may grow to."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from torchship.serve.http.exchange import Exchange, Headers, HttpFault, spawn
from torchship.serve.http.site import Cors, Site
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
            with suppress(zlib.error):
                return _inflate(data, wbits=-zlib.MAX_WBITS, limit=limit)
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


def dress(
    exchange: Exchange, body: bytes, headers: Headers, *, cors: Cors | None, then: Callable[[bytes, Headers], None]
) -> None:
    """Call `then` with the body and the headers as the caller takes them: compressed where it is large and that is
    asked for (a very large one sooner or later, by a thread, unless the caller has left meanwhile), and with CORS."""
    if cors is not None:
        headers = (*headers, *cors.headers(exchange.head))
    coding = ""
    if len(body) >= COMPRESS_FROM and not exchange.plain:
        coding = acceptable(exchange.head.headers.get("accept-encoding", ""))
    if not coding:
        then(body, headers)
        return
    headers = (*headers, ("content-encoding", coding), ("vary", "accept-encoding"))
    if len(body) < OFF_LOOP_FROM:
        then(compress(body, coding=coding), headers)
        return

    def packed(done: asyncio.Future[bytes]) -> None:
        if not exchange.gone:
            then(done.result(), headers)

    work = asyncio.get_running_loop().run_in_executor(None, lambda: compress(body, coding=coding))
    work.add_done_callback(packed)


def enter(exchange: Exchange, site: Site) -> None:
    """A request is complete: hand it to its endpoint, if its caller may ask; what that raises is the answer."""
    head = exchange.head
    try:
        if site.admit is not None:
            site.admit(head.scope, head.headers)
        if head.encoding and exchange.body:
            _unpack(exchange, site.limits.max_body)
        else:
            head.endpoint(exchange)
    except Exception as fault:
        exchange.fail(fault)


def _unpack(exchange: Exchange, limit: int) -> None:
    """Hand on a request with its body decompressed: a large one by a thread. Raises HttpFault."""
    if len(exchange.body) < INFLATE_OFF_LOOP_FROM:
        exchange.body = decompress(exchange.body, coding=exchange.head.encoding, limit=limit)
        exchange.head.endpoint(exchange)
    else:
        spawn(exchange, _enter_later, exchange, limit)


async def _enter_later(exchange: Exchange, limit: int) -> None:
    work = partial(decompress, exchange.body, coding=exchange.head.encoding, limit=limit)
    exchange.body, exchange.job = await asyncio.to_thread(work), None
    if not exchange.gone:
        exchange.head.endpoint(exchange)
