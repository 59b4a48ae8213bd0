"""The one table from an error of the tree to its HTTP status and its gRPC code."""

from __future__ import annotations

from typing import NamedTuple

from torchship import errors


class Status(NamedTuple):
    """The HTTP status and the gRPC code of one kind of failure."""

    http: int
    grpc: int


# gRPC codes: 1 CANCELLED, 3 INVALID_ARGUMENT, 4 DEADLINE_EXCEEDED, 5 NOT_FOUND, 7 PERMISSION_DENIED,
# 12 UNIMPLEMENTED, 13 INTERNAL, 14 UNAVAILABLE, 16 UNAUTHENTICATED.
_TABLE: dict[type[BaseException], Status] = {
    errors.BadInput: Status(400, 3),
    errors.BadConfig: Status(400, 3),
    errors.NotFound: Status(404, 5),
    errors.Unsupported: Status(400, 12),
    errors.Unauthenticated: Status(401, 16),
    errors.Denied: Status(403, 7),
    errors.Busy: Status(503, 14),
    errors.Expired: Status(503, 4),
    errors.Cancelled: Status(503, 1),
    errors.Unavailable: Status(503, 14),
    errors.StageFailed: Status(500, 13),
    errors.TorchshipError: Status(500, 13),
}
_UNKNOWN = Status(500, 13)


def status_of(error: BaseException) -> Status:
    """Where the nearest class above `error` stands in the table; 500 and INTERNAL for what is not ours."""
    for kind in type(error).__mro__:
        if kind in _TABLE:
            return _TABLE[kind]
    return _UNKNOWN


def text_of(error: BaseException) -> str:
    """What a caller may read of `error`: our own errors in full, of others not even the message.

    A foreign exception can hold paths, addresses or parts of other requests.
    """
    if isinstance(error, errors.TorchshipError):
        return error.line
    return "internal error: the server's log has the details"


def error_of(status: Status, message: str, *, retry_after: float = 0.0) -> errors.TorchshipError:
    """The error that a client raises for an answer with this status: the way back through the table."""
    if status.http == 503 and retry_after > 0:
        return errors.Busy(message, retry_after=retry_after)
    by_status: dict[int, type[errors.TorchshipError]] = {
        400: errors.BadInput,
        401: errors.Unauthenticated,
        500: errors.StageFailed,
        503: errors.Unavailable,
    }
    by_code: dict[int, type[errors.TorchshipError]] = {
        1: errors.Cancelled,
        4: errors.Expired,
        12: errors.Unsupported,
        16: errors.Unauthenticated,
    }
    if status.grpc in by_code:
        return by_code[status.grpc](message)
    if status.http in by_status:
        return by_status[status.http](message)
    for kind, row in _TABLE.items():
        if status.http == row.http and issubclass(kind, errors.TorchshipError):
            return kind(message)
    return errors.BadInput(message) if 400 <= status.http < 500 else errors.StageFailed(message)
