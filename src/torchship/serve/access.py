"""Who may do what: tokens by scope, and where a server without them may listen."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Mapping, Sequence

from torchship.errors import BadConfig, Denied, Unauthenticated
from torchship.serve.config import ServerConfig, Token
from torchship.serve.http.exchange import Admit

_REMEMBERED = 256


def new_token() -> tuple[str, str]:
    """A token of 256 random bits for the caller, and its hash for the configuration."""
    token = secrets.token_urlsafe(32)
    return token, hash_of(token)


def hash_of(token: str) -> str:
    """The hash under which a token is stored. Tokens are random, so no salt and no slow hash is needed."""
    return f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def gate(tokens: Sequence[Token]) -> Admit | None:
    """A check of scope and headers for the protocols; None when there are no tokens.

    It raises Unauthenticated without a valid token, Denied for one that lacks the scope.

    Health and metadata (no scope) are open to everybody who can connect.
    """
    if not tokens:
        return None
    seen: dict[str, set[str]] = {}

    def admit(scope: str, headers: Mapping[str, str]) -> None:
        if not scope:
            return
        header = headers.get("authorization", "")
        scopes = seen.get(header)
        if scopes is None:
            kind, _, given = header.partition(" ")
            digest = hash_of(given.strip())  # every stored hash is compared, each in constant time
            good = [token for token in tokens if hmac.compare_digest(token.hash, digest)]
            scopes = {scope for token in good for scope in token.scopes} if kind.lower() == "bearer" else set()
            if scopes:
                if len(seen) >= _REMEMBERED:
                    seen.clear()
                seen[header] = scopes
        if not scopes:
            raise Unauthenticated("a valid token is needed", hint="send Authorization: Bearer TOKEN")
        if scope not in scopes:
            raise Denied(f"this token does not allow {scope!r}", hint="give it the scope in the configuration")

    return admit


def check_places(config: ServerConfig) -> None:
    """Raise BadConfig when the server would be reachable from elsewhere without tokens or client certificates.

    An empty address stands for every one of this machine.
    """
    guarded = bool(config.token) or (config.tls is not None and bool(config.tls.clients))
    places = {"http": config.http.host, "grpc": (config.grpc.host if config.grpc else "") or config.http.host}
    for name, host in places.items():
        if not guarded and not is_loopback(host):
            raise BadConfig(
                f"$.{name}.host: {host!r} can be reached from elsewhere, and nothing is asked of callers",
                hint="add a [[token]] (torchship serve --new-token) or [tls] clients, or listen on 127.0.0.1",
            )


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
