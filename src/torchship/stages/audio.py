"""Sound in, frames out: WAV files to samples, and samples to overlapping frames that a model takes as rows."""

from __future__ import annotations

import io
import wave

import numpy as np

from torchship.errors import BadConfig, BadInput
from torchship.stage import stage
from torchship.stages.images import element
from torchship.tensors import Array

_MAX_SECONDS = 3600.0


@stage("audio:BYTES[1] -> samples:FP32[1,-1], rate:INT64[1]")
class Wave:
    """The bytes of one WAV file (PCM of 8, 16, 24 or 32 bits) to samples of -1 to 1, channels averaged; `rate` in Hz.

    `rate` as an option refuses every other rate. Raises BadInput for what is no such file, or is longer than
    `max_seconds`.
    """

    def __init__(self, *, rate: int = 0, max_seconds: float = _MAX_SECONDS) -> None:
        self._rate, self._max_seconds = rate, max_seconds

    def __call__(self, audio: Array) -> tuple[Array, Array]:
        try:
            with wave.open(io.BytesIO(element(audio))) as file:
                rate, width, channels, count = (
                    file.getframerate(), file.getsampwidth(), file.getnchannels(), file.getnframes(),
                )  # fmt: skip
                self._check(rate, count)
                data = file.readframes(count)
        except (wave.Error, EOFError) as fault:
            raise BadInput(f"not a WAV file: {fault}", hint="send PCM as .wav") from None
        samples = _samples(data[: len(data) // (width * channels) * width * channels], width)
        return samples.reshape(-1, channels).mean(axis=1)[None].astype(np.float32), np.asarray([rate], np.int64)

    def _check(self, rate: int, count: int) -> None:
        if rate < 1 or count / rate > self._max_seconds:
            raise BadInput(f"{count} samples at {rate} Hz, at most {self._max_seconds:g} s are taken")
        if self._rate and rate != self._rate:
            raise BadInput(f"the sound has {rate} Hz, expected {self._rate}", hint="resample it before sending")


def _samples(data: bytes, width: int) -> Array:
    """PCM of `width` bytes a sample, little-endian, as numbers from -1 to 1."""
    if width == 1:
        return np.asarray((np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128)
    if width == 3:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return np.asarray(wide.view("<i4")[:, 0].astype(np.float64) / 2**31)
    return np.asarray(np.frombuffer(data, f"<i{width}").astype(np.float64) / 2 ** (8 * width - 1))


@stage("samples:FP32[1,-1] -> frames:FP32[1..,-1]")
class Frames:
    """Samples to frames of `size` that begin every `hop` (0: `size`, no overlap); the last is filled with silence."""

    def __init__(self, *, size: int = 512, hop: int = 0) -> None:
        self.declare(size=size, hop=hop)
        self._size, self._hop = size, hop or size

    @classmethod
    def declare(cls, *, size: int = 512, hop: int = 0) -> str:
        """The signature for these options. Raises BadConfig."""
        if size < 1 or not 0 <= hop <= size:
            raise BadConfig(f"frames of {size} every {hop}", hint="size is positive, hop at most size")
        return f"samples:FP32[1,-1] -> frames:FP32[1..,{size}]"

    def __call__(self, samples: Array) -> Array:
        plain = samples[0]
        count = 1 + max(-(-(len(plain) - self._size) // self._hop), 0)
        padded = np.zeros((count - 1) * self._hop + self._size, np.float32)
        padded[: len(plain)] = plain[: len(padded)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, self._size)[:: self._hop]
        return np.ascontiguousarray(windows)
