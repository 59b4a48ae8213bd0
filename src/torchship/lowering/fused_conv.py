"""Convolutions with bias, residual and ReLU as one kernel on a CUDA card: cuDNN's graph engines, or Triton's product.

torch and inductor leave the additions after a cuDNN convolution to a kernel of their own, which reads and writes every
activation once more; for ResNets that is a third of the bytes. For each convolution and shape the candidates are timed:
every plan that cuDNN's heuristics offer, a Triton product for 1x1 convolutions that add a residual, and plain torch.
cuDNN graph API: https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch.fx import GraphModule, Node

from torchship.lowering import cuda, triton_kernels
from torchship.lowering.surgery import Wiring

Run = Callable[[torch.Tensor, "torch.Tensor | None", torch.Tensor], None]  # input, residual, where the answer goes
Choices = dict[str, str]  # what is fastest for a convolution and a shape
_aten = torch.ops.aten
_ADDS = (_aten.add.Tensor, _aten.add_.Tensor, operator.add, operator.iadd)
_RELUS = (_aten.relu.default, _aten.relu_.default)
_PLAIN = "torch"
_MOST_PLANS = 6  # of those that cuDNN expects most of; each takes a tenth of a second to build
_TILES = ((128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 4), (64, 64, 4, 3), (128, 256, 8, 3), (256, 64, 8, 3))
_DEPTH = 64  # of a tile of the product


class FusedConv(torch.nn.Module):
    """relu(conv2d(x, weight) + bias + residual), the last two where there are such, in channels-last half precision."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        wiring: tuple[Any, ...],
        relu: bool,
        choices: Choices,
    ) -> None:
        """`choices` is read and written: all layers of a model share it, so that equal ones are timed once."""
        super().__init__()
        self.stride, self.padding, self.dilation = wiring
        self.relu = relu
        self.weight = torch.nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        made = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
        self.bias = torch.nn.Parameter(made, requires_grad=False)
        self.choices = choices
        self._ready: dict[str, Run] = {}

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`x` and `residual` as torch.conv2d and its answer have them; in whatever memory layout they come."""
        x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        out = self._empty(x)
        self._run_for(x, residual, out)(x, residual, out)
        return out

    def _empty(self, x: torch.Tensor) -> torch.Tensor:
        sizes = zip(x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        height, width = [(n + 2 * pad - far * (k - 1) - 1) // step + 1 for n, k, step, pad, far in sizes]
        shape = (x.shape[0], self.weight.shape[0], height, width)
        return torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)

    def _run_for(self, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> Run:
        if not x.is_cuda:
            return self._plain
        key = self.key(x, residual)
        if key not in self._ready:
            chosen = self.choices.get(key) or self._fastest(x, residual, out)
            self.choices[key] = chosen
            self._ready[key] = self._made(chosen, x, residual, out)
        return self._ready[key]

    def key(self, x: torch.Tensor, residual: torch.Tensor | None) -> str:
        """What a choice depends on: equal layers share it."""
        wiring = (tuple(x.shape), tuple(self.weight.shape), self.stride, self.padding, self.dilation)
        return f"{wiring} residual={residual is not None} relu={self.relu}"

    def _fastest(self, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> str:
        times: dict[str, float] = {}
        for name, run in self._candidates(x, residual, out):
            try:
                times[name] = cuda.median_ms(functools.partial(run, x, residual, out), runs=7)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # an engine that does not take this shape says so when it runs
                torch.cuda.synchronize()
        return min(times, key=times.__getitem__)

    def _candidates(
        self, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor
    ) -> Iterator[tuple[str, Run]]:
        yield _PLAIN, self._plain
        try:
            plans = _Plans(self, x, residual, out)
            for index in range(plans.count):
                if (run := plans.at(index)) is not None:
                    yield f"cudnn {index}", run
        except RuntimeError:  # cuDNN has no engine for the whole of it
            pass
        if self._is_product(residual):
            for number in range(len(_TILES)):
                yield f"triton {number}", self._product(number)

    def _made(self, chosen: str, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> Run:
        kind, _, index = chosen.partition(" ")
        if kind == "cudnn":
            return _Plans(self, x, residual, out).at(int(index)) or self._plain
        return self._product(int(index)) if kind == "triton" else self._plain

    def _plain(self, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> None:
        answer = torch.nn.functional.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        if residual is not None:
            answer += residual
        out.copy_(answer.relu_() if self.relu else answer)

    def _is_product(self, residual: torch.Tensor | None) -> bool:
        alone = self.weight.shape[2:] == (1, 1) and tuple(self.stride) == (1, 1) and not any(self.padding)
        return alone and residual is not None and self.weight.shape[1] % _DEPTH == 0

    def _product(self, number: int) -> Run:
        rows, columns, warps, stages = _TILES[number]
        out_channels, depth = self.weight.shape[:2]
        weight = self.weight.reshape(out_channels, depth)

        def run(x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> None:
            places = x.numel() // depth
            grid = (triton.cdiv(places, rows) * triton.cdiv(out_channels, columns),)
            triton_kernels.product[grid](
                x, weight, self.bias, residual, out, places, out_channels, depth,
                ROWS=rows, COLUMNS=columns, DEPTH=_DEPTH, RELU=self.relu, num_warps=warps, num_stages=stages,
            )  # fmt: skip

        return run


class _Plans:
    """The execution plans that cuDNN offers for one fused convolution of one shape."""

    def __init__(self, conv: FusedConv, x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> None:
        """Raises RuntimeError (cudnn's own) where cuDNN has no engine for it."""
        cudnn = _cudnn()
        half, full = cudnn.data_type.HALF, cudnn.data_type.FLOAT
        narrow = half if x.dtype == torch.float16 else cudnn.data_type.BFLOAT16
        self._graph = graph = cudnn.pygraph(
            handle=_handle(x.device.index), io_data_type=narrow, intermediate_data_type=full, compute_data_type=full
        )
        channels = conv.weight.shape[0]
        image, weight = graph.tensor_like(x), graph.tensor_like(conv.weight)
        strides = [channels, 1, channels, channels]
        bias = graph.tensor(name="bias", dim=[1, channels, 1, 1], stride=strides, data_type=narrow)
        answer = graph.conv_fprop(
            image=image, weight=weight, padding=list(conv.padding), stride=list(conv.stride),
            dilation=list(conv.dilation),
        )  # fmt: skip
        answer = graph.bias(name="add_bias", input=answer, bias=bias)
        added = None
        if residual is not None:
            added = graph.tensor_like(residual)
            answer = graph.add(a=answer, b=added)
        if conv.relu:
            answer = graph.relu(input=answer)
        answer.set_output(True).set_data_type(narrow).set_dim(list(out.shape)).set_stride(list(out.stride()))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B])
        graph.check_support()
        self.count = min(graph.get_execution_plan_count(), _MOST_PLANS)
        self._device = x.device
        bias_values = conv.bias.reshape(1, -1, 1, 1)
        self._feed: Any = lambda x, residual, out: {
            image: x, weight: conv.weight, bias: bias_values, answer: out, **({added: residual} if added else {})
        }  # fmt: skip

    def at(self, index: int) -> Run | None:
        """The plan of that number; None where it cannot be built."""
        cudnn, graph, device = _cudnn(), self._graph, self._device
        try:
            graph.build_plan_at_index(index)
            size = graph.get_workspace_size_plan_at_index(index)
        except Exception:
            return None
        room = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        handle = _handle(device.index)
        stream: Any = torch.cuda.current_stream

        def run(x: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor) -> None:
            cudnn.set_stream(handle=handle, stream=stream(device).cuda_stream)
            graph.execute_plan_at_index(self._feed(x, residual, out), room, index, handle=handle)

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


def fuse(module: GraphModule, choices: Choices) -> list[FusedConv]:
    """Put fused convolutions and pooling into an exported graph module in half precision, in place; returns the former.

    What was fastest before is taken from `choices`, and what is found out is added. What reads or writes an
    intermediate value, groups, or pads by a word is left alone.
    """
    made: list[FusedConv] = []
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _aten.conv2d.default and (found := _fused(module, node, choices)) is not None:
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


def _fused(module: GraphModule, node: Node, choices: Choices) -> tuple[FusedConv, list[Node], Node | None] | None:
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
    return FusedConv(*values, wiring=wiring, relu=relu_last, choices=choices), chain, residual


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
