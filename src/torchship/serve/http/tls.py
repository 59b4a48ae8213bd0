"""TLS for a listener: a certificate, and client certificates where they are asked for."""

from __future__ import annotations

import ssl
from pathlib import Path

from torchship.errors import BadConfig


def tls_context(certificate: Path | str, *, key: Path | str, clients: Path | str = "") -> ssl.SSLContext:
    """A context that offers HTTP/2 and HTTP/1.1, TLS 1.2 or newer.

    `clients` is a file of certificate authorities: then only callers with a certificate of theirs get in (mTLS).
    Raises BadConfig naming the file that cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as fault:
        raise BadConfig(
            f"tls: cannot use {certificate} with {key}: {fault}", hint="PEM files that belong together"
        ) from None
    if clients:
        try:
            context.load_verify_locations(clients)
        except (OSError, ssl.SSLError) as fault:
            raise BadConfig(f"tls: cannot use {clients}: {fault}", hint="a PEM file of certificates") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context
