"""A torch callable on a CUDA card as a Stage: rows are filled up to a few batch sizes, each replayed as a CUDA graph.

Every number of rows of its own would be tuned and captured by itself, which takes most of a second; so a batch goes
into the next larger of 1, 2, 4 ... rows, in buffers that stay. What the added rows answer is thrown away. Code that
takes long to read is read for the smallest and the largest size first; the others follow while the stage answers.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from torchship.errors import BuildFailed, Unavailable
from torchship.lowering import program
from torchship.model import to_numpy, to_torch
from torchship.stage import Parameter, Parameters
from torchship.tensors import Array, Signature, Tensors, numpy_dtype

_log = logging.getLogger("torchship.cuda")
Body = Callable[..., Any]
_SMALL = 1 << 20  # bytes; below this a page-locked buffer saves nothing
_PIECE = 1 << 22  # bytes that are sent while the next ones are copied
_KEPT = 32  # graphs for lengths that were seen before, the oldest goes first
_AGAIN = 1.0  # seconds after which there may be memory again
_CONTEXT = 2**29  # bytes of the card that CUDA takes for each process, beside torch
_IDLE = 2**28  # bytes that may stay cached while nothing runs
_LACK = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_OFTEN = 2  # a shape is captured when it comes for the second time


class Captured(NamedTuple):
    """A CUDA graph with the buffers that it reads and writes; axis 0 is the batch size that it was captured for."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def batch_sizes(limit: int) -> list[int]:
    """1, 2, 4 ... and `limit` itself."""
    return sorted({min(2**power, limit) for power in range(limit.bit_length() + 1)})


class CudaStage:
    """Runs `body(*inputs) -> tuple of tensors`, both in the order of the signature, on one card.

    `graphs`: capture CUDA graphs; at once where only the batch is free, else for lengths that come again. `bodies`
    has the code for single batch sizes, which are then the only ones; `later` reads that of more sizes, beside the
    calls: until a size is there, its rows go into the next larger one. Raises BuildFailed where a body cannot be
    captured.
    """

    def __init__(
        self,
        body: Body,
        *,
        signature: Signature,
        device: str,
        check: bool = False,
        graphs: bool = False,
        bodies: Mapping[int, Body] = {},
        later: Mapping[int, Callable[[], Body]] = {},
        tables: Mapping[int, int] = {},
    ) -> None:
        self.signature = signature
        self.max_batch = signature.max_rows
        self.parameters: tuple[Parameter, ...] = ()
        self._body: Body | None = body
        self._bodies = bodies
        self._device = torch.device(device)
        self._check = check
        self._tables = tables
        self._graphs = graphs
        self._sizes = (sorted(bodies) or batch_sizes(signature.max_rows)) if signature.batched else []
        self._dtypes = [to_torch(np.zeros(1, numpy_dtype(spec.dtype))).dtype for spec in signature.inputs]
        self._captured: OrderedDict[tuple[Any, ...], Captured] = OrderedDict()
        self._seen: Counter[tuple[Any, ...]] = Counter()
        self._pool: Any = None
        self._pinned: dict[int, torch.Tensor] = {}
        self._registered: list[tuple[int, int]] = []
        self._lock = threading.Lock()
        if graphs:
            self._capture_sizes()
        # not a daemon: a process that ends in the middle of a capture is aborted by the driver
        self._later = threading.Thread(target=self._add_sizes, args=(later,), name="batch sizes")
        if later:
            self._later.start()

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        """Run on the host's arrays; answers are arrays of the host.

        Where the card has no memory for all rows, they go in two halves, and no later batch is larger than what
        fitted. Raises Unavailable when one row alone is too much.
        """
        if self._body is None:
            raise Unavailable("the stage is closed")
        if self._check:
            self.signature.check(tensors)
        program.check_indices(self.signature, tensors, self._tables)
        arrays = [tensors[spec.name] for spec in self.signature.inputs]
        with self._lock, torch.inference_mode(), torch.cuda.device(self._device):
            answers = self._in_pieces(arrays)
        return {
            spec.name: np.asarray(to_numpy(answer)).astype(numpy_dtype(spec.dtype), copy=False)
            for spec, answer in zip(self.signature.outputs, answers, strict=True)
        }

    def on_card(self, *given: torch.Tensor) -> list[torch.Tensor]:
        """As a call, for tensors that are on the card, in the order of the signature; the answers stay there."""
        size, rows = self._size_for(given), given[0].shape[0] if self._sizes else 0
        if size > rows:
            given = tuple(torch.cat([one, one[-1:].expand(size - rows, *one.shape[1:])]) for one in given)
        captured = self._captured.get(tuple(tuple(one.shape) for one in given))
        if captured is None:
            answers = _as_list(self._run_body(given))
        else:
            for room, one in zip(captured.inputs, given, strict=True):
                room.copy_(one)
            captured.graph.replay()
            answers = [out.clone() for out in captured.outputs]
        return [answer[:rows] if size > rows else answer for answer in answers]

    def register(self, address: int, size: int) -> None:
        """Page-lock memory of the caller's that inputs will come from, so that they are sent to the card in place.

        Where the driver refuses, they are staged as before.
        """
        with torch.cuda.device(self._device):
            if int(_runtime().cudaHostRegister(address, size, 0)) == 0:
                self._registered.append((address, size))

    def card_memory(self) -> tuple[int, int, int]:
        """Bytes of the card: what this process holds, what is free, and all."""
        free, total = torch.cuda.mem_get_info(self._device)
        return torch.cuda.memory_reserved(self._device) + _CONTEXT, free, total

    def trim(self) -> None:
        """Give the card back what a spike has needed and nothing uses now. Called while nothing runs."""
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        if cached > _IDLE and not self._later.is_alive():
            torch.cuda.empty_cache()

    def settle(self) -> None:
        """Wait until every batch size has its code: before that, times say little."""
        if self._later.ident is not None:  # it was started
            self._later.join()

    def close(self) -> None:
        """Forget the model, and give the card's memory back."""
        if self._body is None:
            return
        self._body, self._bodies = None, {}
        self.settle()
        self._captured.clear()
        self._pinned.clear()
        for address, _ in self._registered:
            _runtime().cudaHostUnregister(address)
        self._registered.clear()
        torch.cuda.empty_cache()

    def _in_pieces(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        rows = arrays[0].shape[0] if self._sizes else 1
        if not self._sizes or rows <= self._sizes[-1]:
            try:
                return self._run(arrays)
            except RuntimeError as fault:
                if not lacks_memory(fault):
                    raise
                self._make_room(fault, rows)
        limit = self._sizes[-1]
        pieces = [self._in_pieces([a[at : at + limit] for a in arrays]) for at in range(0, rows, limit)]
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _make_room(self, fault: BaseException, rows: int) -> None:
        """After a lack of memory: forget what is cached, and take at most half of `rows` from now on."""
        for key in [key for key, found in self._captured.items() if found.inputs[0].shape[0] > max(rows // 2, 1)]:
            del self._captured[key]
        torch.cuda.empty_cache()
        if rows <= 1:
            raise Unavailable(
                "the card has no memory left for this input",
                hint="send a smaller one, or try again later",
                retry_after=_AGAIN,
            ) from fault
        self._sizes = [size for size in self._sizes if size <= rows // 2] or [1]

    def _run(self, arrays: Sequence[Array]) -> list[torch.Tensor]:
        size = self._size_for(arrays)
        shapes = tuple((size, *a.shape[1:]) if size else a.shape for a in arrays)
        captured = self._captured.get(shapes)
        if captured is None and self._graphs:
            self._seen[shapes] += 1
            if self._seen[shapes] >= _OFTEN:
                captured = self._capture(shapes)
        if captured is None:
            inputs = [
                torch.empty(a.shape, dtype=d, device=self._device) for a, d in zip(arrays, self._dtypes, strict=True)
            ]
            for at, (array, room) in enumerate(zip(arrays, inputs, strict=True)):
                self._send(at, to_torch(array), room)
            return _downloaded(_as_list(self._run_body(inputs)))
        self._captured.move_to_end(shapes)
        for at, (room, array) in enumerate(zip(captured.inputs, arrays, strict=True)):
            self._send(at, to_torch(array), room[: array.shape[0]] if size else room)
        captured.graph.replay()
        rows = arrays[0].shape[0] if size else None
        return _downloaded([out[:rows] if out.dim() else out for out in captured.outputs])

    def _size_for(self, arrays: Sequence[Array | torch.Tensor]) -> int:
        """The batch size that the rows are filled up to; 0 for what has no rows."""
        rows = arrays[0].shape[0] if self._sizes else 0
        return next((size for size in self._sizes if size >= rows), rows)

    def _run_body(self, inputs: Sequence[torch.Tensor]) -> Any:
        assert self._body is not None  # noqa: S101  # an open stage has one
        return self._bodies.get(inputs[0].shape[0] if self._sizes else 0, self._body)(*inputs)

    def _capture_sizes(self) -> None:
        """All batch sizes, where nothing else is free; the largest first, so that the others find room in its pool."""
        if not self.signature.fixed:
            return
        lengths: list[Any] = [spec.shape[1:] if self._sizes else spec.shape for spec in self.signature.inputs]
        with torch.inference_mode(), torch.cuda.device(self._device):
            for size in reversed(self._sizes or [0]):
                shapes = tuple((size, *shape) if size else tuple(shape) for shape in lengths)
                try:
                    self._capture(shapes)
                except torch.OutOfMemoryError as fault:
                    self._make_room(fault, size)

    def _add_sizes(self, later: Mapping[int, Callable[[], Body]]) -> None:
        """Read and capture the code of more sizes; calls wait for none of it but the capture itself.

        Without memory the size is left out, as is one whose code fails: the next larger one takes its rows.
        """
        for size, read in sorted(later.items()):
            if self._body is None or size > self._sizes[-1]:  # closed, or there was no memory for so many rows
                return
            if not threading.main_thread().is_alive():  # the process is about to end
                return
            try:
                with torch.inference_mode(), torch.cuda.device(self._device):
                    body = read()
                    inputs = self._rooms(tuple((size, *spec.shape[1:]) for spec in self.signature.inputs))
                    warm(body, inputs)
                    with self._lock:
                        self._add(size, body, inputs)
            except Exception as fault:
                _log.warning("batch size %d is left out: %s", size, program.one_line(fault))

    def _add(self, size: int, body: Body, inputs: list[torch.Tensor]) -> None:
        if self._body is None or size > self._sizes[-1]:
            return
        shapes = tuple(tuple(one.shape) for one in inputs)
        self._captured[shapes] = record(body, inputs, pool=self._pool)
        self._bodies = {**self._bodies, size: body}
        self._sizes = sorted({*self._sizes, size})

    def _rooms(self, shapes: tuple[tuple[Any, ...], ...]) -> list[torch.Tensor]:
        return [
            torch.zeros(shape, dtype=dtype, device=self._device)
            for shape, dtype in zip(shapes, self._dtypes, strict=True)
        ]

    def _capture(self, shapes: tuple[tuple[int, ...], ...]) -> Captured:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        run: Body = lambda *inputs: self._run_body(inputs)  # noqa: E731
        captured = self._captured[shapes] = capture(run, self._rooms(shapes), pool=self._pool)
        while len(self._captured) > _KEPT + len(self._sizes):
            self._captured.popitem(last=False)
        return captured

    def _send(self, at: int, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy to the card. What is large goes by way of page-locked memory, a piece is copied while the one before is
        sent, unless it lies in such memory: straight from pageable memory the bus is hardly used."""
        if source.nbytes < _SMALL or not source.is_contiguous() or self._is_registered(source):
            target.copy_(source, non_blocking=True)
            return
        room = self._pinned.get(at)
        if room is None or room.numel() < source.numel():
            room = self._pinned[at] = torch.empty(source.numel(), dtype=source.dtype, pin_memory=True)
        step = _PIECE // source.element_size()
        flat, sent = source.view(-1), target.view(-1)
        for start in range(0, flat.numel(), step):
            piece = room[start : min(start + step, flat.numel())].copy_(flat[start : start + step])
            sent[start : start + step].copy_(piece, non_blocking=True)

    def _is_registered(self, tensor: torch.Tensor) -> bool:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(address <= start and end <= address + size for address, size in self._registered)


def capture(body: Body, inputs: list[torch.Tensor], *, pool: Any = None) -> Captured:
    """`body(*inputs)` as a CUDA graph that reads these very tensors.

    Raises BuildFailed for what cannot be captured, such as a value that the host waits for; torch.OutOfMemoryError.
    """
    warm(body, inputs)
    return record(body, inputs, pool=pool)


def warm(body: Body, inputs: Sequence[torch.Tensor]) -> None:
    """Run twice beside the current stream: tuning and lazy loading are no part of a graph. Raises as `capture` does."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with _told(), torch.cuda.stream(aside):
        for _ in range(2):
            body(*inputs)
        aside.synchronize()


def record(body: Body, inputs: list[torch.Tensor], *, pool: Any = None) -> Captured:
    """The graph of a body that is warm. Raises as `capture` does."""
    with _told():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = _as_list(body(*inputs))
    return Captured(graph, inputs, outputs)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as fault:
        if lacks_memory(fault):
            raise torch.OutOfMemoryError("the card has no memory for this graph") from fault
        raise BuildFailed(
            f"this model cannot be captured as a CUDA graph: {' '.join(str(fault).split())[:300]}",
            hint="a recipe without graphs runs it",
        ) from fault


def lacks_memory(fault: BaseException | None) -> bool:
    """Whether a card has no memory left: torch says so, a library that it calls, or what came before this error."""
    while fault is not None:
        if isinstance(fault, torch.OutOfMemoryError) or any(word in str(fault) for word in _LACK):
            return True
        fault = fault.__cause__ or fault.__context__
    return False


def graph_ms(body: Body, inputs: list[torch.Tensor]) -> float:
    """The median milliseconds of `body(*inputs)` as a CUDA graph."""
    with torch.inference_mode():
        return median_ms(capture(body, inputs).graph.replay, runs=21)


def median_ms(run: Callable[[], object], *, runs: int) -> float:
    """The median milliseconds of `run` by the card's own clock, after one run that does not count; `runs` is odd."""
    event: Any = torch.cuda.Event
    run()
    torch.cuda.synchronize()
    found = []
    for _ in range(runs):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(float(start.elapsed_time(end)))
    return sorted(found)[runs // 2]


def _runtime() -> Any:
    cuda: Any = torch.cuda
    return cuda.cudart()


def _as_list(answers: Any) -> list[torch.Tensor]:
    return [answers] if isinstance(answers, torch.Tensor) else list(answers)


def _downloaded(answers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies on the host, in page-locked memory; the card has finished when they are there."""
    found = [torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True) for answer in answers]
    for room, answer in zip(found, answers, strict=True):
        room.copy_(answer, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return found
