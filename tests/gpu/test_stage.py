"""CudaStage on a real card: batch sizes, graphs, precision, indices, memory that ends or is page-locked."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.models import (
    CARD,
    ON_CARD,
    SHAPES,
    Convolutions,
    Perceptron,
    Recurrent,
    answer_of,
    error,
    expected,
    module,
    rows_for,
)
from torchship.errors import BadInput, Unavailable
from torchship.lowering import torch_stage
from torchship.lowering.cuda import CudaStage
from torchship.serve.ipc.memory import MemoryRegion
from torchship.tensors import Signature

pytestmark = ON_CARD
MIB = 2**20


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch_stage.prepare(device=CARD, threads=0)
    yield
    gc.collect()
    torch.cuda.empty_cache()


def signature_of(kind: type[torch.nn.Module]) -> Signature:
    shape = ",".join(map(str, SHAPES[kind]))
    answer = "[n,6,16]" if kind is Recurrent else "[n,8]"
    return Signature.parse(f"x:FP32[n:1..8,{shape}] -> y:FP32{answer}")


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("kind", [Perceptron, Convolutions, Recurrent])
def test_every_number_of_rows_is_answered_as_eager_does(kind: type[torch.nn.Module], graphs: bool) -> None:
    body = module(kind).to(CARD)
    stage = CudaStage(lambda x: (body(x),), signature=signature_of(kind), device=CARD, graphs=graphs)
    captured = {shapes[0][0] for shapes in stage._captured}
    assert captured == ({1, 2, 4, 8} if graphs else set())
    for rows in (3, 8, 1, 5, 2, 7, 3):
        x = rows_for(kind, rows)
        assert error(answer_of(stage, {"x": x}), expected(kind, x)) < 1e-5
    assert {shapes[0][0] for shapes in stage._captured} == captured, "no other size is captured while it serves"
    stage.close()


def test_a_free_length_is_captured_when_it_comes_again() -> None:
    signature = Signature.parse("x:FP32[n:1..4,len,32] -> y:FP32[n,len,8]")
    body = module(Perceptron).to(CARD)
    stage = CudaStage(lambda x: (body(x),), signature=signature, device=CARD, graphs=True)
    seen = []
    for length in (5, 6, 5, 5, 6):
        x = np.random.default_rng(length).standard_normal((2, length, 32), dtype=np.float32)
        with torch.inference_mode():
            wanted = module(Perceptron)(torch.from_numpy(x)).numpy()
        assert error(answer_of(stage, {"x": x}), wanted) < 1e-5
        seen.append(len(stage._captured))
    assert seen == [0, 0, 1, 1, 2]
    stage.close()


def products(tf32: bool) -> tuple[float, float]:
    """The relative errors of a product of matrices and of a convolution."""
    torch_stage.prepare(device=CARD, threads=0, tf32=tf32)
    torch.manual_seed(0)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    pictures, filters = torch.randn(8, 64, 56, 56), torch.randn(64, 64, 3, 3)
    product = (a.to(CARD) @ b.to(CARD)).cpu().double()
    folded = torch.nn.functional.conv2d(pictures.to(CARD), filters.to(CARD)).cpu().double()
    wanted = torch.nn.functional.conv2d(pictures.double(), filters.double())
    return error(product.numpy(), (a.double() @ b.double()).numpy()), error(folded.numpy(), wanted.numpy())


def test_fp32_is_fp32_and_tf32_is_asked_for() -> None:
    assert max(products(tf32=False)) < 3e-5
    if torch.cuda.get_device_capability()[0] >= 8:
        assert products(tf32=True)[0] > 1e-4


def test_an_index_beyond_the_table_never_reaches_the_card() -> None:
    table = torch.nn.Embedding(50, 4).to(CARD)
    signature = Signature.parse("ids:INT64[n:1..4,3] -> y:FP32[n,3,4]")
    stage = CudaStage(lambda ids: (table(ids),), signature=signature, device=CARD, graphs=True, tables={0: 50})
    for wrong in (50, -1):
        with pytest.raises(BadInput, match=f"'ids' holds {wrong}"):
            stage({"ids": np.full((2, 3), wrong)})
        assert answer_of(stage, {"ids": np.full((2, 3), 49)}).shape == (2, 3, 4), "the process is sound"
    stage.close()


@pytest.fixture
def small_card() -> Iterator[None]:
    """No more than 512 MiB of the card beyond what is taken."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 512 * MIB) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def hungry(mib: int) -> Any:
    """Takes so many MiB for each row, and doubles."""

    def body(x: torch.Tensor) -> tuple[torch.Tensor]:
        taken = torch.zeros(x.shape[0], mib * MIB, dtype=torch.uint8, device=x.device)
        return (x * 2 + taken[:, :1],)

    return body


@pytest.mark.usefixtures("small_card")
@pytest.mark.parametrize("graphs", [True, False])
def test_without_memory_a_batch_is_halved_and_then_refused_without_a_word_about_others(graphs: bool) -> None:
    signature = Signature.parse("x:FP32[n:1..8,1] -> y:FP32[n,1]")
    x = np.arange(8, dtype=np.float32).reshape(8, 1)
    stage = CudaStage(hungry(150), signature=signature, device=CARD, graphs=graphs)
    np.testing.assert_array_equal(answer_of(stage, {"x": x}), x * 2)
    sizes = list(stage._sizes)
    assert max(sizes) <= 2, "300 MiB fit; beside the memory of the graph's rehearsal, 150"
    np.testing.assert_array_equal(answer_of(stage, {"x": x}), x * 2)
    assert stage._sizes == sizes, "what fitted is remembered"
    stage.close()
    body = hungry(1024)
    stage = CudaStage(body, signature=signature, device=CARD)
    for _ in range(2):
        with pytest.raises(Unavailable, match="no memory left") as caught:
            stage({"x": x})
        assert not any(word in caught.value.line for word in ("rocess", "MiB", "GiB", "PID"))
    stage.close()


def test_a_spike_is_given_back_when_nothing_runs() -> None:
    signature = Signature.parse("x:FP32[n:1..8,1] -> y:FP32[n,1]")
    stage = CudaStage(hungry(300), signature=signature, device=CARD)
    assert answer_of(stage, {"x": np.ones((4, 1), np.float32)}).tolist() == [[2.0]] * 4
    held, _, total = stage.card_memory()
    assert 1200 * MIB < held < total
    stage.trim()
    assert stage.card_memory()[0] < held - 1000 * MIB
    assert answer_of(stage, {"x": np.ones((1, 1), np.float32)}).tolist() == [[2.0]]
    stage.close()


def test_a_registered_arena_is_sent_from_where_it_lies() -> None:
    signature = Signature.parse("x:FP32[n:1..8,65536] -> y:FP32[n,65536]")
    region = MemoryRegion.make(4 * MIB)
    stage = CudaStage(lambda x: (x * 2,), signature=signature, device=CARD, graphs=True)
    stage.register(np.frombuffer(region.memory, np.uint8).ctypes.data, len(region.memory))
    assert len(stage._registered) == 1, "the driver takes memory of a memfd"
    for number in range(1, 4):
        x = np.ndarray((8, 65536), np.float32, region.memory)
        x[:] = number
        assert (answer_of(stage, {"x": x}) == number * 2).all()
    assert not stage._pinned, "nothing was staged"
    stage.close()
    del x
    gc.collect()
    region.close()
