"""Convolutions with bias, residual and ReLU as one kernel on a CUDA card: cuDNN's graph engines, or Triton's product.

torch and inductor leave the additions after a cuDNN convolution to a kernel of their own, which reads and writes every
activation once more; for ResNets that is a third of the bytes. For each convolution and shape the candidates are timed:
every plan that cuDNN's heuristics offer, a Triton product for 1x1 convolutions that add a residual, and plain torch.
cuDNN graph API: https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
import triton
from torch.fx import GraphModule, Node

from torchship.errors import CorruptArtifact
from torchship.lowering import cuda, triton_kernels
from torchship.lowering.surgery import Wiring

Run = Callable[["FusedConv", torch.Tensor, "torch.Tensor | None", torch.Tensor], None]  # x, residual, answer's place
_aten = torch.ops.aten
_ADDS = (_aten.add.Tensor, _aten.add_.Tensor, operator.add, operator.iadd)
_RELUS = (_aten.relu.default, _aten.relu_.default)
_PLAIN, _CUDNN, _TRITON = "torch", "cudnn", "triton"
_MOST_PLANS = 6  # of those that cuDNN expects most of; each takes a tenth of a second to build
_TILES = ((128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 4), (64, 64, 4, 3), (128, 256, 8, 3), (256, 64, 8, 3))
_DEPTH = 64  # of a tile of the product
_IMAGE, _WEIGHT, _BIAS, _RESIDUAL, _ANSWER = range(1, 6)  # the names of a plan's tensors


class FusedConv(torch.nn.Module):
    """relu(conv2d(x, weight) + bias + residual), the last two where there are such, in channels-last half precision."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, wiring: tuple[Any, ...], relu: bool, tuned: Tuned
    ) -> None:
        """All layers of a model share `tuned`, so that equal ones are timed once."""
        super().__init__()
        self.stride, self.padding, self.dilation = wiring
        self.relu = relu
        self.weight = torch.nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        made = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
        self.bias = torch.nn.Parameter(made, requires_grad=False)
        self._tuned = tuned

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` and `residual` as torch.conv2d and its answer have them; in whatever memory layout they come."""
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        out = self._empty(x)
        run = self._tuned.run_for(self, x, residual, out) if x.is_cuda else _plain
        run(self, x, residual, out)
        return out

    def _empty(self, x: torch.Tensor) -> torch.Tensor:
        sizes = zip(x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        height, width = [(n + 2 * pad - far * (k - 1) - 1) // step + 1 for n, k, step, pad, far in sizes]
        shape = (x.shape[0], self.weight.shape[0], height, width)
        return torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)

    def key(self, x: torch.Tensor, residual: torch.Tensor | None) -> str:
        """What a choice depends on: equal layers share it."""
        wiring = (tuple(x.shape), tuple(self.weight.shape), self.stride, self.padding, self.dilation)
        return f"{wiring} residual={residual is not None} relu={self.relu}"

    @property
    def is_product(self) -> bool:
        """Whether it is a product of matrices that Triton's kernel takes."""
        alone = self.weight.shape[2:] == (1, 1) and tuple(self.stride) == (1, 1) and not any(self.padding)
        return alone and self.weight.shape[1] % _DEPTH == 0


class Tuned:
    """What is fastest for each convolution and shape: as an artifact says, or else found out by timing.

    `names` are the choices by key, `plans` cuDNN's compiled kernels where it was chosen, in its own format: 4 ms to
    read where building one takes 80.
    """

    def __init__(self, names: Mapping[str, str] = {}, plans: Mapping[str, bytes] = {}) -> None:
        self.names, self.plans = dict(names), dict(plans)
        self._runs: dict[str, Run] = {}

    def run_for(self, conv: FusedConv, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> Run:
        """How to run `conv` on tensors of these shapes. Raises CorruptArtifact for a plan of another cuDNN or card."""
        key = conv.key(x, residual)
        if key not in self._runs:
            if key not in self.names:
                self._tune(key, conv, x, residual, out)
            kind, _, number = self.names[key].partition(" ")
            if kind == _CUDNN:
                self._runs[key] = _planned(self.plans[key], x.device)
            else:
                self._runs[key] = _product(int(number)) if kind == _TRITON else _plain
        return self._runs[key]

    def _tune(
        self, key: str, conv: FusedConv, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        times: dict[str, float] = {}
        plans: dict[str, bytes] = {}
        for name, run, plan in _candidates(conv, x, residual, out):
            try:
                times[name] = cuda.median_ms(functools.partial(run, conv, x, residual, out), runs=7)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # an engine that does not take this shape says so when it runs
                torch.cuda.synchronize()
            plans[name] = plan
        best = self.names[key] = min(times, key=times.__getitem__)
        if plans[best]:
            self.plans[key] = plans[best]


def _candidates(
    conv: FusedConv, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor
) -> Iterator[tuple[str, Run, bytes]]:
    yield _PLAIN, _plain, b""
    with suppress(RuntimeError):  # cuDNN has no engine for the whole of it
        for index, plan in _plans(conv, x, residual, out):
            yield f"{_CUDNN} {index}", _planned(plan, x.device), plan
    if conv.is_product and residual is not None:
        for number in range(len(_TILES)):
            yield f"{_TRITON} {number}", _product(number), b""


def _plain(conv: FusedConv, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> None:
    answer = torch.nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)
    if residual is not None:
        answer += residual
    out.copy_(answer.relu_() if conv.relu else answer)


def _product(number: int) -> Run:
    rows, columns, warps, stages = _TILES[number]

    def run(conv: FusedConv, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> None:
        out_channels, depth = conv.weight.shape[:2]
        places = x.numel() // depth
        grid = (triton.cdiv(places, rows) * triton.cdiv(out_channels, columns),)
        triton_kernels.product[grid](
            x, conv.weight, conv.bias, residual, out, places, out_channels, depth,
            ROWS=rows, COLUMNS=columns, DEPTH=_DEPTH, RELU=conv.relu, num_warps=warps, num_stages=stages,
        )  # fmt: skip

    return run


def _plans(
    conv: FusedConv, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor
) -> Iterator[tuple[int, bytes]]:
    """The plans that cuDNN offers for one fused convolution of one shape, built, the most promising first.

    Raises RuntimeError (cudnn's own) where cuDNN has no engine for it.
    """
    cudnn = _cudnn()
    half, full = cudnn.data_type.HALF, cudnn.data_type.FLOAT
    narrow = half if x.dtype == torch.float16 else cudnn.data_type.BFLOAT16
    graph = cudnn.pygraph(
        handle=_handle(x.device.index), io_data_type=narrow, intermediate_data_type=full, compute_data_type=full
    )
    channels = conv.weight.shape[0]
    image, weight = graph.tensor_like(x).set_uid(_IMAGE), graph.tensor_like(conv.weight).set_uid(_WEIGHT)
    strides = [channels, 1, channels, channels]
    bias = graph.tensor(name="bias", dim=[1, channels, 1, 1], stride=strides, data_type=narrow).set_uid(_BIAS)
    answer = graph.conv_fprop(
        image=image, weight=weight, padding=list(conv.padding), stride=list(conv.stride), dilation=list(conv.dilation)
    )
    answer = graph.bias(name="add_bias", input=answer, bias=bias)
    if residual is not None:
        answer = graph.add(a=answer, b=graph.tensor_like(residual).set_uid(_RESIDUAL))
    if conv.relu:
        answer = graph.relu(input=answer)
    answer.set_output(True).set_data_type(narrow).set_uid(_ANSWER)
    answer.set_dim(list(out.shape)).set_stride(list(out.stride()))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B])
    graph.check_support()
    for index in range(min(graph.get_execution_plan_count(), _MOST_PLANS)):
        with suppress(Exception):  # one that cannot be built is no candidate
            graph.build_plan_at_index(index)
            yield index, graph.serialize(as_bytes=True)


def _planned(plan: bytes, device: torch.device) -> Run:
    """A built plan of cuDNN's. Raises CorruptArtifact where this cuDNN or this card does not take it."""
    cudnn, handle = _cudnn(), _handle(device.index)
    graph = cudnn.pygraph(handle=handle)
    try:
        graph.deserialize(plan)
    except RuntimeError as fault:
        text = f"a plan of cuDNN's cannot be read: {' '.join(str(fault).split())[:200]}"
        raise CorruptArtifact(text, hint="another cuDNN or card made it: optimize the model again") from fault
    room = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=device)
    stream: Any = torch.cuda.current_stream

    def run(conv: FusedConv, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> None:
        cudnn.set_stream(handle=handle, stream=stream(device).cuda_stream)
        given = {_IMAGE: x, _WEIGHT: conv.weight, _BIAS: conv.bias.reshape(1, -1, 1, 1), _ANSWER: out}
        graph.execute(given if residual is None else given | {_RESIDUAL: residual}, room, handle=handle)

    return run


def _cudnn() -> Any:
    import cudnn

    return cudnn


@functools.cache
def _handle(index: int) -> Any:
    with torch.cuda.device(index):
        return _cudnn().create_handle()


class MaxPool(torch.nn.Module):
    """torch.max_pool2d in channels-last memory; torch's own kernel reads it seven times slower than the card could."""

    def __init__(self, size: tuple[int, int], step: tuple[int, int], pad: tuple[int, int]) -> None:
        super().__init__()
        self.size, self.step, self.pad = size, step, pad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [n, c, h, w]."""
        if not x.is_cuda:
            return torch.nn.functional.max_pool2d(x, self.size, self.step, self.pad)
        x = x.contiguous(memory_format=torch.channels_last)
        rows, channels, height, width = x.shape
        tall, broad = [
            (n + 2 * pad - k) // step + 1
            for n, k, step, pad in zip((height, width), self.size, self.step, self.pad, strict=True)
        ]
        shape = (rows, channels, tall, broad)
        out = torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
        block = min(triton.next_power_of_2(channels), 256)
        grid = (triton.cdiv(rows * tall * broad, 16), triton.cdiv(channels, block))
        triton_kernels.max_pool[grid](
            x, out, rows * tall * broad, channels, height, width, tall, broad,
            *self.step, *self.pad, TALL=self.size[0], BROAD=self.size[1], PLACES=16, CHANNELS=block,
        )  # fmt: skip
        return out


def fuse(module: GraphModule, tuned: Tuned) -> list[FusedConv]:
    """Put fused convolutions and pooling into an exported graph module in half precision, in place; returns the former.

    `tuned` says what is fastest, and is filled where it does not know yet. What reads or writes an
    intermediate value, groups, or pads by a word is left alone.
    """
    made: list[FusedConv] = []
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _aten.conv2d.default and (found := _fused(module, node, tuned)) is not None:
            conv, chain, residual = found
            name = f"fused_conv_{len(made)}"
            module.add_submodule(name, conv)
            _replace(graph, chain, name, (node.args[0], *([residual] if residual is not None else [])))
            made.append(conv)
        elif node.target is _aten.max_pool2d.default and _is_half(node) and len(node.args) <= 4:
            size, step, pad = (_pair(value) for value in (*node.args[1:], *[()] * (4 - len(node.args))))
            module.add_submodule(f"fused_{node.name}", MaxPool(size or (1, 1), step or size or (1, 1), pad or (0, 0)))
            _replace(graph, [node], f"fused_{node.name}", (node.args[0],))
    graph.eliminate_dead_code()
    module.recompile()
    return made


def _fused(module: GraphModule, node: Node, tuned: Tuned) -> tuple[FusedConv, list[Node], Node | None] | None:
    """The layer in the place of a convolution and what follows it alone, all these nodes, and the residual."""
    given: list[Any] = [*node.args, *[None] * (7 - len(node.args))]
    _, weight, bias, stride, padding, dilation, groups = given
    tensors = [part.op == "get_attr" for part in (weight, bias) if isinstance(part, Node)]
    if not _is_half(node) or not tensors or not all(tensors) or (groups or 1) != 1 or isinstance(padding, str):
        return None
    chain, residual = [node], None
    add = Wiring.only_user(node)
    if add is not None and add.target in _ADDS and add.args[0] is node and len(add.args) == 2 and not add.kwargs:
        other = add.args[1]
        if isinstance(other, Node) and _shape(other) == _shape(node) and _is_half(other):
            chain, residual = [node, add], other
    relu = Wiring.only_user(chain[-1])
    if relu is not None and relu.target in _RELUS:
        chain.append(relu)
    wiring = (_pair(stride) or (1, 1), _pair(padding) or (0, 0), _pair(dilation) or (1, 1))
    values: list[Any] = [
        None if part is None else operator.attrgetter(part.target)(module).detach() for part in (weight, bias)
    ]
    relu_last = chain[-1].target in _RELUS
    return FusedConv(*values, wiring=wiring, relu=relu_last, tuned=tuned), chain, residual


def _replace(graph: Any, chain: list[Node], name: str, args: tuple[Any, ...]) -> None:
    """Call the submodule `name` in the place of nodes that feed one another."""
    last = chain[-1]
    with graph.inserting_before(last):
        made = graph.call_module(name, args)
    made.meta = dict(last.meta)
    last.replace_all_uses_with(made)
    for node in reversed(chain):
        graph.erase_node(node)


def _is_half(node: Node) -> bool:
    value = node.meta.get("val")
    return value is not None and value.dtype in (torch.float16, torch.bfloat16) and value.dim() == 4


def _shape(node: Node) -> list[str]:
    return [str(length) for length in node.meta["val"].shape]


def _pair(value: Any) -> tuple[int, int] | tuple[()]:
    if value is None or value == ():
        return ()
    return (value, value) if isinstance(value, int) else (tuple(value) * 2)[:2]
