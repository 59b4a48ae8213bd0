"""ONNX Runtime: fp32 or statically quantized int8, through any execution provider; opens without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchship.errors import BadConfig, CorruptArtifact, Unavailable
from torchship.hardware import Hardware, cores
from torchship.model import Model
from torchship.plugins import needs
from torchship.recipe import Options, Recipe, choice
from torchship.stage import EngineStage, Stage
from torchship.tensors import Array, Signature, Tensors

KIND = "data"
PARTS = ("cpu",)  # where it runs parts of a model that stays Python
TRIED = 0  # in this order among the backends: how often it wins
PACKAGES = ("onnxruntime", "onnx", "onnxscript")
probe = needs("onnxruntime")
OPTIONS = ("precision", "keep", "modules", "exclude", "range", "percentile", "bias_correction", "ops", "per_channel",
           "provider", "provider_options", "optimization", "spin", "arena")  # fmt: skip
THRIFTY = {"arena": False}  # what a search adds where memory matters
FILE = "model.onnx"
RANGES = ("minmax", "percentile", "mse", "entropy")  # of int8 activations: what a search may try
_PRECISIONS = ("fp32", "fp16", "int8", "dynamic_int8")
_PLAIN_PROVIDERS = ("CPUExecutionProvider", "AzureExecutionProvider")
_HALF_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_PIP = {
    "CUDAExecutionProvider": "pip install onnxruntime-gpu",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu, and TensorRT",
    "NvTensorRTRTXExecutionProvider": "an onnxruntime with TensorRT-RTX",
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino",
    "QNNExecutionProvider": "pip install onnxruntime-qnn, for Qualcomm NPUs",
    "VitisAIExecutionProvider": "the onnxruntime of AMD's Ryzen AI software, for XDNA NPUs",
    "DmlExecutionProvider": "pip install onnxruntime-directml, on Windows",
    "MIGraphXExecutionProvider": "the onnxruntime of AMD's ROCm",
    "CoreMLExecutionProvider": "onnxruntime on a Mac",
}
_LEVELS = {"all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC",
           "none": "ORT_DISABLE_ALL"}  # fmt: skip
_START = "check its driver and its libraries, as nvidia-smi, CUDA and cuDNN for NVIDIA's"
_DYNAMIC = ("Linear", "LSTM", "MultiheadAttention", "NonDynamicallyQuantizableLinear")
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """For every accelerator that this onnxruntime knows its provider; then int8 where there is data, fp32, dynamic
    int8 where there are matrix products; last int8 with the careful ranges.
    """
    import onnxruntime as ort

    wishes: list[Options] = []
    for provider in ort.get_available_providers():
        if provider in _HALF_PROVIDERS and hardware.gpus:
            wishes.append({"provider": provider, "precision": "fp16"})
        elif provider not in _PLAIN_PROVIDERS and provider not in _HALF_PROVIDERS:
            wishes.append({"provider": provider, "precision": "fp32"})
    wishes += [{"precision": "int8"}] if model.calibration else []
    wishes.append({"precision": "fp32"})
    if any(type(module).__name__ in _DYNAMIC for module in model.module.modules()):
        wishes.append({"precision": "dynamic_int8"})
    wishes += [{"precision": "int8", "range": "mse", "bias_correction": True}] if model.calibration else []
    return [Recipe("onnxruntime", wish) for wish in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Write `model.onnx`. Options: precision fp32 | fp16 | int8 (static, calibrated) | dynamic_int8 (matrix products
    only), keep and modules for fp16, and those of `lowering.onnx_int8`. Raises BuildFailed or BadConfig.
    """
    from torchship.lowering import onnx_graph, onnx_int8, paths, variants

    precision = choice(options, "precision", _PRECISIONS, of="onnxruntime")
    if precision == "fp16":
        model = variants.in_precision(model, "fp16", options=options)
    elif precision == "fp32":
        paths.refuse_any(options, what="onnxruntime in fp32")
    onnx_graph.write(model, out / FILE)
    if precision == "int8":
        onnx_int8.quantize(model, out / FILE, options=options)
    elif precision == "dynamic_int8":
        onnx_int8.quantize_dynamic(model, out / FILE, options=options)


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Open a session. Options: provider (its ONNX Runtime name), provider_options (a table of that provider's own),
    optimization (all | extended | basic | none), spin (threads wait busily between calls), arena (false: memory for
    activations is given back after each call, which takes less of it, and more time).

    Raises Unavailable, also where the provider cannot start, BadConfig or CorruptArtifact.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4 if options.get("provider") else 3  # a provider's failure is told below
    settings.intra_op_num_threads = threads or cores()
    settings.inter_op_num_threads = 1
    level = choice(options, "optimization", tuple(_LEVELS), of="onnxruntime")
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
    if options.get("spin") is False:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.enable_cpu_mem_arena = options.get("arena") is not False
    provider, own = _provider(options, device)
    others = ["CPUExecutionProvider"] if provider != "CPUExecutionProvider" else []
    try:
        session = ort.InferenceSession(str(path / FILE), sess_options=settings, providers=[(provider, own), *others])
    except Exception as fault:
        words = " ".join(str(fault).split())[:300]
        if others:
            raise Unavailable(f"{provider} cannot run {FILE}: {words}", hint=_START) from fault
        raise CorruptArtifact(f"{FILE} cannot be opened: {words}") from fault
    if provider not in session.get_providers():  # onnxruntime only logs that it takes the processor instead
        raise Unavailable(f"{provider} does not start on this machine", hint=_START)
    outputs = [output.name for output in session.get_outputs()]  # by position: optimizers may have renamed them
    inputs = {node.name for node in session.get_inputs()}
    by_value = any(spec.dtype == "BF16" for spec in (*signature.inputs, *signature.outputs))

    def run(tensors: Tensors) -> Sequence[Array]:
        feed = {name: array for name, array in tensors.items() if name in inputs}
        return _run_values(session, outputs, feed) if by_value else session.run(outputs, feed)

    return EngineStage(run, signature=signature)


def _provider(options: Options, device: str) -> tuple[str, dict[str, str]]:
    """The provider's name, and its own options."""
    import onnxruntime as ort

    kind, _, number = device.partition(":")
    named = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind, device)
    provider, own = str(options.get("provider") or named), options.get("provider_options") or {}
    if not isinstance(own, dict):
        raise BadConfig(f"onnxruntime: provider_options is {own!r}", hint='write {device_id = "0"}')
    there, known = ort.get_available_providers(), {*ort.get_all_providers(), *_PIP}
    if provider not in {*there, *known}:
        raise BadConfig(f"onnxruntime knows no provider {provider!r}", hint=f"use one of {', '.join(sorted(known))}")
    if provider not in there:
        pip = _PIP.get(provider, "a build of onnxruntime that has it")
        raise Unavailable(
            f"this onnxruntime has no {provider}: it needs {pip}",
            hint=f"here are {', '.join(there)}; only one build can be installed at a time",
        )
    place = {"device_id": number} if number and "provider" not in options else {}
    if provider == "CUDAExecutionProvider":
        place["use_tf32"] = "0"  # fp32 is fp32; who wants tf32 says so
    return provider, {**place, **{key: str(value) for key, value in own.items()}}


def _run_values(session: Any, outputs: list[str], feed: Tensors) -> list[Array]:
    """As `session.run`, with bfloat16, which numpy has not of its own."""
    import ml_dtypes
    import onnxruntime as ort

    def value(array: Array) -> Any:
        if array.dtype.name == "bfloat16":
            bits = np.asarray(array, order="C").view(np.uint16)
            return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
        return ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))

    found = session.run_with_ort_values(outputs, {name: value(array) for name, array in feed.items()})
    bits = "tensor(bfloat16)"
    return [one.numpy().view(ml_dtypes.bfloat16) if one.data_type() == bits else one.numpy() for one in found]
