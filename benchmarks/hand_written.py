"""The best recipes that an expert writes by hand, straight against torch, ONNX Runtime and OpenVINO.

Nothing here uses torchship. Each recipe is a function of `Work` that returns a `Runner`; a recipe that cannot be
built raises, and is a row with that reason. Files that were made once are kept and used again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import subjects


@dataclass(frozen=True)
class Runner:
    """`prepare` makes a batch ready outside of the clock; `call` is what is timed."""

    call: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = lambda array: array


def kept() -> Path:
    """Where the files lie, by the content of this benchmark and the versions of the tools."""
    from benchmarks import fashion

    found = hashlib.sha256()
    for source in (__file__, subjects.__file__):
        found.update(Path(source).read_bytes())
    for tool in ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "nncf", "torchao"):
        found.update(version(tool).encode())
    path = fashion.cache() / "recipes" / found.hexdigest()[:16]
    path.mkdir(parents=True, exist_ok=True)
    return path


@dataclass(frozen=True)
class Work:
    """One model, a folder for its files, and the number of threads."""

    name: str
    folder: Path
    threads: int

    def module(self) -> Any:
        """The eager module, with torch set to the right number of threads."""
        import torch

        torch.set_num_threads(self.threads)
        return subjects.module(self.name)

    def exported(self, rows: int = 2, ceiling: int = 64, module: Any = None) -> Any:
        """An exported program with a free batch axis."""
        import torch

        example = torch.from_numpy(subjects.batch(self.name, rows, seed=1))
        dims = ({0: torch.export.Dim("b", min=1, max=ceiling)},)
        return torch.export.export(module or self.module(), (example,), dynamic_shapes=dims)

    def onnx(self) -> Path:
        """The fp32 ONNX file with a free batch axis, exported once."""
        path = self.folder / f"{self.name}.onnx"
        if not path.exists():
            import torch

            draft = path.with_suffix(f".{os.getpid()}.tmp")
            torch.onnx.export(
                self.module(),
                (torch.from_numpy(subjects.batch(self.name, 2, seed=1)),),
                draft,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},),
                input_names=["x"],
                output_names=["y"],
                external_data=False,
                opset_version=18,
                verbose=False,
            )
            draft.rename(path)
        return path


def _torch_runner(call: Callable[[Any], Any], *, channels_last: bool = False, dtype: Any = None) -> Runner:
    import torch

    def prepare(array: Any) -> Any:
        tensor = torch.from_numpy(array)
        tensor = tensor.to(dtype) if dtype else tensor
        return tensor.contiguous(memory_format=torch.channels_last) if channels_last and tensor.ndim == 4 else tensor

    def run(tensor: Any) -> Any:
        with torch.inference_mode():
            return call(tensor)

    return Runner(run, prepare)


def eager(work: Work) -> Runner:
    """The module as it is: the reference."""
    return _torch_runner(work.module())


def eager_channels_last(work: Work) -> Runner:
    """Channels-last weights and inputs."""
    import torch

    return _torch_runner(work.module().to(memory_format=torch.channels_last), channels_last=True)


def eager_bf16(work: Work) -> Runner:
    """Weights and inputs in bf16, channels-last."""
    import torch

    module = work.module().to(torch.bfloat16).to(memory_format=torch.channels_last)
    return _torch_runner(module, channels_last=True, dtype=torch.bfloat16)


def torchscript_frozen(work: Work) -> Runner:
    """torch.jit.trace and freeze."""
    import torch

    example = torch.from_numpy(subjects.batch(work.name, 1, seed=1))
    with torch.inference_mode():
        traced = torch.jit.trace(work.module(), example)
        return _torch_runner(torch.jit.freeze(traced))


def compile_frozen(work: Work) -> Runner:
    """torch.compile with frozen weights."""
    import torch

    torch._inductor.config.freezing = True
    return _torch_runner(torch.compile(work.module(), dynamic=False))


def compile_bf16(work: Work) -> Runner:
    """torch.compile with frozen bf16 weights, channels-last."""
    import torch

    torch._inductor.config.freezing = True
    module = torch.compile(work.module().to(torch.bfloat16).to(memory_format=torch.channels_last), dynamic=False)
    return _torch_runner(module, channels_last=True, dtype=torch.bfloat16)


def compile_int8(work: Work) -> Runner:
    """PT2E static int8 (torchao) through inductor."""
    import torch
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    graph = prepare_pt2e(work.exported().module(), quantizer)
    with torch.no_grad():
        for array in subjects.calibration(work.name):
            graph(torch.from_numpy(array))
    torch._inductor.config.freezing = True
    return _torch_runner(torch.compile(convert_pt2e(graph), dynamic=False))


def aoti_frozen(work: Work) -> Runner:
    """AOTInductor with frozen weights."""
    import torch

    path, module = work.folder / f"{work.name}.pt2", work.module()
    if not path.exists():
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                work.exported(module=module), package_path=str(path), inductor_configs={"freezing": True}
            )
    return _torch_runner(torch._inductor.aoti_load_package(str(path)))


def _onnxruntime(path: Path, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (feed,) = session.get_inputs()
    return Runner(lambda array: session.run(None, {feed.name: array})[0])


def onnxruntime_fp32(work: Work) -> Runner:
    """ONNX Runtime on the exported file."""
    return _onnxruntime(work.onnx(), work.threads)


def onnxruntime_int8(work: Work) -> Runner:
    """Static QDQ, unsigned activations and signed per-channel weights, min-max over 64 samples."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands the calibration batches out one by one."""

        def __init__(self, batches: Iterator[Any]) -> None:
            self._batches = batches

        def get_next(self) -> Any:
            array = next(self._batches, None)
            return None if array is None else {"x": array}

    out = work.folder / f"{work.name}.int8.onnx"
    if out.exists():
        return _onnxruntime(out, work.threads)
    prepared = work.folder / f"{work.name}.prepared.onnx"
    quant_pre_process(str(work.onnx()), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(out),
        Reader(iter(subjects.calibration(work.name))),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return _onnxruntime(out, work.threads)


def onnxruntime_int8_dynamic(work: Work) -> Runner:
    """Dynamic int8 of the matrix products only: it slows convolutions down."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = work.folder / f"{work.name}.dynamic.onnx"
    if not out.exists():
        quantize_dynamic(
            str(work.onnx()),
            str(out),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
    return _onnxruntime(out, work.threads)


def _openvino(model: Any, precision: str, work: Work) -> Runner:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": work.threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def call(array: Any) -> Any:
        request.infer([array], share_inputs=True)
        return request.get_output_tensor(0).data

    return Runner(call)


def openvino_fp32(work: Work) -> Runner:
    """OpenVINO, held to fp32."""
    import openvino

    return _openvino(openvino.Core().read_model(str(work.onnx())), "f32", work)


def openvino_bf16(work: Work) -> Runner:
    """OpenVINO, computing in bf16."""
    import openvino

    return _openvino(openvino.Core().read_model(str(work.onnx())), "bf16", work)


def _nncf(work: Work, precision: str) -> Runner:
    import nncf
    import openvino

    path = work.folder / f"{work.name}.nncf.xml"
    if not path.exists():
        data = nncf.Dataset([row[None] for array in subjects.calibration(work.name) for row in array])
        kind = nncf.ModelType.TRANSFORMER if work.name == "encoder" else None
        model = nncf.quantize(openvino.Core().read_model(str(work.onnx())), data, subset_size=64, model_type=kind)
        openvino.save_model(model, str(path), compress_to_fp16=False)
    return _openvino(openvino.Core().read_model(str(path)), precision, work)


def openvino_int8(work: Work) -> Runner:
    """NNCF static int8, the rest in fp32."""
    return _nncf(work, "f32")


def openvino_int8_bf16(work: Work) -> Runner:
    """NNCF static int8, the rest in bf16."""
    return _nncf(work, "bf16")


RECIPES: tuple[Callable[[Work], Runner], ...] = (
    eager,
    openvino_int8,
    openvino_int8_bf16,
    openvino_bf16,
    openvino_fp32,
    onnxruntime_int8,
    onnxruntime_fp32,
    onnxruntime_int8_dynamic,
    compile_bf16,
    compile_int8,
    compile_frozen,
    aoti_frozen,
    torchscript_frozen,
    eager_bf16,
    eager_channels_last,
)


def applicable(name: str) -> Sequence[Callable[[Work], Runner]]:
    """The recipes that make sense for a model: no layouts for an encoder, no dynamic int8 for convolutions."""
    unfit = (eager_channels_last,) if name == "encoder" else (onnxruntime_int8_dynamic,)
    return [recipe for recipe in RECIPES if recipe not in unfit]


def arrays(output: Any) -> Any:
    """The first output of a call as FP32 numpy."""
    output = output[0] if isinstance(output, tuple | list) else output
    return output.float().numpy() if hasattr(output, "numpy") else np.asarray(output, np.float32)


def build(argument: dict[str, Any]) -> Runner:
    """The recipe `argument["recipe"]` for `argument["model"]`, in this process."""
    recipe = next(recipe for recipe in RECIPES if recipe.__name__ == argument["recipe"])
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(argument["files"]) / "inductor"))
    return recipe(Work(argument["model"], Path(argument["files"]), argument["threads"]))
