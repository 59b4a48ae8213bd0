"""Sound in, frames out: WAV files to samples, and samples to overlapping frames that a model takes as rows."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from torchship.errors import BadConfig, BadInput
from torchship.stage import stage
from torchship.stages.images import element
from torchship.tensors import Array

_MAX_SECONDS = 3600.0
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # the format tags of RFC 2361 that matter here
_CODECS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 49: "GSM", 80: "MPEG", 85: "MP3"}


@stage("audio:BYTES[1] -> samples:FP32[1,-1], rate:INT64[1]")
class Wave:
    """The bytes of one WAV file to samples of -1 to 1, channels averaged; `rate` in Hz.

    RIFF or RF64, PCM of 8, 16, 24 or 32 bits or floats of 32 or 64, extensible or not. Where the head states no length
    of the sound, or one that is not there (a tool that wrote into a pipe, or was stopped), all that follows is sound.
    `rate` as an option refuses every other rate. Raises BadInput for what is no such file, holds no sound, or is longer
    than `max_seconds`.
    """

    def __init__(self, *, rate: int = 0, max_seconds: float = _MAX_SECONDS) -> None:
        self._rate, self._max_seconds = rate, max_seconds

    def __call__(self, audio: Array) -> tuple[Array, Array]:
        head, sound = _parts(element(audio))
        kind, channels, rate, _, align, bits = struct.unpack_from("<HHIIHH", head)
        if kind == _EXTENSIBLE and len(head) >= 26:
            (kind,) = struct.unpack_from("<H", head, 24)  # the beginning of the sub-format's GUID
        width = align // channels if channels and align and align % channels == 0 else -(-bits // 8)
        if channels < 1 or (kind, width) not in {*((_PCM, size) for size in (1, 2, 3, 4)), (_FLOAT, 4), (_FLOAT, 8)}:
            what = f"{_CODECS.get(kind, f'format {kind}')} of {bits} bits in {channels} channels"
            raise BadInput(f"not a WAV file that is understood: {what}", hint="send PCM of 8 to 32 bits, or floats")
        count = len(sound) // (width * channels)
        self._check(rate, count)
        samples = _samples(bytes(sound[: count * width * channels]), width, kind)
        if not np.isfinite(samples).all():
            raise BadInput("the sound holds NaN or infinity", hint="floats of -1 to 1 are expected")
        return samples.reshape(-1, channels).mean(axis=1)[None].astype(np.float32), np.asarray([rate], np.int64)

    def _check(self, rate: int, count: int) -> None:
        if not count:
            raise BadInput("the WAV file holds no sound", hint="was it sent whole?")
        if rate < 1 or count / rate > self._max_seconds:
            raise BadInput(f"{count} samples at {rate} Hz, at most {self._max_seconds:g} s are taken")
        if self._rate and rate != self._rate:
            raise BadInput(f"the sound has {rate} Hz, expected {self._rate}", hint="resample it before sending")


def _parts(data: bytes) -> tuple[memoryview, memoryview]:
    """The format and the sound of a WAV file (EBU Tech 3285 for RIFF, 3306 for RF64). Raises BadInput."""
    if data[:4] not in (b"RIFF", b"RF64", b"BW64") or data[8:12] != b"WAVE":
        raise BadInput(f"not a WAV file: it starts with {data[:12]!r}", hint="send PCM as .wav")
    found: dict[bytes, memoryview] = {}
    for name, place, size in _chunks(data, 12):
        found.setdefault(name, memoryview(data)[place : place + size])
    if len(found.get(b"fmt ", b"")) < 16 or b"data" not in found:
        raise BadInput("not a WAV file: it has no format, or no sound", hint="was it sent whole?")
    return found[b"fmt "], found[b"data"]


def _chunks(data: bytes, place: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of each chunk; a size that cannot be means all that is left."""
    long = 0
    while place + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, place)
        place += 8
        left = len(data) - place
        if name == b"ds64" and left >= 16:
            (long,) = struct.unpack_from("<Q", data, place + 8)
        if name == b"data" and size == 0xFFFFFFFF:
            size = long or left
        if name == b"data" and not size and not _are_chunks(data, place):
            size = left
        yield name, place, min(size, left)
        place += size + size % 2


def _are_chunks(data: bytes, place: int) -> bool:
    """Whether what follows is a row of chunks that fills the file (notes behind a sound that is really empty)."""
    while place + 8 <= len(data) and data[place : place + 4].isascii() and data[place : place + 4].isalnum():
        (size,) = struct.unpack_from("<I", data, place + 4)
        place += 8 + size + size % 2
    return place in (len(data), len(data) + 1)


def _samples(data: bytes, width: int, kind: int) -> Array:
    """Samples of `width` bytes, little-endian, as numbers from -1 to 1."""
    if kind == _FLOAT:
        return np.frombuffer(data, f"<f{width}")
    if width == 1:
        return np.asarray((np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128)
    if width == 3:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return np.asarray(wide.view("<i4")[:, 0].astype(np.float64) / 2**31)
    return np.asarray(np.frombuffer(data, f"<i{width}").astype(np.float64) / 2 ** (8 * width - 1))


@stage("samples:FP32[1,-1] -> frames:FP32[1..,-1]")
class Frames:
    """Samples to frames of `size` that begin every `hop` (0: `size`, no overlap); the last is filled with silence.

    Raises BadInput where all frames together would have more than `max_samples`.
    """

    def __init__(self, *, size: int = 512, hop: int = 0, max_samples: int = 256_000_000) -> None:
        self.declare(size=size, hop=hop)
        self._size, self._hop, self._most = size, hop or size, max_samples

    @classmethod
    def declare(cls, *, size: int = 512, hop: int = 0, **_: object) -> str:
        """The signature for these options. Raises BadConfig."""
        if size < 1 or not 0 <= hop <= size:
            raise BadConfig(f"frames of {size} every {hop}", hint="size is positive, hop at most size")
        return f"samples:FP32[1,-1] -> frames:FP32[1..,{size}]"

    def __call__(self, samples: Array) -> Array:
        plain = samples[0]
        count = 1 + max(-(-(len(plain) - self._size) // self._hop), 0)
        if count * self._size > self._most:
            raise BadInput(f"{count} frames of {self._size} samples, at most {self._most} samples are made")
        padded = np.zeros((count - 1) * self._hop + self._size, np.float32)
        padded[: len(plain)] = plain[: len(padded)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, self._size)[:: self._hop]
        return np.ascontiguousarray(windows)
