"""Brings an artifact from elsewhere to this machine: a folder, an archive, or an https URL of one."""

from __future__ import annotations

import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torchship import home
from torchship.artifact import archive
from torchship.artifact.opening import Artifact, open_artifact
from torchship.errors import BadConfig, Unavailable, UnsafeArtifact

_MAX_BYTES = 8 * 2**30
_SILENT_S = 30.0


class _OnlyHttps(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only: the new URL is the last argument."""

    def redirect_request(self, req: urllib.request.Request, *rest: Any) -> urllib.request.Request | None:
        if urlsplit(rest[-1]).scheme != "https":
            raise UnsafeArtifact(f"{req.full_url} leads to {rest[-1]}, which is no https", hint="ask for the right URL")
        return super().redirect_request(req, *rest)


@contextmanager
def pulled(source: str) -> Iterator[Artifact]:
    """The verified artifact of a folder, an archive as `store export` writes it, or an https URL of such an archive.

    What was downloaded or unpacked is gone at the end of the `with` block.
    Raises NotFound, BadConfig, CorruptArtifact, UnsafeArtifact, Unavailable where the server does not answer.
    """
    if "://" not in source:
        path = home.expand(source)
        if path.is_dir():
            yield open_artifact(path)
        else:
            with archive.extracted(path) as artifact:
                yield artifact
        return
    parts = urlsplit(source)
    if parts.scheme != "https":
        raise BadConfig(f"{source}: only https is asked", hint="an https:// URL, a folder, or an archive")
    with tempfile.TemporaryDirectory(prefix="torchship-pull-") as place:
        file = Path(place) / (Path(parts.path).name or "artifact")
        _download(source, file)
        with archive.extracted(file) as artifact:
            yield artifact


def _download(url: str, file: Path) -> None:
    left = _MAX_BYTES
    try:
        with urllib.request.build_opener(_OnlyHttps).open(url, timeout=_SILENT_S) as answer, open(file, "xb") as taken:
            declared = answer.headers.get("Content-Length")
            while block := answer.read(2**20):
                left -= len(block)
                if left < 0:
                    raise UnsafeArtifact(f"{url} sends more than {_MAX_BYTES} bytes", hint="do not open it")
                taken.write(block)
        if declared and int(declared) != _MAX_BYTES - left:
            raise Unavailable(f"{url} broke off after {_MAX_BYTES - left} of {declared} bytes", hint="try again")
    except (OSError, HTTPException, ValueError) as fault:
        raise Unavailable(f"{url} cannot be pulled: {fault}", hint="try again when the network is there") from None
