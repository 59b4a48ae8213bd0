"""Messages between host and worker: of any size, with and without a descriptor, and faults that always fit."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import msgspec
import pytest

from torchship.errors import BadInput, StageFailed, TorchshipError, Unavailable
from torchship.pipeline.faults import describe, is_device_lost, revive, words_of
from torchship.serve.engine.ipc.messages import (
    BatchDone,
    PackedCall,
    RunBatch,
    decode_order,
    decode_report,
    encode,
)
from torchship.serve.ipc.memory import MemoryRegion
from torchship.serve.ipc.packets import INLINE, Inbox, send


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.settimeout(10)
        other.settimeout(10)
        yield one, other


@pytest.mark.parametrize("size", [0, 1, INLINE - 100, INLINE, INLINE + 1, 3_000_000])
@pytest.mark.parametrize("with_memory", [False, True])
def test_a_message_of_any_size_arrives(ends: tuple[socket.socket, socket.socket], size: int, with_memory: bool) -> None:
    host, worker = ends
    inbox, descriptors = Inbox(worker), len(os.listdir("/proc/self/fd"))
    order = RunBatch(7, 1, [PackedCall([1], [], {"prompt": "p" * size})])
    region = MemoryRegion.make(100) if with_memory else None
    for _ in range(3):
        send(host, encode(order), fd=region.fd if region else -1)
    for _ in range(3):
        message, fd = inbox.next()
        assert decode_order(message) == order
        assert (fd >= 0) == with_memory
        if fd >= 0:
            MemoryRegion.take(fd).close()
    if region:
        region.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_end_of_the_other_side_is_an_empty_message(ends: tuple[socket.socket, socket.socket]) -> None:
    host, worker = ends
    inbox = Inbox(worker)
    before = inbox.waiting
    host.close()
    assert (before, inbox.waiting) == (False, True)
    assert not inbox.next()[0]


def test_what_is_no_message_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    host, worker = ends
    inbox = Inbox(worker)
    host.send(encode(BatchDone(1, 0, 0, [])))
    with pytest.raises(msgspec.MsgspecError):
        decode_order(inbox.next()[0])
    socket.send_fds(host, [b"x"], [host.fileno(), worker.fileno(), host.fileno()])
    with pytest.raises(OSError, match="more descriptors"):
        inbox.next()


class Mute(Exception):
    def __str__(self) -> str:
        raise SystemExit(3)


class Own(BadInput):
    """A user's own error of our tree."""


def failure(message: str) -> TorchshipError:
    fault = StageFailed(message)
    fault.hint = None  # type: ignore[assignment]
    return fault


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        (ValueError("thirteen\n  and more"), StageFailed, "stage 's' raised ValueError: thirteen and more"),
        (ValueError(), StageFailed, "stage 's' raised ValueError"),
        (SystemExit(1), StageFailed, "stage 's' raised SystemExit: 1"),
        (ValueError("caf\udce9.jpg"), StageFailed, "stage 's' raised ValueError: caf\\udce9.jpg"),
        (Mute(), StageFailed, "stage 's' raised Mute: (its message cannot be read: SystemExit)"),
        (BadInput("no such word"), BadInput, "stage 's': no such word"),
        (Own("no such word"), BadInput, "stage 's': no such word"),
        (failure("caf\udce9"), StageFailed, "stage 's': caf\\udce9"),
        (
            RuntimeError("CUDA error: lost\nconsider ..."),
            StageFailed,
            "stage 's' raised RuntimeError: CUDA error: lost",
        ),
    ],
)
def test_whatever_a_stage_raises_travels(fault: BaseException, kind: type[TorchshipError], says: str) -> None:
    report = BatchDone(1, 0, 0, [], [describe(fault)])
    found = decode_report(encode(report))
    assert isinstance(found, BatchDone)
    error = revive(found.faults[0], stage="s")
    assert type(error) is kind
    assert str(error) == says


class OutOfMemoryError(RuntimeError):
    """As torch has it."""


def test_a_device_without_memory_is_unavailable_for_a_while_and_says_nothing_of_others() -> None:
    text = "CUDA out of memory. Tried to allocate 596.05 GiB. Process 4711 has 3.1 GiB memory in use."
    for raised, says in ((OutOfMemoryError(text), "no memory left"), (Unavailable("full", retry_after=2.5), "full")):
        found = decode_report(encode(BatchDone(1, 0, 0, [], [describe(raised)])))
        assert isinstance(found, BatchDone)
        error = revive(found.faults[0], stage="s")
        assert isinstance(error, Unavailable)
        assert error.retry_after == (2.5 if says == "full" else 1.0)
        assert says in error.line
        assert "4711" not in error.line


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: misaligned address", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("CUDA failure 710: device-side assert triggered ; GPU=0", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True),
        ("CUDA error: out of memory", False),
        ("CUDA out of memory. Tried to allocate 596.05 GiB", False),
        ("index out of range in self", False),
    ],
)
def test_which_errors_cost_a_process_its_device(text: str, lost: bool) -> None:
    assert is_device_lost(text) is lost


def test_a_message_of_any_length_is_cut() -> None:
    assert words_of(ValueError("x" * 10_000_000)) == "x" * 2000
    assert len(encode(describe(ValueError("\udce9" * 100_000)))) < 5000
