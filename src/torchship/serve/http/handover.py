"""What a receiving process and the host say to each other: one list of events a message, in both directions.

A receiver runs the connections (`serve.http.receiver`), the host runs the endpoints (`serve.http.pool`). An exchange or
a call has the number that the receiver gave it; a body lies in the message, or in memory that both share.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from torchship.serve.http.exchange import Headers
from torchship.serve.http.site import ConnectionLimits

HEADS = 4096  # of the last heads the host knows by their number
AHEAD = 16  # messages of a stream, in either direction, that the other side has not taken yet


class ReceiverSite(msgspec.Struct, frozen=True):
    """What a receiver needs to know of a site: `rpcs` are its gRPC methods, and whether the client streams."""

    grpc_only: bool
    limits: ConnectionLimits
    origins: tuple[str, ...]
    rpcs: dict[str, bool]


class Span(msgspec.Struct, array_like=True, frozen=True):
    """A body in shared memory: the receiver's, or, at -1, in that which comes with the message."""

    offset: int
    size: int


class NewHead(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Receiver to host: a head that was not there before, or not among the last; `call`: its requests are gRPC."""

    number: int
    site: int
    call: bool
    method: str
    path: str
    query: str
    headers: dict[str, str]
    timeout: float


class Asked(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Receiver to host: a request is complete, or a call begins whose messages follow."""

    number: int
    head: int
    body: bytes | Span = b""


class Said(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Receiver to host: one of the messages of a call, behind its prefix."""

    number: int
    body: bytes | Span


class SaidAll(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Receiver to host: the client will say no more."""

    number: int


class Left(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """Receiver to host: the caller went away."""

    number: int


class Taken(msgspec.Struct, array_like=True, frozen=True, tag=6):
    """Either way: so many messages of a stream have been taken."""

    number: int
    count: int = 1


class Beat(msgspec.Struct, array_like=True, frozen=True, tag=7):
    """Receiver to host, once a second and at first: I am here."""


class HungUp(msgspec.Struct, array_like=True, frozen=True, tag=8):
    """Receiver to host: a connection has ended."""


class SiteClosed(msgspec.Struct, array_like=True, frozen=True, tag=9):
    """Receiver to host: all connections of a site have ended."""

    site: int


class Serve(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Host to receiver: there is one more site."""

    site: ReceiverSite


class Connect(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Host to receiver: serve the connection whose descriptor comes along."""

    site: int


class Answered(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Host to receiver: the whole answer of an exchange."""

    number: int
    status: int
    body: bytes
    content_type: str
    headers: Headers
    plain: bool


class Replied(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Host to receiver: the only answer of a call."""

    number: int
    data: bytes


class Began(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """Host to receiver: the head of an answer that is streamed."""

    number: int
    status: int
    content_type: str
    headers: Headers


class Wrote(msgspec.Struct, array_like=True, frozen=True, tag=7):
    """Host to receiver: some of a streamed answer, or one of several answers of a call."""

    number: int
    data: bytes


class Ended(msgspec.Struct, array_like=True, frozen=True, tag=8):
    """Host to receiver: the end of a streamed answer, or of a call with these trailers."""

    number: int
    fields: bytes = b""


class Freed(msgspec.Struct, array_like=True, frozen=True, tag=9):
    """Host to receiver: nobody looks any more at the bodies at these offsets."""

    offsets: list[int]


class DrainSite(msgspec.Struct, array_like=True, frozen=True, tag=10):
    """Host to receiver: let callers come back by new connections."""

    site: int


class CloseSite(msgspec.Struct, array_like=True, frozen=True, tag=11):
    """Host to receiver: answer what is due for at most `grace` seconds, then hang up."""

    site: int
    grace: float


FromReceiver: TypeAlias = NewHead | Asked | Said | SaidAll | Left | Taken | Beat | HungUp | SiteClosed
FromHost: TypeAlias = (
    Serve | Connect | Answered | Replied | Began | Taken | Wrote | Ended | Freed | DrainSite | CloseSite
)

decode_from_receiver = msgspec.msgpack.Decoder(list[FromReceiver]).decode
decode_from_host = msgspec.msgpack.Decoder(list[FromHost]).decode
