"""Integers as protobuf and HPACK write them."""

from __future__ import annotations

import pytest

from torchship.wire import frames
from torchship.wire.raw import read_varint, varint


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 16_383, 16_384, 2**31, 2**35 - 1])
def test_integers_there_and_back(value: int) -> None:
    assert read_varint(b"x" + varint(value) + b"y", 1) == (value, 1 + len(varint(value)))
    for bits in (4, 5, 6, 7):
        block = frames.integer(value, bits=bits)
        assert frames.read_integer(block + b"z", 0, bits=bits) == (value, len(block))


def test_integers_of_the_rfc() -> None:
    """RFC 7541 appendix C.1."""
    assert frames.integer(10, bits=5) == b"\x0a"
    assert frames.integer(1337, bits=5) == b"\x1f\x9a\x0a"
    assert frames.integer(42, bits=8) == b"\x2a"


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff" * 9])
def test_an_integer_without_an_end_lies_beyond_all_data(data: bytes) -> None:
    assert read_varint(data, 0)[0] > 2**60
