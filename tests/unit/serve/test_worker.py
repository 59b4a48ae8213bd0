"""The worker's loop over its socket: what it answers, and what it does while nothing is asked of it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from torchship.serve.engine.ipc import arena
from torchship.serve.engine.ipc.arena import Arena
from torchship.serve.engine.ipc.messages import (
    BatchDone,
    Order,
    PackedCall,
    Ping,
    Pong,
    RunBatch,
    Stop,
    decode_report,
    encode,
)
from torchship.serve.engine.worker import StageRunner, WorkerLoop
from torchship.serve.ipc.packets import Inbox, send
from torchship.stage import EngineStage
from torchship.tensors import Array, Signature, Tensors


class Spiky(EngineStage):
    """Doubles; 666 loses its device. Counts how often it is asked to give memory back."""

    def __init__(self) -> None:
        super().__init__(self.double, signature=Signature.parse("x:FP32[-1] -> y:FP32[-1]"))
        self.trims = 0

    def double(self, tensors: Tensors) -> list[Array]:
        if (tensors["x"] == 666).any():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [tensors["x"] * 2]

    def trim(self) -> None:
        self.trims += 1


class Worker:
    """A loop in a thread, and the host's end of its socket."""

    def __init__(self) -> None:
        self.stage, self.ended = Spiky(), ""
        self.sock, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.arena = Arena.make(depth=1, input_size=64, output_size=64)
        self.inbox = Inbox(self.sock)
        loop = WorkerLoop(StageRunner(self.stage), arena=self.arena, sock=self.theirs, private=False)
        self.thread = threading.Thread(target=self._work, args=(loop,))
        self.thread.start()

    def _work(self, loop: WorkerLoop) -> None:
        try:
            loop.work()
        except SystemExit as end:
            self.ended = str(end)

    def ask(self, order: Order) -> BatchDone | Pong:
        send(self.sock, encode(order))
        report = decode_report(self.inbox.next()[0])
        assert isinstance(report, BatchDone | Pong)
        return report

    def run(self, *values: float) -> BatchDone:
        array = np.array(values, np.float32)
        block = arena.write([array], memory=self.arena.region.memory, offset=self.arena.input_span(0)[0])
        report = self.ask(RunBatch(1, 0, [PackedCall([len(values)], [block])]))
        assert isinstance(report, BatchDone)
        return report


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    if made.thread.is_alive():
        send(made.sock, encode(Stop()))
    made.thread.join(10)
    made.sock.close()
    made.theirs.close()
    made.arena.region.close()


def test_memory_is_given_back_when_the_host_asks_for_a_sign_of_life_and_never_between_batches(worker: Worker) -> None:
    assert [worker.run(1, 2).faults, worker.run(3).faults] == [[], []]
    assert worker.stage.trims == 0
    assert isinstance(worker.ask(Ping(7)), Pong)
    worker.run(1)  # the trim came before it
    assert worker.stage.trims == 1


def test_who_loses_its_device_alone_answers_says_that_it_ends_and_ends(worker: Worker) -> None:
    assert not worker.run(5).last
    done = worker.run(666)
    assert done.last
    assert "illegal memory access" in done.faults[0].message
    worker.thread.join(10)
    assert "illegal memory access" in worker.ended
