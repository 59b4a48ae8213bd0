"""Static int8 of an ONNX file: QDQ with unsigned activations and signed weights per channel (U8S8).

Signed activations (S8S8) are 3 to 4 times slower on x86, which multiplies unsigned by signed bytes.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchship.errors import BuildFailed
from torchship.lowering.program import one_line
from torchship.model import Model
from torchship.recipe import Options
from torchship.tensors import Tensors


class Reader:
    """Hands the calibration batches to ONNX Runtime's calibrator, one after the other."""

    def __init__(self, batches: Iterator[Tensors]) -> None:
        self._batches = batches

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None at the end."""
        return dict(batch) if (batch := next(self._batches, None)) is not None else None


def quantize(model: Model, path: Path, *, options: Options) -> None:
    """Replace the fp32 file at `path` by its int8 form, calibrated on the model's data.

    Raises BuildFailed with the quantizer's reason.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = list(model.calibration or model.examples)
    # the quantizer leaves files beside what it reads, so it works in a folder of its own
    with tempfile.TemporaryDirectory(prefix="torchship-int8-") as folder, _quiet():
        prepared, done = Path(folder) / "prepared.onnx", Path(folder) / "int8.onnx"
        try:
            quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(done),
                Reader(iter(batches)),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as fault:
            raise BuildFailed(f"onnxruntime cannot quantize this graph: {one_line(fault)}") from fault
        path.write_bytes(done.read_bytes())


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
