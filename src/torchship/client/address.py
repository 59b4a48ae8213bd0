"""Where a server is: http, https, grpc or grpcs, host and port."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from torchship.errors import BadConfig

_PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """A parsed URL; `model` is the first part of its path, if it has one."""

    scheme: str
    host: str
    port: int
    model: str = ""

    @property
    def secure(self) -> bool:
        """Whether it speaks TLS."""
        return self.scheme in ("https", "grpcs")

    @property
    def grpc(self) -> bool:
        """Whether it speaks gRPC."""
        return self.scheme in ("grpc", "grpcs")


def parse(url: str) -> Address:
    """Read `grpc://host:8001/model`; without a scheme it is http. Raises BadConfig for what is no URL."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as fault:
        raise BadConfig(f"{url!r} is not a URL: {fault}") from None
    if parts.scheme not in _PORTS or not parts.hostname:
        raise BadConfig(f"{url!r} is not a URL of a server", hint="write http://host:8000 or grpc://host:8001")
    path = parts.path.strip("/").removeprefix("v2/models/")
    return Address(parts.scheme, parts.hostname, port or _PORTS[parts.scheme], path.split("/")[0])
