"""int8 of an ONNX file: static QDQ with unsigned activations and signed weights per channel, or dynamic for MatMul.

Signed activations (S8S8) are 3 to 4 times slower on x86, which multiplies unsigned by signed bytes. ONNX Runtime's
quantizer writes the graph; ranges, bias correction and what to leave out are found here.

Bias correction: Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias
Correction", arXiv:1906.04721, section 4.2: E[Wq x] - E[W x] = (Wq - W) E[x], E[x] measured on calibration data.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from torchship import hardware
from torchship.errors import BadConfig, BuildFailed
from torchship.lowering import onnx_graph, paths, ranges
from torchship.lowering.program import as_error, quiet
from torchship.lowering.ranges import ObservedRange
from torchship.model import Model
from torchship.recipe import Options, choice
from torchship.tensors import Signature, Tensors

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
_BIASED = ("Conv", "Gemm", "MatMul")
_ROWS_AT_ONCE = 4
_FLOAT = 1  # onnx.TensorProto.FLOAT
HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_OPS = {"all": (), "heavy": HEAVY, "light": (*HEAVY, "Add", "MaxPool", "GlobalAveragePool", "ReduceMean")}


def quantize(model: Model, path: Path, *, options: Options, signed: bool = False) -> None:
    """Replace the fp32 file at `path` by its static int8 form, calibrated on the model's data.

    Options: range (minmax | percentile | mse | entropy), percentile (99.99), bias_correction (true | false),
    exclude (path patterns of modules kept in float), modules ({"pattern": "fp32" | "int8"}, see `paths.rules`),
    ops (heavy | light | all: which kinds of nodes), per_channel (true | false: one scale for each output channel of a
    weight, or one for all of it).
    `signed`: symmetric signed activations and float biases, as TensorRT wants.
    Raises BuildFailed with the quantizer's reason, BadConfig for a wrong option.
    """
    import onnx

    method, percentile = str(options.get("range", "minmax")), options.get("percentile", 99.99)
    if not isinstance(percentile, int | float) or not 50 < percentile <= 100:
        raise BadConfig(f"percentile is {percentile!r}", hint="a number above 50, 100 at most")
    choice(options, "ops", tuple(_OPS), of="int8")
    with _quantizing() as folder:
        graph = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
        _name_nodes(graph)
        pieces = chunks(model.calibration or model.examples, signature=model.signature)
        skip = excluded(graph, options, module=model.module)
        wanted = inputs_of_layers(graph, skip=skip) if options.get("bias_correction") else {}
        seen, means = observe(graph, pieces, folder=folder, means=wanted)
        correct(graph, means, skip=skip, per_channel=options.get("per_channel") is not False)
        infinite, users = unbounded(graph, seen)
        found = {
            name: ranges.search(held, method=method, percentile=percentile)
            for name, held in seen.items()
            if name not in infinite
        }
        _write_static(graph, found, path, options=options, skip=[*skip, *users], signed=signed)


@contextmanager
def _quantizing() -> Iterator[Path]:
    """A folder for the files that the quantizer leaves beside what it reads; what it raises becomes BuildFailed."""
    failed = as_error(BuildFailed, "onnxruntime cannot quantize this graph")
    with tempfile.TemporaryDirectory(prefix="torchship-int8-") as folder, quiet(), failed:
        yield Path(folder)


def quantize_dynamic(model: Model, path: Path, *, options: Options) -> None:
    """Replace the fp32 file at `path` by one whose matrix products and LSTMs take int8, quantized as they come.

    Options: exclude, modules. Convolutions stay in float: dynamic int8 makes them several times slower.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as write

    with _quantizing() as folder:
        done = folder / "int8.onnx"
        graph = onnx.load(str(path))
        _name_nodes(graph)
        onnx.save(graph, str(path))
        skip = excluded(graph, options, module=model.module)
        write(
            str(path),
            str(done),
            op_types_to_quantize=["MatMul", "Gemm", "LSTM"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # a Gemm becomes a MatMul of a longer name before the names are compared
            nodes_to_exclude=[full for name in skip for full in (name, f"{name}_MatMul")],
            extra_options={"MatMulConstBOnly": True},
        )
        path.write_bytes(done.read_bytes())


def excluded(graph: Any, options: Options, *, module: torch.nn.Module) -> list[str]:
    """Names of the nodes that belong to parts of `module` which `exclude` or `modules` keep in float.

    Raises BadConfig for a pattern that fits no module.
    """
    if not paths.addressed(options):
        return []
    rules = paths.rules(options, narrow=("int8",), module=module)
    origin, there = onnx_graph.module_paths(graph), {path for path, _ in module.named_modules() if path}
    found = []
    for node in graph.graph.node:
        # a folded batch norm gives its own path to the convolution, whose weight still tells its name
        of_weight = node.input[1].rpartition(".")[0] if len(node.input) > 1 else ""
        if rules.spares(of_weight if of_weight in there else origin.get(node.name, "")):
            found.append(node.name)
    return found


def _name_nodes(graph: Any) -> None:
    for index, node in enumerate(graph.graph.node):
        node.name = node.name or f"node_{index}"


def _write_static(
    graph: Any, found: dict[str, tuple[float, float]], path: Path, *, options: Options, skip: list[str], signed: bool
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry

    limits = {name: (np.array(low, np.float32), np.array(high, np.float32)) for name, (low, high) in found.items()}
    quantizer = QDQQuantizer(
        graph,
        options.get("per_channel") is not False,
        False,  # all eight bits of the weights: VNNI does not overflow
        QuantType.QInt8,
        QuantType.QInt8 if signed else QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, limits),
        [],
        skip,
        list(_OPS[str(options.get("ops", "all"))] or QDQRegistry),
        {
            # what no further int8 node reads stays exact; a convolution's kernel wants its output in int8
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            **({"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False} if signed else {}),
        },
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(path), False)


def chunks(batches: Sequence[Tensors], *, signature: Signature) -> list[Tensors]:
    """The batches in pieces of a few rows, so that all activations at once stay small."""
    if not signature.batched:
        return list(batches)
    return [
        {name: array[start : start + _ROWS_AT_ONCE] for name, array in batch.items()}
        for batch in batches
        for start in range(0, len(next(iter(batch.values()))), _ROWS_AT_ONCE)
    ]


def unbounded(graph: Any, seen: Mapping[str, ObservedRange]) -> tuple[set[str], list[str]]:
    """The tensors that held an infinity, as masks of attention do, and the nodes that read or make one: eight bits have
    no level for it.
    """
    import onnx

    held = {name for name, found in seen.items() if np.isinf(found.low) or np.isinf(found.high)}
    for weight in graph.graph.initializer:
        if weight.data_type == _FLOAT and np.isinf(onnx.numpy_helper.to_array(weight)).any():
            held.add(weight.name)
    return held, [node.name for node in graph.graph.node if held.intersection((*node.input, *node.output))]


def _run(graph: Any, names: Sequence[str], pieces: Sequence[Tensors], *, folder: Path) -> Iterator[Mapping[str, Any]]:
    """The values of the tensors `names` for each piece of data; `folder` takes a temporary file."""
    import onnx
    import onnxruntime as ort

    tapped = onnx.ModelProto()
    tapped.CopyFrom(graph)
    given = {output.name for output in tapped.graph.output}
    tapped.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in names if n not in given)
    path = folder / "tapped.onnx"
    onnx.save(tapped, str(path))
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = hardware.cores()
    session = ort.InferenceSession(str(path), sess_options=settings, providers=["CPUExecutionProvider"])
    wanted = {node.name for node in session.get_inputs()}
    for piece in pieces:
        feed = {name: array for name, array in piece.items() if name in wanted}
        yield dict(zip(names, session.run(list(names), feed), strict=True))


def observe(
    graph: Any, pieces: Sequence[Tensors], *, folder: Path, means: Mapping[str, int] = {}
) -> tuple[dict[str, ObservedRange], dict[str, Any]]:
    """What every float tensor and float input held; and for `means` (tensor: axis) the mean along all other axes.

    The shapes in `graph` must have been inferred.
    """
    made = {name for node in graph.graph.node for name in node.output if name}
    typed = (*graph.graph.value_info, *graph.graph.output)
    names = [info.name for info in typed if info.name in made and info.type.tensor_type.elem_type == _FLOAT]
    inputs = [info.name for info in graph.graph.input if info.type.tensor_type.elem_type == _FLOAT]
    seen = {name: ObservedRange() for name in (*inputs, *names)}
    keep = max(64, ranges.KEPT // max(len(pieces), 1))
    sums: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for piece, values in zip(pieces, _run(graph, names, pieces, folder=folder), strict=True):
        for name, array in (*((name, piece[name]) for name in inputs), *values.items()):
            seen[name].add(array, keep=keep)
            if name in means and array.ndim > means[name] % max(array.ndim, 1):
                axis = means[name] % array.ndim
                others = tuple(i for i in range(array.ndim) if i != axis)
                sums[name] = sums.get(name, 0.0) + np.sum(array, axis=others, dtype=np.float64)
                counts[name] += array.size // max(array.shape[axis], 1)
    return seen, {name: total / max(counts[name], 1) for name, total in sums.items()}


def inputs_of_layers(graph: Any, *, skip: Collection[str] = ()) -> dict[str, int]:
    """The tensors whose channel means are needed, with their channel axis; nodes named in `skip` stay in float."""
    weights = {tensor.name for tensor in graph.graph.initializer}
    return {
        node.input[0]: 1 if node.op_type == "Conv" else -1
        for node in graph.graph.node
        if node.op_type in _BIASED and node.name not in skip
        if node.input[1] in weights and node.input[0] not in weights
    }


def correct(graph: Any, means: dict[str, Array], *, skip: Collection[str] = (), per_channel: bool = True) -> None:
    """Change the biases of the layers of `graph` whose input's mean is known, in place.

    `per_channel`: whether each output channel of a weight has a scale of its own. A MatMul's bias is the constant that
    alone is added to it; one without is left as it is.
    """
    import onnx

    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    uses = Counter(name for node in graph.graph.node for name in node.input)
    for index, node in enumerate(graph.graph.node):
        mean = means.get(node.input[0]) if node.op_type in _BIASED and node.name not in skip else None
        if mean is None or node.input[1] not in tensors:
            continue
        shift = _shift(node, onnx.numpy_helper.to_array(tensors[node.input[1]]), mean, per_channel)
        holder, position = _place_of_bias(graph, node, tensors, uses)
        if shift is None or holder is None:
            continue
        name = holder.input[position] if position < len(holder.input) else ""
        before = onnx.numpy_helper.to_array(tensors[name]) if name else np.zeros_like(shift)
        fresh = f"{name or node.name}_corrected_{index}"
        graph.graph.initializer.append(onnx.numpy_helper.from_array((before - shift).astype(np.float32), fresh))
        if not name:
            holder.input.append(fresh)
            continue
        holder.input[position] = fresh
        if uses[name] == 1:
            graph.graph.initializer.remove(tensors[name])


def _place_of_bias(graph: Any, node: Any, tensors: Mapping[str, Any], uses: Counter[str]) -> tuple[Any, int]:
    """The node that adds a layer's bias, and at which input; no node where the bias is no constant of one axis."""
    if node.op_type != "MatMul":
        given = node.input[2] if len(node.input) > 2 else ""
        return (None, 0) if given and given not in tensors else (node, 2)
    made = node.output[0]
    after = next((other for other in graph.graph.node if made in other.input), None)
    if after is None or after.op_type != "Add" or uses[made] != 1:
        return None, 0
    position = 1 - list(after.input).index(made)
    bias = tensors.get(after.input[position])
    return (after, position) if bias is not None and len(bias.dims) == 1 else (None, 0)


def _shift(node: Any, weight: Array, mean: Array, per_channel: bool) -> Array | None:
    """Mean change of each output channel; None where the shapes are not those of a plain layer."""
    attributes = {entry.name: entry for entry in node.attribute}
    if node.op_type != "Conv":
        if weight.ndim != 2 or ("transA" in attributes and attributes["transA"].i):
            return None
        matrix = weight if "transB" in attributes and attributes["transB"].i else weight.T
        change = rounding_of(matrix, per_channel=per_channel)
        return change @ mean if change.shape[1] == mean.size else None
    groups = attributes["group"].i if "group" in attributes else 1
    change = rounding_of(weight, per_channel=per_channel).reshape(weight.shape[0], weight.shape[1], -1).sum(axis=2)
    if change.shape[1] * groups != mean.size:
        return None
    per_group = np.repeat(mean.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return np.asarray((change * per_group).sum(axis=1))


def rounding_of(weight: Array, *, per_channel: bool = True) -> Array:
    """What symmetric int8, with a scale for each output channel (axis 0) or one for all, adds to `weight`."""
    flat = weight.reshape(weight.shape[0], -1).astype(np.float64)
    peak = np.abs(flat).max(axis=1, keepdims=True) if per_channel else np.abs(flat).max()
    scale = np.maximum(peak, 1e-12) / 127
    return np.asarray((np.clip(np.rint(flat / scale), -127, 127) * scale - flat).reshape(weight.shape))
