"""The one table between the errors of the tree and the statuses of HTTP and gRPC, and the way back for clients."""

from __future__ import annotations

from typing import Any, NamedTuple

from torchship import errors


class Status(NamedTuple):
    """The HTTP status and the gRPC code of one kind of failure."""

    http: int
    grpc: int


# gRPC codes: 1 CANCELLED, 3 INVALID_ARGUMENT, 4 DEADLINE_EXCEEDED, 5 NOT_FOUND, 7 PERMISSION_DENIED,
# 8 RESOURCE_EXHAUSTED, 10 ABORTED, 11 OUT_OF_RANGE, 12 UNIMPLEMENTED, 13 INTERNAL, 14 UNAVAILABLE, 16 UNAUTHENTICATED.
_TABLE: dict[type[Any], Status] = {
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
# The way back: the first that stands above with a code, and what others say who know more codes.
_BY_CODE: dict[int, type[errors.TorchshipError]] = {
    **{status.grpc: kind for kind, status in reversed(_TABLE.items())},
    8: errors.Busy,
    10: errors.Unavailable,
    11: errors.BadInput,
    14: errors.Unavailable,
}
_BY_HTTP: dict[int, type[errors.TorchshipError]] = {
    401: errors.Unauthenticated,
    403: errors.Denied,
    404: errors.NotFound,
    408: errors.Expired,
    429: errors.Busy,
    501: errors.Unsupported,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Expired,
}


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
    """The error that every client raises for an answer with this status; a gRPC code of 0 leaves it to HTTP's.

    `retry_after` in seconds is what the server says about trying again; below 0 it says that this will not help.
    """
    if status.grpc:
        kind = _BY_CODE.get(status.grpc, errors.StageFailed)
    else:
        kind = _BY_HTTP.get(status.http) or (errors.BadInput if 400 <= status.http < 500 else errors.StageFailed)
    if kind is errors.Busy and retry_after < 0:
        return errors.BadInput(message)
    if kind in (errors.Busy, errors.Unavailable) and retry_after > 0:
        return errors.Busy(message, retry_after=retry_after)
    return kind(message)
