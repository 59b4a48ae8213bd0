"""TLS for the caller's side: whom to believe, and what to show of oneself."""

from __future__ import annotations

import ssl
from pathlib import Path

from torchship.errors import BadConfig


def caller_context(*, authority: Path | str = "", certificate: Path | str = "", key: Path | str = "") -> ssl.SSLContext:
    """A context that believes the certificates of `authority` (PEM; empty: those of the system).

    `certificate` and `key` are the caller's own, where the server asks for one. Raises BadConfig for a file that
    cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=str(authority) or None)
        if certificate:
            context.load_cert_chain(certificate, key or None)
    except (OSError, ssl.SSLError) as fault:
        files = ", ".join(str(one) for one in (authority, certificate, key) if str(one))
        raise BadConfig(f"tls: cannot use {files}: {fault}", hint="PEM files that belong together") from None
    return context
