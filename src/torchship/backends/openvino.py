"""OpenVINO: f32, bf16, or int8 by NNCF; the precision is always spelt out; opens without torch."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchship.errors import BadConfig, BuildFailed, CorruptArtifact, Unavailable
from torchship.hardware import Hardware
from torchship.lowering.needs import missing
from torchship.model import Model
from torchship.recipe import Options, Recipe
from torchship.stage import Parameter, Parameters, Stage
from torchship.tensors import Free, Signature, Tensors, numpy_dtype

KIND = "data"
PACKAGES = ("openvino", "nncf", "onnx", "onnxscript")
FILE = "model.xml"
_PRECISIONS = ("f32", "bf16", "f16", "int8")


def probe(*, hardware: Hardware) -> str:
    """Why it cannot run here, with the mend; empty when it can."""
    return missing("openvino", pip="torchship[openvino]")


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """int8 where there is data and NNCF; bf16 where the processor has it; f32."""
    found = []
    if model.calibration and not missing("nncf"):
        found.append("int8")
    if {"avx512_bf16", "amx_bf16"} & set(hardware.features):
        found.append("bf16")
    return [Recipe("openvino", {"precision": precision}) for precision in (*found, "f32")]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Write `model.xml` and `model.bin`. Options: precision f32 | bf16 | f16 | int8.

    Raises BuildFailed or BadConfig.
    """
    import openvino as ov

    from torchship.lowering import onnx_graph

    precision = _precision(options)
    with tempfile.TemporaryDirectory(prefix="torchship-openvino-") as folder, _quiet():
        onnx = Path(folder) / "model.onnx"
        onnx_graph.write(model, onnx)
        try:
            graph = ov.Core().read_model(str(onnx))
            if precision == "int8":
                graph = _int8(graph, model, options)
            ov.save_model(graph, str(out / FILE), compress_to_fp16=precision == "f16")
        except (BuildFailed, BadConfig):
            raise
        except Exception as fault:
            raise BuildFailed(f"openvino cannot convert this graph: {' '.join(str(fault).split())[:400]}") from fault


def _precision(options: Options) -> str:
    precision = str(options.get("precision", "f32"))
    if precision not in _PRECISIONS:
        raise BadConfig(f"openvino: precision {precision!r} is unknown", hint=f"use one of {', '.join(_PRECISIONS)}")
    return precision


def _int8(graph: Any, model: Model, options: Options) -> Any:
    absent = missing("nncf", pip="torchship[openvino]")
    if absent:
        raise BuildFailed(f"openvino int8: {absent}")
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Ranges

    # NNCF averages the extremes of the samples, which cuts off the longest where lengths vary
    lengths_vary = any(isinstance(axis, Free) for spec in model.signature.inputs for axis in spec.shape[1:])
    ranges = Ranges.MINMAX if lengths_vary else Ranges.MEAN_MINMAX
    advanced = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=ranges)
    batches = [_feed(batch, model.signature) for batch in model.calibration or model.examples]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return nncf.quantize(graph, nncf.Dataset(batches), subset_size=len(batches), advanced_parameters=advanced)


def _feed(tensors: Tensors, signature: Signature) -> list[Any]:
    return [np.ascontiguousarray(tensors[spec.name]) for spec in signature.inputs]


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Compile for `device` (OpenVINO's name or `cpu`). Raises CorruptArtifact or Unavailable."""
    import openvino as ov

    core = ov.Core()
    target = device.upper()
    if target.partition(".")[0].partition(":")[0] not in {
        *(d.partition(".")[0] for d in core.available_devices),
        "AUTO",
    }:
        raise Unavailable(f"openvino sees no device {target}", hint=f"it sees {', '.join(core.available_devices)}")
    # openvino silently computes in bf16 on processors that have it, so the precision is never left open
    hint = {"bf16": "bf16", "f16": "f16"}.get(_precision(options), "f32")
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if target == "CPU":
        settings |= {"INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0))}
    try:
        compiled = core.compile_model(core.read_model(str(path / FILE)), target, settings)
    except Exception as fault:
        raise CorruptArtifact(f"{FILE} cannot be opened: {' '.join(str(fault).split())[:300]}") from fault
    return _OpenvinoStage(compiled, signature=signature)


class _OpenvinoStage:
    """One infer request; inputs and outputs by position."""

    def __init__(self, compiled: Any, *, signature: Signature) -> None:
        self.signature = signature
        self.max_batch = signature.max_rows
        self.parameters: tuple[Parameter, ...] = ()
        self._request: Any = compiled.create_infer_request()

    def __call__(self, tensors: Tensors, parameters: Parameters = {}) -> Tensors:
        """Run on the host's arrays; the answers are copies, for the engine reuses its own buffers."""
        if self._request is None:
            raise Unavailable("the stage is closed")
        feed = dict(enumerate(_feed(tensors, self.signature)))
        answers = self._request.infer(feed, share_inputs=True, share_outputs=False)
        return {
            spec.name: np.asarray(answers[position]).astype(numpy_dtype(spec.dtype), copy=False)
            for position, spec in enumerate(self.signature.outputs)
        }

    def close(self) -> None:
        """Free the compiled model."""
        self._request = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
