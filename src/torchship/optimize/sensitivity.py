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
from torch.utils import _pytree as pytree

from torchship.difference import relative_error
from torchship.errors import OptimizeError
from torchship.lowering import paths, program, surgery
from torchship.model import Model, to_numpy

_LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "matmul",
           "bmm", "mm", "addmm", "scaled_dot_product_attention", "lstm", "gru")  # fmt: skip
_PRODUCTS = ("matmul", "mm", "addmm", "bmm")
_BIASES = {"addmm": 0} | {kind: 2 for kind in _LAYERS if kind.startswith("conv") or kind in ("linear", "lstm", "gru")}
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
    batch = (model.calibration or model.examples)[0]
    if model.signature.batched:
        batch = {name: array[:rows] for name, array in batch.items()}
    layers: dict[str, set[Node]] = defaultdict(set)  # by the path of the user's module that they came from
    for node in graph.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("aten.") and _kind(node) in _LAYERS:
            layers[paths.user_path(surgery.place_of(node))].add(node)
    every = {node for nodes in layers.values() for node in nodes}
    with torch.inference_mode():
        # values are kept, for later passes start from what this one computed
        floats = _Quantized(graph, every, per_channel, garbage_collect_values=False)
        wanted = floats.run(*model.torch_inputs(batch))
        own = {path: min(floats.noise[node] for node in nodes) for path, nodes in layers.items()}
        ranked = []
        for path in sorted(own, key=own.__getitem__):
            at_output = None
            if time.monotonic() <= deadline:
                chosen, all_nodes = layers[path], list(graph.graph.nodes)
                first = next(place for place, node in enumerate(all_nodes) if node in chosen)
                before = {node: floats.env[node] for node in all_nodes[:first]}
                found = _Quantized(graph, chosen, per_channel, goes_on=True).run(initial_env=before)
                at_output = _noise_of(wanted, found)
            ranked.append(LayerNoise(path, own[path], at_output))
    return sorted(ranked, key=lambda layer: (layer.output_db is None, layer.db))


def _kind(node: Node) -> str:
    return str(node.target).split(".")[1].lstrip("_")


class _Quantized(Interpreter):
    """Computes what the `chosen` layers would answer in int8 to what they are given, and how far off that is (`noise`);
    the rest `goes_on` with these answers, or with the exact ones.
    """

    def __init__(
        self,
        graph: GraphModule,
        chosen: set[Node],
        per_channel: bool,
        *,
        goes_on: bool = False,
        garbage_collect_values: bool = True,
    ) -> None:
        super().__init__(graph, garbage_collect_values)
        self._chosen, self._per_channel, self._goes_on = chosen, per_channel, goes_on
        self.noise: dict[Node, float] = {}

    def run_node(self, n: Node) -> Any:
        if n not in self._chosen:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        found = _quantized_call(n, args, kwargs, self._per_channel)
        if self._goes_on:
            return found
        answer = super().run_node(n)
        self.noise[n] = _noise_of(answer, found)
        return answer


def _noise_of(wanted: Any, found: Any) -> float:
    """The worst of an answer's tensors."""
    pairs = zip(*(pytree.tree_leaves(side) for side in (wanted, found)), strict=True)
    return min((noise_db(w, f) for w, f in pairs), default=_CLEAN)


def _quantized_call(node: Node, args: Sequence[Any], kwargs: dict[str, Any], per_channel: bool) -> Any:
    """The node's operator on tensors that went through eight bits; a weight is a tensor the graph itself holds."""
    operator: Callable[..., Any] = node.target  # type: ignore[assignment]
    kind, quantized = _kind(node), list(args)
    for position, (value, origin) in enumerate(zip(args, node.args, strict=True)):
        if isinstance(value, list | tuple) and position == 2:  # the weights and biases of a recurrent layer
            quantized[position] = [_weight(v, 0, per_channel) if _is_float(v) and v.ndim == 2 else v for v in value]
        if not _is_float(value) or position == _BIASES.get(kind):
            continue
        axis = value.ndim - 1 if kind in _PRODUCTS else int(kind.startswith("conv_transpose"))
        held = isinstance(origin, Node) and origin.op == "get_attr"
        quantized[position] = _weight(value, axis, per_channel) if held else round_unsigned(value)
    return operator(*quantized, **kwargs)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _weight(value: torch.Tensor, axis: int, per_channel: bool) -> torch.Tensor:
    return round_signed(value, axis=axis) if per_channel else round_signed(value.unsqueeze(0), axis=0)[0]


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
