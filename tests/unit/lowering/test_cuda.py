"""Batch sizes on a card and what happens when its memory ends; the card itself is a stand-in here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from torchship.errors import BadInput, Unavailable
from torchship.lowering import cuda, program, torch_stage
from torchship.lowering.cuda import CudaStage, batch_sizes, lacks_memory
from torchship.tensors import Signature


def test_batch_sizes_are_powers_of_two_and_the_limit() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert batch_sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]


class Small(CudaStage):
    """A stage on a card that holds `room` rows at once; it doubles them."""

    def __init__(self, signature: Signature, room: int) -> None:
        super().__init__(lambda x: (x * 2,), signature=signature, device="cuda")
        self.room, self.ran = room, list[int]()

    def _run(self, arrays: Sequence[Any]) -> list[torch.Tensor]:
        rows = arrays[0].shape[0]
        if rows > self.room:
            raise torch.OutOfMemoryError("Tried to allocate 596.05 GiB. Process 4711 has 3.1 GiB memory in use.")
        self.ran.append(rows)
        return [torch.from_numpy(arrays[0]) * 2]


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


class Late(CudaStage):
    """A stage whose buffers lie in the host's memory."""

    def _rooms(self, shapes: tuple[tuple[Any, ...], ...]) -> list[torch.Tensor]:
        return [torch.zeros(shape) for shape in shapes]

    @property
    def sizes(self) -> list[int]:
        return self._sizes


SIGNATURE = Signature.parse("x:FP32[n,3] -> y:FP32[n,3]")


def test_a_batch_without_memory_is_halved_and_the_limit_is_remembered() -> None:
    stage = Small(SIGNATURE, room=20)
    x = np.arange(64 * 3, dtype=np.float32).reshape(64, 3)
    np.testing.assert_array_equal(stage({"x": x})["y"], x * 2)
    assert stage.ran == [16, 16, 16, 16]
    stage.ran.clear()
    np.testing.assert_array_equal(stage({"x": x[:40]})["y"], x[:40] * 2)
    assert stage.ran == [16, 16, 8], "no larger batch is tried again"


def test_one_row_without_memory_says_so_and_nothing_about_others() -> None:
    stage = Small(SIGNATURE, room=0)
    with pytest.raises(Unavailable) as caught:
        stage({"x": np.zeros((4, 3), np.float32)})
    assert "4711" not in caught.value.line
    assert "no memory left" in caught.value.line
    assert caught.value.retry_after > 0
    stage.room = 4
    assert stage({"x": np.ones((1, 3), np.float32)})["y"].tolist() == [[2.0, 2.0, 2.0]], "it lives on"


def told_by(kind: type[BaseException], text: str, *, before: BaseException | None = None) -> BaseException:
    fault = kind(text)
    fault.__context__ = before
    return fault


@pytest.mark.parametrize(
    ("fault", "lacks"),
    [
        (torch.OutOfMemoryError("whatever"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (told_by(RuntimeError, "operation failed in capture", before=torch.OutOfMemoryError("no")), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (told_by(BadInput, "no", before=KeyError("x")), False),
    ],
)
def test_what_is_a_lack_of_memory(fault: BaseException, lacks: bool) -> None:
    assert lacks_memory(fault) is lacks


def test_other_errors_of_a_card_are_no_lack_of_memory() -> None:
    stage = Small(SIGNATURE, room=4)
    stage._run = lambda arrays: (_ for _ in ()).throw(RuntimeError("CUDA error: lost"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="lost"):
        stage({"x": np.zeros((4, 3), np.float32)})
    assert stage._sizes[-1] == 64


@pytest.mark.parametrize(("cached", "given_back"), [(2**20, 0), (2**30, 1)])
def test_a_spike_is_given_back_when_nothing_runs(cached: int, given_back: int, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * 2**30 + cached)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(True))
    Small(SIGNATURE, room=4).trim()
    assert len(freed) == given_back


def test_a_closed_stage_refuses() -> None:
    stage = Small(SIGNATURE, room=4)
    stage.close()
    stage.close()
    with pytest.raises(Unavailable, match="closed"):
        stage({"x": np.zeros((1, 3), np.float32)})


class Sentence(torch.nn.Module):
    """Looks words and kinds up."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = torch.nn.Embedding(50, 4), torch.nn.Embedding(2, 4)

    def forward(self, ids: torch.Tensor, kinds: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.words(ids) + self.kinds(kinds) + shift
        return answer


def test_an_index_beyond_the_table_is_refused_before_the_card_sees_it() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    exported = torch.export.export(Sentence(), (ids, ids.clone(), torch.zeros(1)), strict=False)
    module = exported.module(check_guards=False)
    tables = program.table_sizes(module)
    assert tables == {0: 50, 1: 2}
    signature = Signature.parse("ids:INT64[2,3], kinds:INT64[2,3], shift:FP32[1] -> y:FP32[2,3,4]", batched=False)
    stage = torch_stage.staged(module, signature=signature, tables=tables)
    given = {"ids": np.full((2, 3), 49), "kinds": np.ones((2, 3), np.int64), "shift": np.zeros(1, np.float32)}
    assert stage(given)["y"].shape == (2, 3, 4)
    with pytest.raises(BadInput, match="'ids' holds 50, which is no row of a table with 50 rows") as caught:
        stage(given | {"ids": np.full((2, 3), 50)})
    assert "from 0 to 49" in caught.value.hint
    with pytest.raises(BadInput, match="'kinds' holds -1"):
        stage(given | {"kinds": np.full((2, 3), -1)})


def test_few_threads_feed_a_card_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search measures with all cores: staged copies by sixteen threads wait for one another."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda word: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends, "cudnn", SimpleNamespace())
    for device, threads in (("cuda", 16), ("cuda", 2), ("cpu", 16)):
        torch_stage.prepare(device=device, threads=threads)
    assert asked == [8, 2, 16]


def double(x: torch.Tensor) -> tuple[torch.Tensor]:
    return (x * 2,)


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "warm", lambda body, inputs: body(*inputs))
    graph: Any = SimpleNamespace()
    monkeypatch.setattr(cuda, "record", lambda body, inputs, *, pool: cuda.Captured(graph, inputs, []))


@pytest.mark.usefixtures("no_graphs")
def test_rows_go_into_the_next_larger_size_until_their_own_is_read() -> None:
    go_on = threading.Event()

    def read() -> Any:
        go_on.wait(10)
        return double

    bodies, later = {1: double, 64: double}, {2: read, 4: read}
    stage = Late(double, signature=SIGNATURE, device="cuda", bodies=bodies, later=later)
    assert stage.sizes == [1, 64]
    assert stage._size_for([np.zeros((2, 3))]) == 64
    go_on.set()
    stage.settle()
    assert stage.sizes == [1, 2, 4, 64]
    assert [stage._size_for([np.zeros((rows, 3))]) for rows in (1, 2, 3, 5)] == [1, 2, 4, 64]


@pytest.mark.usefixtures("no_graphs")
def test_a_size_whose_code_cannot_be_read_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Any:
        raise OSError("no such file")

    stage = Late(double, signature=SIGNATURE, device="cuda", bodies={1: double, 64: double}, later={
        2: broken, 4: lambda: double, 128: lambda: pytest.fail("the card had no memory for so many rows"),
    })  # fmt: skip
    stage.settle()
    assert stage.sizes == [1, 4, 64]
    assert "batch size 2 is left out: OSError: no such file" in caplog.text


@pytest.mark.usefixtures("no_graphs")
def test_a_stage_that_is_closed_reads_no_more() -> None:
    begun, go_on, more = threading.Event(), threading.Event(), list[int]()

    def slow() -> Any:
        begun.set()
        go_on.wait(10)
        return double

    later = {2: slow, 4: lambda: more.append(4)}
    stage = Late(double, signature=SIGNATURE, device="cuda", bodies={1: double, 64: double}, later=later)
    begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    stage.close()
    assert not more
    assert stage.sizes == [1, 64]


ENDING = """
import threading, torch
from torchship.lowering import cuda
from torchship.tensors import Signature

class Late(cuda.CudaStage):
    def _rooms(self, shapes):
        return [torch.zeros(shape) for shape in shapes]

def read():
    begun.set()
    threading.main_thread().join()  # the process is about to end
    print("read")
    return body

begun, body = threading.Event(), lambda x: (x,)
torch.cuda.device = lambda _: __import__("contextlib").nullcontext()
cuda.warm, cuda.record = lambda *_: print("warm"), lambda *_, pool: print("recorded")
signature = Signature.parse("x:FP32[n,3] -> y:FP32[n,3]")
stage = Late(body, signature=signature, device="cuda", bodies={1: body, 64: body}, later={2: read, 4: read})
begun.wait(10)
"""


def test_a_process_that_ends_finishes_the_size_at_hand_and_begins_no_other() -> None:
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["read", "warm", "recorded"]
