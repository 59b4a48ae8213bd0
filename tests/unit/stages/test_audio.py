"""Sound: samples as they were written, frames that miss nothing."""

from __future__ import annotations

import io
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
