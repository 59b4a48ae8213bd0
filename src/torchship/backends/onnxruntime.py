"""ONNX Runtime: fp32 or statically quantized int8, through any execution provider; opens without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from torchship.errors import BadConfig, CorruptArtifact, Unavailable
from torchship.hardware import Hardware
from torchship.lowering.needs import missing
from torchship.model import Model
from torchship.recipe import Options, Recipe
from torchship.stage import Parameter, Parameters, Stage
from torchship.tensors import Signature, Tensors

KIND = "data"
PACKAGES = ("onnxruntime", "onnx", "onnxscript")
FILE = "model.onnx"
RANGES = ("minmax", "percentile", "mse", "entropy")  # of int8 activations: what a search may try
_PRECISIONS = ("fp32", "fp16", "int8", "dynamic_int8")
_PLAIN_PROVIDERS = ("CPUExecutionProvider", "AzureExecutionProvider")
_HALF_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_DYNAMIC = ("Linear", "LSTM", "MultiheadAttention", "NonDynamicallyQuantizableLinear")
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def probe(*, hardware: Hardware) -> str:
    """Why it cannot run here, with the mend; empty when it can."""
    return missing("onnxruntime")


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
    from torchship.lowering import onnx_graph, onnx_int8

    precision = options.get("precision", "fp32")
    if precision not in _PRECISIONS:
        raise BadConfig(f"onnxruntime: precision {precision!r} is unknown", hint=f"use one of {', '.join(_PRECISIONS)}")
    if precision == "fp16":
        from torchship.lowering import paths, variants

        keep = paths.rules(options, narrow=("fp16",), key="keep")
        model = variants.in_precision(model, "fp16", mode="cast", keep=keep)
    onnx_graph.write(model, out / FILE)
    if precision == "int8":
        onnx_int8.quantize(model, out / FILE, options=options)
    elif precision == "dynamic_int8":
        onnx_int8.quantize_dynamic(out / FILE, options=options)


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Open a session. Options: provider (its ONNX Runtime name), optimization (all | extended | basic | none),
    spin (threads wait busily between calls). Raises Unavailable, BadConfig or CorruptArtifact.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = _level(str(options.get("optimization", "all")))
    if options.get("spin") is False:
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    provider = str(options.get("provider") or _provider_of(device))
    there = ort.get_available_providers()
    if provider not in there:
        raise Unavailable(f"this onnxruntime has no {provider}", hint=f"it has {', '.join(there)}")
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    try:
        session = ort.InferenceSession(str(path / FILE), sess_options=settings, providers=providers)
    except Exception as fault:
        raise CorruptArtifact(f"{FILE} cannot be opened: {' '.join(str(fault).split())[:300]}") from fault
    return _OrtStage(session, signature=signature)


def _level(name: str) -> Any:
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    known = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "none": levels.ORT_DISABLE_ALL,
    }
    if name not in known:
        raise BadConfig(f"onnxruntime: optimization {name!r} is unknown", hint=f"use one of {', '.join(known)}")
    return known[name]


def _provider_of(device: str) -> str:
    return {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.partition(":")[0], device)


class _OrtStage:
    """One session; inputs by name, outputs by position (their names may have been rewritten by optimizers)."""

    def __init__(self, session: Any, *, signature: Signature) -> None:
        self.signature = signature
        self.max_batch = signature.max_rows
        self.parameters: tuple[Parameter, ...] = ()
        self._session: Any = session
        self._outputs = [output.name for output in session.get_outputs()]
        self._inputs = {node.name for node in session.get_inputs()}
        specs = (*signature.inputs, *signature.outputs)
        self._by_value = any(spec.dtype == "BF16" for spec in specs)  # numpy has no bfloat16 of its own

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        """Run on the host's arrays."""
        if self._session is None:
            raise Unavailable("the stage is closed")
        feed = {name: array for name, array in tensors.items() if name in self._inputs}
        answers = self._run_values(feed) if self._by_value else self._session.run(self._outputs, feed)
        return {spec.name: answer for spec, answer in zip(self.signature.outputs, answers, strict=True)}

    def _run_values(self, feed: Tensors) -> list[Any]:
        import ml_dtypes
        import onnxruntime as ort

        def value(array: Any) -> Any:
            if array.dtype.name == "bfloat16":
                bits = np.ascontiguousarray(array).view(np.uint16)
                return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
            return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

        found = self._session.run_with_ort_values(self._outputs, {name: value(array) for name, array in feed.items()})
        return [
            answer.numpy().view(ml_dtypes.bfloat16) if spec.dtype == "BF16" else answer.numpy()
            for spec, answer in zip(self.signature.outputs, found, strict=True)
        ]

    def close(self) -> None:
        """Free the session's memory."""
        self._session = None
