"""Request line and headers of HTTP/1.1 to a Head: llhttp reads them, and what it lets pass is checked for framing."""

from __future__ import annotations

import re

import httptools

from torchship.serve.http.exchange import Head, HttpFault

_DIGITS = re.compile(r"[0-9]{1,15}")


class _Found:
    """What llhttp reports."""

    __slots__ = ("complete", "extra", "headers", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False
        self.extra = False

    def on_url(self, url: bytes) -> None:
        self.url += url
        self.extra = self.extra or self.complete

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))
        self.extra = self.extra or self.complete

    def on_headers_complete(self) -> None:
        self.complete = True

    def on_body(self, data: bytes) -> None:
        self.extra = True


def parse_head(data: bytes) -> Head:
    """Read a head that ends in an empty line. Raises HttpFault: 400 for what is not HTTP/1, 501 or 505 else."""
    found = _Found()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # an offer to talk something else: we go on in HTTP/1.1
    except (httptools.HttpParserError, UnicodeError) as fault:
        raise HttpFault(400, f"not HTTP/1.1: {fault}") from None
    if not found.complete or found.extra:
        raise HttpFault(400, "not one request head")
    method = parser.get_method().decode()
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise HttpFault(505, f"HTTP version {version} is not spoken here")
    try:
        url = httptools.parse_url(found.url)
        path, query = url.path.decode("ascii"), (url.query or b"").decode("ascii")
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError, AttributeError):
        raise HttpFault(400, "the request target is not a path") from None
    headers: dict[str, str] = {}
    lengths: set[str] = set()
    for raw_name, raw_value in found.headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        if name == "content-length":
            lengths.add(value)
        elif name in ("host", "transfer-encoding", "authorization") and name in headers:
            raise HttpFault(400, f"the header {name} is given twice")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    head = Head(method, path, query, headers)
    head.old = version == "1.0"
    _frame(head, lengths)
    head.keep_alive = _asks_to_stay(head)
    return head


def _frame(head: Head, lengths: set[str]) -> None:
    """How long the body is. Two ways to say it are one too many (RFC 9112 section 6.3)."""
    headers = head.headers
    if not head.old and "host" not in headers:
        raise HttpFault(400, "the header Host is missing")
    if "transfer-encoding" in headers:
        if lengths or head.old:
            raise HttpFault(400, "Transfer-Encoding beside Content-Length or in HTTP/1.0")
        if headers["transfer-encoding"].strip().lower() != "chunked":
            raise HttpFault(501, "only the transfer coding chunked is understood")
        head.length = -1
    elif lengths:
        if len(lengths) > 1 or not _DIGITS.fullmatch(next(iter(lengths))):
            raise HttpFault(400, "Content-Length is not one number")
        head.length = int(lengths.pop())
    expect = headers.get("expect", "")
    if expect and expect.lower() != "100-continue":
        raise HttpFault(417, "only the expectation 100-continue is understood")
    head.expects = bool(expect) and not head.old
    head.encoding = headers.get("content-encoding", "").strip().lower()


def _asks_to_stay(head: Head) -> bool:
    """llhttp cannot say keep-alive before the body has come; the Connection header and the version can."""
    wish = head.headers.get("connection", "").lower()
    return "keep-alive" in wish if head.old else "close" not in wish
