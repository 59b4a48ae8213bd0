"""Sound: samples as they were written, frames that miss nothing."""

from __future__ import annotations

import io
import struct
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.stages.test_images import request
from torchship.errors import BadConfig, BadInput
from torchship.stages.audio import Frames, Wave


def wav(samples: list[list[int]], width: int, rate: int = 8000) -> bytes:
    """A WAV file; `samples` by channel."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(width)
        file.setframerate(rate)
        interleaved = [value for moment in zip(*samples, strict=True) for value in moment]
        file.writeframes(b"".join(v.to_bytes(width, "little", signed=width > 1) for v in interleaved))
    return buffer.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width(width: int) -> None:
    top = 2 ** (8 * width - 1)
    middle = top if width == 1 else 0
    data = wav([[middle, middle + top // 2, middle - top]], width)
    samples, rate = Wave()(request(data))
    np.testing.assert_allclose(samples, [[0, 0.5, -1]], atol=1e-6)
    assert rate.tolist() == [8000]
    assert samples.dtype == np.float32


def test_channels_are_averaged() -> None:
    samples, _ = Wave()(request(wav([[2**14, 0], [0, 2**14]], 2)))
    np.testing.assert_allclose(samples, [[0.25, 0.25]])


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "not a WAV"), (b"RIFF1234WAVEjunk", "not a WAV"), (wav([[0] * 9], 2, 16000), "expected 8000"),
     (wav([[0] * 9000], 2), "at most 1 s")],
)  # fmt: skip
def test_other_bytes_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Wave(rate=8000, max_seconds=1)(request(data))


TONE = (np.sin(np.arange(16_000) / 20) * 20_000).astype("<i2")


def headed(
    data: bytes, *, kind: int = 1, bits: int = 16, channels: int = 1, align: int = 0, claims: int | None = None,
    form: bytes = b"RIFF", more: bytes = b"", before: bytes = b"", after: bytes = b"",
) -> bytes:  # fmt: skip
    """A WAV file whose head says what it is told to say."""
    align = align or channels * -(-bits // 8)
    fmt = struct.pack("<HHIIHH", kind, channels, 16_000, 16_000 * align, align, bits) + more
    sized = struct.pack("<I", len(data) if claims is None else claims)
    parts = before + b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + sized + data + after
    return form + b"\xff\xff\xff\xff" + b"WAVE" + parts


def ds64(size: int) -> bytes:
    """The chunk of RF64 that holds the length of the sound."""
    return b"ds64" + struct.pack("<IQQQI", 28, 0, size, size // 2, 0)


SUB_FORMAT = b"\x16\0\x10\0\0\0\0\0%c\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
NOTE = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"


@pytest.mark.parametrize(
    "data",
    [
        headed(TONE.tobytes(), claims=0xFFFFFFFF), headed(TONE.tobytes(), claims=0x7FFFF000),
        headed(TONE.tobytes(), claims=0), headed(TONE.tobytes(), claims=0x80000000, before=NOTE),
        headed(TONE.tobytes(), after=NOTE), headed(TONE.tobytes() + b"\1"),
        headed(TONE.tobytes(), form=b"RF64", claims=0xFFFFFFFF, before=ds64(32_000), after=NOTE),
        headed(TONE.tobytes(), form=b"RF64", claims=0xFFFFFFFF, before=ds64(0)),
        headed(TONE.tobytes(), kind=0xFFFE, more=SUB_FORMAT % 1),
        headed((TONE / np.float32(2**15)).astype("<f4").tobytes(), kind=3, bits=32),
        headed((TONE / 2**15).astype("<f8").tobytes(), kind=0xFFFE, bits=64, more=SUB_FORMAT % 3),
        headed((TONE.astype("<i4") << 16).tobytes(), bits=24, align=4),
    ],
)  # fmt: skip
def test_heads_as_tools_write_them(data: bytes) -> None:
    samples, _ = Wave()(request(data))
    np.testing.assert_allclose(samples[0], TONE / 2**15, atol=1e-7)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (headed(b""), "holds no sound"), (headed(b"", after=NOTE), "holds no sound"), (headed(b"\1"), "no sound"),
        (headed(b"12", channels=0), "0 channels"), (headed(b"1234", kind=7, bits=8), "mu-law of 8 bits"),
        (headed(b"1234", kind=0xFFFE), "format 65534"), (headed(b"1234", bits=64), "64 bits"),
        (headed(np.array([np.nan], "<f4").tobytes(), kind=3, bits=32), "NaN"),
        (headed(b"1234", form=b"RIFX"), "starts with b'RIFX"), (headed(b"")[:20], "no format"),
    ],
)  # fmt: skip
def test_no_silence_is_answered_for_sound_that_is_not_understood(data: bytes, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Wave()(request(data))


def test_frames_have_a_bounded_size() -> None:
    with pytest.raises(BadInput, match="at most 1000 samples"):
        Frames(size=100, hop=1, max_samples=1000)(np.zeros((1, 200), np.float32))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 25))
def test_frames_hold_every_sample_and_then_silence(length: int, size: int, hop: int) -> None:
    samples = np.arange(1, length + 1, dtype=np.float32)[None]
    if hop > size:
        with pytest.raises(BadConfig):
            Frames(size=size, hop=hop)
        return
    frames = Frames(size=size, hop=hop)(samples)
    step = hop or size
    assert frames.shape[1] == size
    for place, frame in enumerate(frames):
        there = samples[0, place * step : place * step + size]
        assert frame.tolist() == [*there.tolist(), *([0.0] * (size - len(there)))]
    assert set(samples[0].tolist()) <= set(frames.ravel().tolist())
    assert (len(frames) - 1) * step < length


def test_wrong_options() -> None:
    with pytest.raises(BadConfig):
        Frames(size=0)
    assert "frames:FP32[1..,256]" in Frames.declare(size=256)
