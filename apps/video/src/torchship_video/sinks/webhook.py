"""Webhook: events posted as JSON, kept in a spool on disk until the other side has taken them.

A delivery is on the disk before it is tried: neither a kill -9 nor a receiver that is down for hours loses it. With a
`secret` each is signed: `X-Torchship-Signature: t=SECONDS,v1=HEX`, HEX the HMAC-SHA256 of `SECONDS.BODY`. A delivery
keeps its `X-Torchship-Delivery` over all tries: a receiver that saw it already may ignore it.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import os
import ssl
import time
from base64 import b64encode
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec
import numpy as np
from numpy.typing import NDArray

from torchship.errors import BadConfig
from torchship.home import folder
from torchship_video.messages import Observation
from torchship_video.sinks import Opening, record
from torchship_video.sinks.spool import Attempt, Spool

PIXELS, AGAIN = False, True


class WebhookOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`url` is posted to; `secret` signs, and `env:NAME` takes it from the environment.

    Observations with events are sent, with `every` all. `spool` is the folder of what waits, by default one for the
    URL below TORCHSHIP_SPOOL or ~/.local/state/torchship/spool; it holds `spool_mb`, then the oldest are dropped. A
    try takes `timeout` seconds at most.
    """

    url: str
    secret: str = ""
    every: bool = False
    headers: dict[str, str] = {}
    timeout: float = 10.0
    spool: str = ""
    spool_mb: float = 64.0

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise BadConfig("sink webhook: url is no http or https URL", hint='url = "https://host/path"')
        if self.secret.startswith("env:") and not os.environ.get(self.secret[4:]):
            raise BadConfig(f"sink webhook: secret: the environment has no {self.secret[4:]!r}", hint="export it")
        if not 0 < self.timeout <= 300 or not self.spool_mb > 0:
            raise BadConfig("sink webhook: timeout is above 0 and at most 300 s, spool_mb above 0")
        if any(character in text for pair in self.headers.items() for text in pair for character in "\r\n"):
            raise BadConfig("sink webhook: headers have a line break", hint="one line each")


class Webhook:
    """Puts observations into a spool, whose thread posts them."""

    def __init__(self, options: WebhookOptions, _opening: Opening) -> None:
        self._every = options.every
        place = Path(options.spool).expanduser() if options.spool else _default_folder(options.url)
        self._spool = Spool(place, Post(options), limit=int(options.spool_mb * 2**20))

    def write(self, observation: Observation, _pixels: NDArray[np.uint8] | None) -> None:
        """Spool one observation, if something happened in it."""
        if observation.events or self._every:
            self._spool.put(msgspec.json.encode(record(observation)))

    def facts(self) -> dict[str, int]:
        """What the spool has done."""
        return self._spool.counts()

    def close(self) -> None:
        """Try what waits once more; what is not taken stays on disk."""
        self._spool.close()


class Post:
    """Makes one try of a delivery; raises OSError where the receiver cannot be reached."""

    def __init__(self, options: WebhookOptions) -> None:
        self._options, self._url = options, urlsplit(options.url)
        secret = os.environ[options.secret[4:]] if options.secret.startswith("env:") else options.secret
        self._secret = secret.encode()

    def __call__(self, name: str, body: bytes) -> Attempt:
        """One try."""
        headers = {"content-type": "application/json", "user-agent": "torchship", "x-torchship-delivery": name}
        if self._secret:
            headers["x-torchship-signature"] = signature(self._secret, body, at=int(time.time()))
        if self._url.username:
            pair = f"{unquote(self._url.username)}:{unquote(self._url.password or '')}"
            headers["authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        target = (self._url.path or "/") + (f"?{self._url.query}" if self._url.query else "")
        connection = self._connection()
        try:
            connection.request("POST", target, body, headers | self._options.headers)
            answer = connection.getresponse()
            answer.read(1 << 16)
        except http.client.HTTPException as fault:
            raise ConnectionError(f"no HTTP answer: {fault!r}") from None
        finally:
            connection.close()
        if 200 <= answer.status < 300:
            return Attempt("delivered")
        if answer.status in (408, 425, 429) or answer.status >= 500:
            wait = answer.getheader("retry-after", "")
            return Attempt("again", f"the receiver answers {answer.status}", float(wait) if wait.isdigit() else 0.0)
        return Attempt("refused", f"the receiver answers {answer.status}")

    def _connection(self) -> http.client.HTTPConnection:
        host, port, timeout = self._url.hostname or "", self._url.port, self._options.timeout
        if self._url.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=timeout)


def signature(secret: bytes, body: bytes, *, at: int) -> str:
    """The header by which a receiver knows that a body is ours and not an old one."""
    return f"t={at},v1={hmac.new(secret, b'%d.%s' % (at, body), hashlib.sha256).hexdigest()}"


def _default_folder(url: str) -> Path:
    return (
        folder("TORCHSHIP_SPOOL", ".local", "state", "torchship", "spool")
        / hashlib.sha256(url.encode()).hexdigest()[:16]
    )


OPTIONS, SINK = WebhookOptions, Webhook
