"""OpenVINO: f32, bf16, or int8 by NNCF; the precision is always spelt out; opens without torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchship.errors import BadConfig, BuildFailed, CorruptArtifact, Unavailable
from torchship.hardware import Hardware, cores
from torchship.lowering.program import as_error, quiet
from torchship.model import Model
from torchship.plugins import missing, needs
from torchship.recipe import Options, Recipe, choice
from torchship.stage import EngineStage, Stage
from torchship.tensors import Array, Free, Signature, Tensors, numpy_dtype

KIND = "data"
PARTS = ("cpu",)  # where it runs parts of a model that stays Python
TRIED = 1  # in this order among the backends: how often it wins
PACKAGES = ("openvino", "nncf", "onnx", "onnxscript")
probe = needs("openvino", pip="openvino nncf")
OPTIONS = ("precision", "rest", "range", "bias_correction", "preset", "transformer", "exclude", "modules", "device")
FILE = "model.xml"
RANGES = ("mean_minmax", "minmax", "percentile", "mse")
_VIRTUAL = ("AUTO", "MULTI", "HETERO", "BATCH")
_PRECISIONS = ("f32", "bf16", "f16", "int8", "int8_weights")


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """Half precision on devices beside the processor; int8 where there is data and NNCF, and bf16 where the processor
    has it, both together and alone; f32; weights in int8, which makes the file small and needs no data.
    """
    import openvino as ov

    wishes: list[Options] = []
    for device in ov.Core().available_devices:
        if not device.startswith("CPU"):
            wishes.append({"device": device, "precision": "f16"})
    half = bool({"avx512_bf16", "amx_bf16"} & set(hardware.features))
    if model.calibration and not missing("nncf"):
        wishes.append({"precision": "int8"})
        wishes += [{"precision": "int8", "rest": "bf16"}] if half else []
    wishes += [{"precision": "bf16"}] if half else []
    wishes.append({"precision": "f32"})
    if not missing("nncf"):
        wishes.append({"precision": "int8_weights"})
    return [Recipe("openvino", wish) for wish in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Write `model.xml` and `model.bin`. Options: precision f32 | bf16 | f16 | int8 (calibrated) | int8_weights (the
    weights alone); for both rest (f32 | bf16: what else is computed in); for int8 range (mean_minmax |
    minmax | percentile | mse), bias_correction (the slow, exact one instead of the fast), preset (performance | mixed;
    mixed where activations are leaky), transformer (true where there is attention), exclude and modules (see
    `lowering.onnx_int8`).

    Raises BuildFailed or BadConfig.
    """
    import openvino as ov

    from torchship.lowering import onnx_graph, paths

    precision = _precision(options)
    if not precision.startswith("int8"):
        paths.refuse_any(options, what=f"openvino in {precision}")
    with tempfile.TemporaryDirectory(prefix="torchship-openvino-") as folder, quiet():
        onnx = Path(folder) / "model.onnx"
        onnx_graph.write(model, onnx)
        with as_error(BuildFailed, "openvino cannot convert this graph"):
            graph = ov.Core().read_model(str(onnx))
            if precision.startswith("int8"):
                if absent := missing("nncf"):
                    raise BuildFailed(f"openvino int8: {absent}")
                quantize = _int8 if precision == "int8" else _int8_weights
                graph = quantize(graph, onnx, model, options)
                _keep_axes(graph)
            ov.save_model(graph, str(out / FILE), compress_to_fp16=precision == "f16")


def _keep_axes(graph: Any) -> None:
    """Let means keep the axes that they take, and drop these after them.

    The CPU plugin runs the scale that NNCF puts behind a mean over axis 1 inside of the mean, and there takes the axis
    that is left for the one that is gone: a pooled transformer answered with an error of 1.3.
    """
    import openvino.opset13 as operators

    for operation in graph.get_ordered_ops():
        if operation.get_type_name() != "ReduceMean" or operation.get_attributes()["keep_dims"]:
            continue
        axes = operation.input_value(1)
        kept = operators.reduce_mean(operation.input_value(0), axes, keep_dims=True)
        dropped = operators.squeeze(kept, axes)
        dropped.set_friendly_name(operation.get_friendly_name())
        for reader in list(operation.output(0).get_target_inputs()):
            reader.replace_source_output(dropped.output(0))


def _precision(options: Options) -> str:
    choice(options, "rest", ("f32", "bf16"), of="openvino")
    return choice(options, "precision", _PRECISIONS, of="openvino")


def _int8(graph: Any, onnx: Path, model: Model, options: Options) -> Any:
    import nncf

    batches = [_feed(batch, model.signature) for batch in model.calibration or model.examples]
    advanced = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=_ranges(model, options))
    preset = str(options.get("preset") or ("mixed" if _leaks(graph) else "performance"))
    return nncf.quantize(
        graph,
        nncf.Dataset(batches),
        subset_size=len(batches),
        preset=nncf.QuantizationPreset(preset),
        fast_bias_correction=options.get("bias_correction") is not True,
        model_type=nncf.ModelType.TRANSFORMER if options.get("transformer", _attends(graph)) else None,
        ignored_scope=nncf.IgnoredScope(names=_left_out(graph, onnx, model, options), validate=False),
        advanced_parameters=advanced,
    )


def _int8_weights(graph: Any, onnx: Path, model: Model, options: Options) -> Any:
    import nncf

    return nncf.compress_weights(
        graph,
        mode=nncf.CompressWeightsMode.INT8_ASYM,
        ignored_scope=nncf.IgnoredScope(names=_left_out(graph, onnx, model, options), validate=False),
    )


def _leaks(graph: Any) -> bool:
    """Whether activations fall a little below zero, as those of LeakyReLU: a symmetric range leaves half of the levels
    to values that do not occur."""
    return any(operation.get_type_name() == "PRelu" for operation in graph.get_ops())


def _attends(graph: Any) -> bool:
    """Whether a softmax weighs the rows of a matrix, as attention does: NNCF knows a scheme for that."""
    kinds = {operation.get_type_name() for operation in graph.get_ops()}
    softmaxes = (operation for operation in graph.get_ops() if operation.get_type_name() == "Softmax")
    users = (user.get_node() for softmax in softmaxes for user in softmax.output(0).get_target_inputs())
    return "ScaledDotProductAttention" in kinds or any(user.get_type_name() == "MatMul" for user in users)


def _ranges(model: Model, options: Options) -> Any:
    """NNCF averages the extremes of the samples by itself, which cuts off the longest where lengths vary."""
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Ranges

    lengths_vary = any(isinstance(axis, Free) for spec in model.signature.inputs for axis in spec.shape[1:])
    word = str(options.get("range") or ("minmax" if lengths_vary else "mean_minmax"))
    known = dict(zip(RANGES, (Ranges.MEAN_MINMAX, Ranges.MINMAX, Ranges.MEAN_QUANTILE, Ranges.HISTOGRAM), strict=True))
    if word not in known:
        raise BadConfig(f"openvino: range {word!r} is unknown", hint=f"use one of {', '.join(known)}")
    return known[word]


def _left_out(graph: Any, path: Path, model: Model, options: Options) -> list[str]:
    """OpenVINO calls a node by its ONNX name (its parts by name/part), or by its output's where that is the model's."""
    import onnx

    from torchship.lowering import onnx_int8

    nodes = onnx.load(str(path), load_external_data=False)
    names = set(onnx_int8.excluded(nodes, options, module=model.module))
    names |= {name for node in nodes.graph.node if node.name in names for name in node.output}
    operations = [operation.get_friendly_name() for operation in graph.get_ops()]
    return sorted(name for name in operations if name.partition("/")[0] in names)


def _feed(tensors: Tensors, signature: Signature) -> list[Any]:
    return [np.asarray(tensors[spec.name], order="C") for spec in signature.inputs]


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Compile for `device` (OpenVINO's name or `cpu`). Raises CorruptArtifact or Unavailable."""
    import openvino as ov

    core = ov.Core()
    target = _target(str(options.get("device", "cpu")) if device == "cpu" else device, core.available_devices)
    # openvino silently computes in bf16 on processors that have it, so the precision is never left open
    precision = _precision(options)
    hint = str(options.get("rest", "f32")) if precision.startswith("int8") else precision
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if target == "CPU":
        settings |= {"INFERENCE_NUM_THREADS": threads or cores()}
    with as_error(CorruptArtifact, f"{FILE} cannot be opened"):
        compiled = core.compile_model(core.read_model(str(path / FILE)), target, settings)
    request = compiled.create_infer_request()
    dtypes = [numpy_dtype(spec.dtype) for spec in signature.outputs]

    def run(tensors: Tensors) -> list[Array]:
        """Inputs and outputs by position; the answers are copies, for the engine reuses its own buffers."""
        feed = dict(enumerate(_feed(tensors, signature)))
        answers = request.infer(feed, share_inputs=True, share_outputs=False)
        return [np.asarray(answers[i]).astype(dtype, copy=False) for i, dtype in enumerate(dtypes)]

    return EngineStage(run, signature=signature)


def _target(wish: str, there: Sequence[str]) -> str:
    """The device as OpenVINO spells it: CPU, GPU.1, NPU, or AUTO, MULTI, HETERO and BATCH over several."""
    target = wish.upper()
    virtual, colon, listed = target.partition(":")
    wanted = listed.split(",") if colon else [] if virtual == "AUTO" else [virtual]
    kinds = {name.partition(".")[0] for name in there}
    absent = [name for name in wanted if name.strip("-").partition("(")[0].partition(".")[0] not in kinds]
    if absent or (colon and virtual not in _VIRTUAL):
        raise Unavailable(f"openvino sees no device {(absent or [virtual])[0]}", hint=f"it sees {', '.join(there)}")
    return target
