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


class BodySpan(msgspec.Struct, array_like=True, frozen=True):
    """A body in shared memory: the receiver's, or, at -1, in that which comes with the message."""

    offset: int
    size: int


class NewHead(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """To the host: a head that was not there before, or not among the last; `call`: its requests are gRPC."""

    number: int
    site: int
    call: bool
    method: str
    path: str
    query: str
    headers: dict[str, str]
    timeout: float


class NewRequest(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """To the host: a request is complete, or a call begins whose messages follow."""

    number: int
    head: int
    body: bytes | BodySpan


class Said(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """To the host: one of the messages of a call, behind its prefix; None after the last."""

    number: int
    body: bytes | BodySpan | None = None


class Left(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """To the host: the caller went away."""

    number: int


class HungUp(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """To the host: a connection has ended, or all those of a site that should be closed."""

    site: int = -1


class Beat(msgspec.Struct, array_like=True, frozen=True, tag=6):
    """To the host, at first and then once a second: I am here."""


class MessageTaken(msgspec.Struct, array_like=True, frozen=True, tag=7):
    """Either way: one more message of a stream has been taken."""

    number: int


class Serve(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """To a receiver: there is one more site."""

    site: ReceiverSite


class Connect(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """To a receiver: run the connection whose descriptor comes along."""

    site: int


class Retire(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """To a receiver: let callers come back by new connections; with `grace`, hang up after so many seconds."""

    site: int
    grace: float | None = None


class Answered(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """To a receiver: the whole answer of an exchange, or of a call (which has no status of HTTP)."""

    number: int
    body: bytes
    status: int = 0
    content_type: str = ""
    headers: Headers = ()
    plain: bool = False


class Began(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """To a receiver: the head of an answer that is streamed."""

    number: int
    status: int
    content_type: str
    headers: Headers


class Wrote(msgspec.Struct, array_like=True, frozen=True, tag=6):
    """To a receiver: some of a streamed answer, or one of several answers of a call."""

    number: int
    data: bytes


class Ended(msgspec.Struct, array_like=True, frozen=True, tag=8):
    """To a receiver: the end of a streamed answer, or of a call with these trailers."""

    number: int
    fields: bytes = b""


class Freed(msgspec.Struct, array_like=True, frozen=True, tag=9):
    """To a receiver: nobody looks any more at the bodies at these offsets."""

    offsets: list[int]


FromReceiver: TypeAlias = NewHead | NewRequest | Said | Left | HungUp | Beat | MessageTaken
FromHost: TypeAlias = Serve | Connect | Retire | Answered | Began | Wrote | Ended | Freed | MessageTaken

decode_from_receiver = msgspec.msgpack.Decoder(list[FromReceiver]).decode
decode_from_host = msgspec.msgpack.Decoder(list[FromHost]).decode
