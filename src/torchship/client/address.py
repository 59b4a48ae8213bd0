"""Where a server is, which model on it, and whom to believe there: URLs and TLS for the caller's side."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from torchship.errors import BadConfig

_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}
_PATH = re.compile(r"((/v2/models)?/(?P<model>[A-Za-z][\w.-]*)(/(versions/)?(?P<version>\w[\w.-]*))?)?/?")


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL; `model` and `version` are what its path names, if it has one."""

    scheme: str
    host: str
    port: int
    model: str = ""
    version: str = ""

    @property
    def secure(self) -> bool:
        """Whether it speaks TLS."""
        return self.scheme in ("https", "grpcs")

    @property
    def grpc(self) -> bool:
        """Whether it speaks gRPC."""
        return self.scheme in ("grpc", "grpcs")

    @property
    def netloc(self) -> str:
        """Host and port as a URL has them: brackets around an IPv6 address (RFC 3986 section 3.2.2)."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def server(self) -> str:
        """The URL without its path."""
        return f"{self.scheme}://{self.netloc}"


def parse(url: str) -> Address:
    """Read `grpc://host:8001/model`, `http://host:8000/v2/models/model/versions/1` ...; without a scheme it is http.

    Raises BadConfig for what is no URL of a server or of a model on it.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as fault:
        raise BadConfig(f"{url!r} is not a URL: {fault}") from None
    found = _PATH.fullmatch(parts.path)
    if parts.scheme not in _PORTS or not parts.hostname or not found or parts.query or parts.fragment or parts.username:
        hint = "write http://host:8000, grpc://host:8001 or http://host:8000/v2/models/name"
        raise BadConfig(f"{url!r} is not a URL of a server", hint=hint)
    port = port or _PORTS[parts.scheme]
    return Address(parts.scheme, parts.hostname, port, found["model"] or "", found["version"] or "")


class CallerContext(ssl.SSLContext):
    """A context that also keeps its files, for gRPC's library reads them itself: authority, key and certificate."""

    papers: tuple[bytes | None, bytes | None, bytes | None] = (None, None, None)


def caller_context(*, authority: Path | str = "", certificate: Path | str = "", key: Path | str = "") -> CallerContext:
    """A context that believes the certificates of `authority` (PEM; empty: those of the system).

    `certificate` and `key` are the caller's own, where the server asks for one. Raises BadConfig for a file that
    cannot be used.
    """
    context = CallerContext(ssl.PROTOCOL_TLS_CLIENT)
    roots = str(authority) or ssl.get_default_verify_paths().cafile
    try:
        if authority:
            context.load_verify_locations(authority)
        else:
            context.load_default_certs()
        if certificate:
            context.load_cert_chain(certificate, key or None)
        files = (roots, str(key or certificate), str(certificate))
        context.papers = tuple([Path(file).read_bytes() if file else None for file in files])  # type: ignore[assignment]
    except (OSError, ssl.SSLError) as fault:
        named = ", ".join(str(one) for one in (authority, certificate, key) if str(one))
        raise BadConfig(f"tls: cannot use {named}: {fault}", hint="PEM files that belong together") from None
    return context
