"""int8 of an ONNX file: static QDQ with unsigned activations and signed weights per channel, or dynamic for MatMul.

Signed activations (S8S8) are 3 to 4 times slower on x86, which multiplies unsigned by signed bytes. ONNX Runtime's
quantizer writes the graph; ranges, bias correction and what to leave out are found here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchship.errors import BadConfig, BuildFailed, TorchshipError
from torchship.lowering import onnx_bias, onnx_graph, onnx_watch, paths, ranges
from torchship.lowering.program import one_line
from torchship.lowering.quiet import quiet
from torchship.model import Model
from torchship.recipe import Options

if TYPE_CHECKING:
    import torch

HEAVY = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_OPS = {"heavy": HEAVY, "light": (*HEAVY, "Add", "MaxPool", "GlobalAveragePool", "ReduceMean"), "all": ()}


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
    kinds = _kinds(options)
    # the quantizer leaves files beside what it reads, so it works in a folder of its own
    with tempfile.TemporaryDirectory(prefix="torchship-int8-") as folder, quiet():
        try:
            graph = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
            _name_nodes(graph)
            pieces = onnx_watch.chunks(model.calibration or model.examples, signature=model.signature)
            per_channel = options.get("per_channel") is not False
            skip = excluded(graph, options, module=model.module)
            wanted = onnx_bias.inputs_of_layers(graph, skip=skip) if options.get("bias_correction") else {}
            seen, means = onnx_watch.observe(graph, pieces, folder=Path(folder), means=wanted)
            onnx_bias.correct(graph, means, skip=skip, per_channel=per_channel)
            unbounded, users = onnx_watch.unbounded(graph, seen)
            found = {
                name: ranges.search(held, method=method, percentile=percentile)
                for name, held in seen.items()
                if name not in unbounded
            }
            _write_static(graph, found, path, kinds=kinds, skip=[*skip, *users], signed=signed, per_channel=per_channel)
        except TorchshipError:
            raise
        except Exception as fault:
            raise BuildFailed(f"onnxruntime cannot quantize this graph: {one_line(fault)}") from fault


def quantize_dynamic(model: Model, path: Path, *, options: Options) -> None:
    """Replace the fp32 file at `path` by one whose matrix products and LSTMs take int8, quantized as they come.

    Options: exclude, modules. Convolutions stay in float: dynamic int8 makes them several times slower.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as write

    with tempfile.TemporaryDirectory(prefix="torchship-int8-") as folder, quiet():
        done = Path(folder) / "int8.onnx"
        try:
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
        except TorchshipError:
            raise
        except Exception as fault:
            raise BuildFailed(f"onnxruntime cannot quantize this graph: {one_line(fault)}") from fault


def _kinds(options: Options) -> list[str]:
    word = str(options.get("ops", "all"))
    if word not in _OPS:
        raise BadConfig(f"ops {word!r} is unknown", hint=f"use one of {', '.join(_OPS)}")
    return list(_OPS[word])


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
    graph: Any,
    found: dict[str, tuple[float, float]],
    path: Path,
    *,
    kinds: list[str],
    skip: list[str],
    signed: bool,
    per_channel: bool = True,
) -> None:
    import numpy as np
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry

    limits = {name: (np.array(low, np.float32), np.array(high, np.float32)) for name, (low, high) in found.items()}
    quantizer = QDQQuantizer(
        graph,
        per_channel,
        False,  # all eight bits of the weights: VNNI does not overflow
        QuantType.QInt8,
        QuantType.QInt8 if signed else QuantType.QUInt8,
        TensorsData(CalibrationMethod.MinMax, limits),
        [],
        skip,
        kinds or list(QDQRegistry),
        {
            # what no further int8 node reads stays exact; a convolution's kernel wants its output in int8
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
            **({"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False} if signed else {}),
        },
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(path), False)
