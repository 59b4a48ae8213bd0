"""The table of statuses: every error of ours has a row, and every status that a server may send has one meaning."""

from __future__ import annotations

import pytest

from torchship import errors
from torchship.wire.status import Status, error_of, status_of

KINDS = [errors.BadInput, errors.NotFound, errors.Unsupported, errors.Unauthenticated, errors.Denied, errors.Expired,
         errors.Cancelled, errors.Unavailable, errors.StageFailed]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: type[errors.TorchshipError]) -> None:
    assert type(error_of(status_of(kind("x")), "x")) is kind


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (Status(0, 2), errors.StageFailed),
        (Status(0, 8), errors.Busy),
        (Status(0, 10), errors.Unavailable),
        (Status(0, 16), errors.Unauthenticated),
        (Status(0, 99), errors.StageFailed),
        (Status(401, 0), errors.Unauthenticated),
        (Status(403, 0), errors.Denied),
        (Status(408, 0), errors.Expired),
        (Status(413, 0), errors.BadInput),
        (Status(422, 0), errors.BadInput),
        (Status(429, 0), errors.Busy),
        (Status(500, 0), errors.StageFailed),
        (Status(501, 0), errors.Unsupported),
        (Status(502, 0), errors.Unavailable),
        (Status(503, 0), errors.Unavailable),
        (Status(504, 0), errors.Expired),
        (Status(503, 4), errors.Expired),
        (Status(302, 0), errors.StageFailed),
    ],
)
def test_what_a_status_means(status: Status, kind: type[errors.TorchshipError]) -> None:
    assert type(error_of(status, "x")) is kind


def test_when_to_try_again() -> None:
    busy = error_of(Status(503, 0), "x", retry_after=7.0)
    assert isinstance(busy, errors.Busy)
    assert busy.retry_after == 7.0
    assert type(error_of(Status(0, 8), "x", retry_after=-1.0)) is errors.BadInput
    assert type(error_of(Status(0, 3), "x", retry_after=7.0)) is errors.BadInput
