"""Which layers suffer most from int8: each layer's signal to quantization noise, at the layer and at the outputs.

The model's exported graph is run with one module after another in simulated int8 (inputs unsigned per tensor over
their range on the data, weights signed per output channel), everything else in float. What the outputs lose is
10 log10(|y|^2 / |y - yq|^2) in decibels, as in Wu et al., "Integer Quantization for Deep Learning Inference",
arXiv:2004.09602, section 5.1 (partial quantization), measured on signals instead of the task's metric.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch
from torch.fx import GraphModule, Interpreter, Node

from torchship.difference import relative_error
from torchship.errors import OptimizeError
from torchship.lowering import paths, program, surgery
from torchship.model import Model, to_numpy
from torchship.tensors import Tensors

_LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul",
           "bmm", "mm", "addmm", "scaled_dot_product_attention", "lstm", "gru")  # fmt: skip
_PRODUCTS = ("matmul", "mm", "addmm", "bmm")
_CLEAN = 200.0  # dB where nothing was lost


class LayerNoise(msgspec.Struct, frozen=True):
    """One module: signal to noise in dB at its own output and at the worst of the model's outputs (None: no time)."""

    path: str
    layer_db: float
    output_db: float | None = None

    @property
    def db(self) -> float:
        """What the ranking goes by."""
        return self.layer_db if self.output_db is None else self.output_db


def sensitivity(model: Model, *, rows: int = 8, seconds: float = 60.0, per_channel: bool = True) -> list[LayerNoise]:
    """The modules that hold convolutions and matrix products, worst first, on at most `rows` rows of calibration data.

    Every module's own noise is measured in one pass; then, worst first and for at most `seconds`, its effect on the
    outputs by a pass each. `per_channel`: whether each output channel of a weight has a scale of its own. Paths are
    those of the user's module and fit the option `exclude` of the int8 backends.
    Raises OptimizeError when the model cannot be exported.
    """
    deadline = time.monotonic() + seconds
    graph = program.export(model).module(check_guards=False)
    if not isinstance(graph, GraphModule):
        raise OptimizeError("the exported program is no graph")
    inputs = model.torch_inputs(_few_rows(model, rows))
    by_path: dict[str, list[Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if _is_layer(node):
            by_path[_path(node)].append(node)
    with torch.inference_mode():
        local = _LocalNoise(graph, per_channel)
        wanted = _flat(local.run(*inputs))
        own = {path: min(local.found.get(node, _CLEAN) for node in nodes) for path, nodes in by_path.items()}
        ranked = []
        for path in sorted(own, key=own.__getitem__):
            late = time.monotonic() > deadline
            at_output = None if late else _at_output(graph, local, set(by_path[path]), wanted)
            ranked.append(LayerNoise(path, own[path], at_output))
    return sorted(ranked, key=lambda layer: (layer.output_db is None, layer.db))


def _few_rows(model: Model, rows: int) -> Tensors:
    batch = (model.calibration or model.examples)[0]
    return {name: array[:rows] for name, array in batch.items()} if model.signature.batched else batch


def _is_layer(node: Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("aten.") and _kind(node) in _LAYERS


def _kind(node: Node) -> str:
    return str(node.target).split(".")[1].lstrip("_")


def _path(node: Node) -> str:
    """The user's module that this node came from."""
    return paths.user_path(surgery.place_of(node))


class _LocalNoise(Interpreter):
    """Runs in float; at each layer also computes what int8 would have answered to the same inputs."""

    def __init__(self, graph: GraphModule, per_channel: bool) -> None:
        super().__init__(graph, garbage_collect_values=False)  # later passes start from what this one computed
        self.found: dict[Node, float] = {}
        self.per_channel = per_channel

    def run_node(self, n: Node) -> Any:
        answer = super().run_node(n)
        if _is_layer(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self.found[n] = _noise_of(answer, _quantized_call(n, args, kwargs, self.per_channel))
        return answer


class _OneQuantized(Interpreter):
    """Runs with the nodes of one module in simulated int8."""

    def __init__(self, graph: GraphModule, chosen: set[Node], per_channel: bool) -> None:
        super().__init__(graph)
        self._chosen, self._per_channel = chosen, per_channel

    def run_node(self, n: Node) -> Any:
        if n not in self._chosen:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return _quantized_call(n, args, kwargs, self._per_channel)


def _at_output(graph: GraphModule, floats: _LocalNoise, chosen: set[Node], wanted: Sequence[torch.Tensor]) -> float:
    """What the outputs lose when only `chosen` is quantized; everything before it is taken from the float pass."""
    before: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if node in chosen:
            break
        before[node] = floats.env[node]
    return _noise_of(wanted, _OneQuantized(graph, chosen, floats.per_channel).run(initial_env=before))


def _noise_of(wanted: Any, found: Any) -> float:
    """The worst of an answer's tensors."""
    return min((noise_db(w, f) for w, f in zip(_flat(wanted), _flat(found), strict=True)), default=_CLEAN)


def _quantized_call(node: Node, args: Sequence[Any], kwargs: dict[str, Any], per_channel: bool) -> Any:
    """The node's operator on tensors that went through eight bits; a weight is a tensor the graph itself holds."""
    operator: Callable[..., Any] = node.target  # type: ignore[assignment]
    kind, quantized = _kind(node), list(args)
    for position, (value, origin) in enumerate(zip(args, node.args, strict=True)):
        if isinstance(value, list | tuple) and position == 2:  # the weights and biases of a recurrent layer
            quantized[position] = [_weight(v, 0, per_channel) if _is_matrix(v) else v for v in value]
        if not _is_float(value) or position == _bias_position(kind):
            continue
        axis = value.ndim - 1 if kind in _PRODUCTS else int(kind.startswith("conv_transpose"))
        held = isinstance(origin, Node) and origin.op == "get_attr"
        quantized[position] = _weight(value, axis, per_channel) if held else round_unsigned(value)
    return operator(*quantized, **kwargs)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_matrix(value: Any) -> bool:
    return _is_float(value) and value.ndim == 2


def _weight(value: torch.Tensor, axis: int, per_channel: bool) -> torch.Tensor:
    return round_signed(value, axis=axis) if per_channel else round_signed(value.unsqueeze(0), axis=0)[0]


def _bias_position(kind: str) -> int:
    return 0 if kind == "addmm" else -1 if kind in (*_PRODUCTS, "scaled_dot_product_attention") else 2


def round_unsigned(value: torch.Tensor) -> torch.Tensor:
    """`value` through unsigned int8 over its own range, one scale for the tensor."""
    if not value.numel():
        return value
    low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    return (torch.clamp(torch.round(value / scale) + round(-low / scale), 0, 255) - round(-low / scale)) * scale


def round_signed(value: torch.Tensor, *, axis: int) -> torch.Tensor:
    """`value` through signed int8 with one symmetric scale for each channel along `axis`."""
    others = [i for i in range(value.ndim) if i != axis]
    peak = value.abs().amax(others, keepdim=True) if others else value.abs()
    scale = peak.clamp(min=1e-12) / 127
    return torch.clamp(torch.round(value / scale), -127, 127) * scale


def noise_db(wanted: Any, found: Any) -> float:
    """10 log10 of signal over noise power; 200 where there is no noise."""
    if not isinstance(wanted, torch.Tensor) or not wanted.is_floating_point():
        return _CLEAN
    error = relative_error(to_numpy(wanted), to_numpy(found))
    return max(-_CLEAN, min(_CLEAN, -20 * math.log10(error))) if error > 0 else _CLEAN


def _flat(answer: Any) -> list[torch.Tensor]:
    return [answer] if isinstance(answer, torch.Tensor) else [value for value in answer if value is not None]
