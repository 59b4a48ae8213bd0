"""For tests of the line: stages that double, fail, crash, hang and stream, and an event loop in a thread."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from torchship.errors import TorchshipError
from torchship.pipeline.config import PipelineConfig, convert
from torchship.pipeline.planning import Plan, plan
from torchship.stage import stage
from torchship.tensors import Array, bytes_array

T = TypeVar("T")
HERE = "tests.serving"
LENGTHS = "x:FP32[-1,n:1..64], name:BYTES[-1,n:1..64] -> y:FP32[-1,n:1..64], width:INT64[-1]"


@stage("x:FP32[-1,4] -> y:FP32[-1,4]", batched=True, max_batch=8)
def double(x: Array) -> Array:
    return x * 2


@stage("y:FP32[-1,4] -> z:FP32[-1], w:INT64[-1]", batched=True, max_batch=5)
def sums(y: Array, *, offset: Annotated[int, msgspec.Meta(ge=0, le=9)] = 0) -> tuple[Array, Array]:
    return y.sum(axis=1), np.arange(len(y)) * 0 + offset


@stage("x:FP32[-1,4] -> y:FP32[-1,4], t:BYTES[-1]", batched=True, max_batch=8)
def odd(x: Array) -> tuple[Array, Array]:
    """Numbers in network byte order and reversed strides; BYTES of every kind that is taken, and one that is not."""
    kinds: dict[float, Any] = {-2.0: b"a\0", -1.0: "\u00e9\0", 0.5: bytearray(b"x"), 2.0: memoryview(b"\xff"), 13.0: 13}
    return (x * 2).astype(">f4")[:, ::-1], bytes_array([kinds.get(n, b"") for n in x[:, 0].tolist()])


@stage("x:FP32[-1,4] -> y:FP32[0..,4]")
def positive(x: Array) -> Array:
    """A job stage that changes the number of rows: as boxes come out of a detector."""
    return x[x[:, 0] > 0]


@stage("text:BYTES[-1] -> upper:BYTES[-1]")
def upper(text: Array) -> Array:
    return np.array([item.upper() for item in text], object)


@stage("x:FP32[-1,n] -> mean:FP32[-1]", batched=True, max_batch=8)
def mean(x: Array) -> Array:
    found: Array = x.mean(axis=1)
    return found


@stage(LENGTHS, batched=True, max_batch=8)
def lengths(x: Array, name: Array) -> tuple[Array, Array]:
    """Twice the numbers, and how wide the batch was."""
    assert x.shape == name.shape
    return x * 2, np.full(len(x), x.shape[1], np.int64)


SHIFTED = "x:FP32[-1,4], bias?:FP32[-1,4], word?:BYTES[-1,n] -> y:FP32[-1,4], said:BYTES[-1], rows:INT64[-1]"


@stage(SHIFTED, batched=True, max_batch=8)
def shifted(x: Array, bias: Array | None = None, word: Array | None = None) -> tuple[Array, Array, Array]:
    """The numbers plus the bias, the first words, and how many rows the batch had."""
    said = bytes_array([b"none"] * len(x)) if word is None else word[:, 0]
    return x if bias is None else x + bias, said, np.full(len(x), len(x))


@stage("y:FP32[0..,4], bias?:FP32[0..,4] -> total:FP32[1], given:BOOL[1]")
class Total:
    """A job stage that takes the bias too."""

    def __call__(self, y: Array, bias: Array | None = None) -> tuple[Array, Array]:
        return np.array([y.sum()], np.float32), np.array([bias is not None])


@stage("x?:FP32[1], text?:BYTES[1] -> seen:BYTES[1]")
def either(x: Array | None = None, text: Array | None = None) -> Array:
    """A job stage of which every input is optional."""
    return bytes_array([b"+".join([b"x"] * (x is not None) + [b"text"] * (text is not None))])


@stage("x:FP32[-1,4] -> y:FP32[-1,4]", batched=True, max_batch=8)
def moody(x: Array) -> Array:
    """Raises for 13, dies for 666, hangs for 777, tells its process for 1000."""
    if (x == 13).any():
        raise ValueError("thirteen")
    if (x == 666).any():
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if (x == 777).any():
        time.sleep(600)
    return np.where(x == 1000, np.float32(os.getpid()), x + 1)


@stage("ms:INT32[1] -> pid:INT64[1]")
def sleeper(ms: Array) -> Array:
    time.sleep(int(ms[0]) / 1000)
    return np.array([os.getpid()])


@stage("x:FP32[1] -> said:BYTES[2]")
def surroundings(x: Array) -> Array:
    """What its process is told about cards."""
    return bytes_array([os.environ[name].encode() for name in ("CUDA_VISIBLE_DEVICES", "TORCHSHIP_MEMORY_SHARE")])


@stage("x:FP32[1] -> size:INT64[1]")
def long_words(x: Array, *, prompt: str = "", seed: int = 0) -> Array:
    return np.array([len(prompt)])


@stage("x:FP32[1] -> pid:INT64[1]")
class Slow:
    """Takes its time to open: as long as there is a file `.closed`. Each of its processes leaves its number first."""

    def __init__(self, *, file: str) -> None:
        with open(file, "a") as seen:
            seen.write(f"{os.getpid()}\n")
        while os.path.exists(f"{file}.closed"):
            time.sleep(0.01)

    def __call__(self, x: Array) -> Array:
        return np.array([os.getpid()])


@stage("mib:INT32[1] -> pid:INT64[1]")
class Hog:
    """Keeps as many MiB as it is asked for; pretends a lost device for a negative number."""

    def __init__(self) -> None:
        self._kept: list[bytearray] = []

    def __call__(self, mib: Array) -> Array:
        if mib[0] < 0:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self._kept.append(bytearray(int(mib[0]) * 2**20))
        return np.array([os.getpid()])


@stage("x:FP32[-1] -> y:FP32[-1]", batched=True, max_batch=8)
class Card:
    """Adds one. 666 loses the device, which then fails whatever comes; 500 takes a while, so that a batch forms."""

    def __init__(self) -> None:
        self._lost = False

    def __call__(self, x: Array) -> Array:
        if (x == 500).any():
            time.sleep(0.3)
        self._lost = self._lost or bool((x == 666).any())
        if self._lost:
            raise RuntimeError("CUDA error: device-side assert triggered\nFor debugging consider ...")
        return x + 1


@stage("n:INT32[1] -> i:INT32[1]")
def count(n: Array) -> Iterator[Array]:
    for number in range(int(n[0])):
        if number == 7:
            raise ValueError("seven")
        yield np.array([number], np.int32)


@stage("n:INT32[1] -> i:INT32[1]")
def endless(n: Array) -> Iterator[Array]:
    """Counts for ever, from `n` on."""
    number = int(n[0])
    while True:
        yield np.array([number], np.int32)
        number += 1


@stage("how:BYTES[1] -> pid:INT64[1]")
def tantrum(how: Array) -> Array:
    """Raises whatever it is asked for; its process id where it is asked for nothing."""
    faults: dict[bytes, BaseException] = {
        b"exit": SystemExit(3), b"cancel": asyncio.CancelledError(), b"interrupt": KeyboardInterrupt(),
        b"close": GeneratorExit(), b"surrogate": ValueError("caf\udce9"), b"long": ValueError("x" * 5_000_000),
        b"mute": Mute(), b"stop": StopIteration(), b"ours": Picky("no"),
    }  # fmt: skip
    if how[0] in faults:
        raise faults[how[0]]
    return np.array([os.getpid()])


class Mute(Exception):
    """Cannot say what is wrong."""

    def __str__(self) -> str:
        raise RuntimeError("mute")


class Picky(TorchshipError):
    """An error of our tree that cannot be made as the others are."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.hint = 5  # type: ignore[assignment]


@stage("x:FP32[1] -> total:FP32[1]")
class Adder:
    """A stateful stage: the sum of what it was given."""

    def __init__(self, *, start: float = 0.0) -> None:
        if start < 0:
            raise ValueError("start is negative")
        self._total = start

    def __call__(self, x: Array) -> Array:
        self._total += float(x[0])
        return np.array([self._total], np.float32)


@stage("x:INT32[1] -> total:INT64[1], pid:INT64[1]")
class Totals:
    """Sums by sequence, in the memory of one worker."""

    def __init__(self) -> None:
        self._totals: dict[str, int] = {}

    def __call__(
        self, x: Array, *, sequence_id: str = "", sequence_start: bool = False, sequence_end: bool = False
    ) -> tuple[Array, Array]:
        if x[0] == 666:
            os.kill(os.getpid(), signal.SIGKILL)
        total = int(x[0]) + (0 if sequence_start else self._totals[sequence_id])
        self._totals[sequence_id] = total
        if sequence_end:
            del self._totals[sequence_id]
        return np.array([total]), np.array([os.getpid()])


@stage("x:INT32[1] -> total:INT64[1]")
class Members:
    """Counts the requests of a sequence, and names neither its start nor its end."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def __call__(self, x: Array, *, sequence_id: str = "") -> Array:
        self._counts[sequence_id] += 1
        return np.array([self._counts[sequence_id]])


@stage("x:FP32[1] -> y:FP32[1]")
def wrong(x: Array) -> Array:
    """Gives another datatype than it declares."""
    return x.astype(np.float64)


FORMS: dict[str, Callable[[Array], Any]] = {
    "plain": lambda x: x,
    "big endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "little endian": lambda x: x.astype(x.dtype.newbyteorder("<")),
    "backwards": lambda x: x[::-1].copy()[::-1],
    "every second": lambda x: np.repeat(x, 2, axis=0)[::2],
    "columns first": np.asfortranarray,
    "the same again": lambda x: np.broadcast_to(x[:1], x.shape),
    "read only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "lists": lambda x: x.tolist(),
    "long doubles": lambda x: x.astype(np.longdouble),
    "complex": lambda x: x.astype(np.complex64),
}
WORDS: dict[str, Callable[[list[bytes]], Any]] = {
    "bytes": lambda words: np.array([*words, None], object)[:-1],
    "text": lambda words: [word.decode("latin-1") for word in words],
    "fixed width": lambda words: np.array([word.decode("latin-1") for word in words]),
    "buffers": lambda words: np.array([bytearray(word) if n % 2 else memoryview(word) for n, word in enumerate(words)]
                                      + [None], object)[:-1],
    "numbers": lambda words: np.array([*map(len, words), None], object)[:-1],
    "nothing": lambda words: np.array([None for _ in words], object),
    "surrogates": lambda words: ["\udce9" for _ in words],
}  # fmt: skip


@stage("x:FP32[-1,2], word:BYTES[-1] -> y:FP32[-1,2], said:BYTES[-1]", batched=True, max_batch=3)
def disguised(x: Array, word: Array, *, form: str = "plain", words: str = "bytes") -> tuple[Any, Any]:
    """What it is given, as arrays that are laid out in odd ways, and as objects that may be no bytes."""
    return FORMS[form](x), WORDS[words](word.tolist())


def planned(*stages: dict[str, Any], **options: Any) -> Plan:
    """The plan of a pipeline of stages in this file."""
    made = [{**given, "run": f"{HERE}:{given['run']}"} for given in stages]
    config: PipelineConfig = convert({"name": "test", "stages": made, **options})
    return plan(config)


class Background:
    """An event loop in a thread, for tests that call from outside."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], *, timeout: float = 60.0) -> T:
        """The result of a coroutine."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)

    def close(self) -> None:
        """Stop the loop and the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
