"""TensorRT 10 and 11, or TensorRT-RTX: an engine built from ONNX with its precision written into the graph.

Engines are strongly typed: fp16 is cast in the graph and int8 are explicit quantize nodes (signed, symmetric), since
TensorRT 11 knows no precision flags. An engine can be built where the libraries are (of TensorRT, where a card is too);
it runs with the very version that built it, on the cards that it was built for. What it works in is torch's memory and
torch's stream.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from torchship import errors
from torchship import hardware as machines
from torchship.errors import BadConfig, BuildFailed, CorruptArtifact, StageFailed, Unavailable, WrongMachine
from torchship.hardware import Hardware
from torchship.lowering import program, torch_stage
from torchship.lowering.torch_stage import prepare
from torchship.model import Model
from torchship.plugins import missing
from torchship.recipe import Options, Recipe, choice
from torchship.stage import Stage
from torchship.tensors import Axis, Free, Signature, TensorSpec

KIND = "native"
TRIED = 2  # in this order among the backends: how often it wins
PACKAGES = ("tensorrt", "tensorrt-rtx-cu13-libs", "torch")
OPTIONS = ("precision", "device", "graphs", "workspace", "level", "compute", "keep", "modules", "exclude", "range",
           "percentile", "bias_correction", "ops", "per_channel")  # fmt: skip
FILE = "model.plan"
FACTS = "engine.json"
_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_PIP = "tensorrt"
_PIP_RTX = "tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings"
_RTX_CARDS = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_RTX_USUAL = _RTX_CARDS[1:]  # Turing has no products in fp32, which any graph may hold
_PRECISIONS = ("fp16", "fp32", "tf32", "bf16", "int8")
_CEILING = 512
_FEW = 8  # rows: up to here kernels for few rows win
Body = Callable[..., Any]


class EngineFacts(msgspec.Struct, frozen=True):
    """The content of `engine.json`: what built the engine, the compute capabilities that it is for, the numbers of rows
    that each of its profiles takes, and the layers of its network.
    """

    library: str
    version: str
    cards: list[str]
    spans: list[tuple[int, int]]
    layers: list[dict[str, str]]


def probe(*, hardware: Hardware) -> str:
    """Why it cannot run here, with the mend; empty when it can. Building needs only the libraries."""
    found, refusal = _module(), ""
    for card in hardware.gpus[:1]:
        if card.capability not in _RTX_CARDS:
            refusal = f"TensorRT-RTX does not run on {card.name} (compute {card.capability})"
    if not found and refusal:
        return f"tensorrt is not installed: pip install {_PIP}; {refusal}"
    if not found:
        return f"neither tensorrt nor TensorRT-RTX is installed: pip install {_PIP_RTX}"
    if not hardware.gpus:
        return "TensorRT runs on NVIDIA GPUs, and this machine shows none: engines can be built here, not run"
    if found.startswith("tensorrt_rtx") and refusal:
        return f"{refusal}; it takes {' '.join(_RTX_CARDS)}"
    return missing("torch")


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """fp16, int8 where there is data, tf32; nothing without a card."""
    wishes = ["fp16", *(["int8"] if model.calibration else []), "tf32"] if hardware.gpus else []
    return [Recipe("tensorrt", {"precision": precision, "device": "cuda"}) for precision in wishes]


def described(path: Path) -> str:
    """What engine lies in the folder `path`, and whether it can be run here, in one line; needs no library."""
    try:
        facts = _read(path)
    except CorruptArtifact as fault:
        return fault.line
    kinds = " ".join(sorted({layer.get("dtype", "") for layer in facts.layers} - {""}))
    made = f"{facts.library} {facts.version} for compute {' '.join(facts.cards)}, {len(facts.layers)} layers ({kinds})"
    why = _against(facts) or probe(hardware=machines.here())
    return f"{made}; not here: {why}" if why else made


def build(model: Model, *, options: Options, out: Path) -> None:
    """Write the engine `model.plan`, and what it is into `engine.json`.

    Options: precision fp16 | fp32 | tf32 | bf16 | int8, keep and modules for fp16 and bf16, those of
    `lowering.onnx_int8` for int8, workspace (bytes it may use while it tries kernels), level (0 to 5: how long it
    looks for kernels), compute (of TensorRT-RTX: the compute capabilities to build for, those of this machine's cards
    by default, without one all from 8.0 on). Raises BuildFailed or BadConfig.
    """
    from torchship.lowering import onnx_graph, onnx_int8, paths, variants

    precision = choice(options, "precision", _PRECISIONS, of="tensorrt")
    if not _module():
        raise BuildFailed("neither tensorrt nor TensorRT-RTX is installed", hint=f"pip install {_PIP}, or {_PIP_RTX}")
    with tempfile.TemporaryDirectory(prefix="torchship-tensorrt-") as folder:
        graph = Path(folder) / "model.onnx"
        if precision in ("fp32", "tf32"):
            paths.refuse_any(options, what=f"tensorrt in {precision}")
        elif precision != "int8":
            # folded here: the exporter would write what it folds in bf16 as fp32, which does not fit the rest
            model = variants.in_precision(torch_stage.folded(model), precision, options=options)
        onnx_graph.write(model, graph)
        if precision == "int8":
            onnx_int8.quantize(model, graph, options={"ops": "heavy", **options}, signed=True)
        plan, facts = _compiled(graph, model.signature, options)
    (out / FILE).write_bytes(plan)
    (out / FACTS).write_bytes(msgspec.json.format(msgspec.json.encode(facts), indent=1))


def _module() -> str:
    return next((name for name in _MODULES if find_spec(name)), "")


@functools.cache
def _logger(library: str) -> Any:
    """The one logger of a process: the libraries keep the first that they see. It keeps the last faults."""
    trt = importlib.import_module(library)

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.faults: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.faults = [*self.faults[-2:], " ".join(str(message).split())[:300]]

    return Log()


def _compiled(graph: Path, signature: Signature, options: Options) -> tuple[bytes, EngineFacts]:
    library = _module()
    trt, log = importlib.import_module(library), _logger(library)
    with program.as_error(BuildFailed, "TensorRT does not start (only TensorRT-RTX builds without a card)"):
        builder = trt.Builder(log)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 has no other networks
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        faults = "; ".join(str(parser.get_error(i)) for i in range(min(parser.num_errors, 3)))
        raise BuildFailed(f"TensorRT cannot parse this graph: {' '.join(faults.split())[:400]}")
    config = builder.create_builder_config()
    if options.get("precision") != "tf32":
        config.clear_flag(trt.BuilderFlag.TF32)  # which is on by default: fp32 is to be fp32
    if workspace := options.get("workspace"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(str(workspace)))
    if "level" in options:
        config.builder_optimization_level = int(str(options["level"]))
    cards = _target(trt, config, options)
    spans = row_spans(signature)
    for span in spans:
        profile = builder.create_optimization_profile()
        for spec in signature.inputs:
            if any(isinstance(axis, Free) for axis in spec.shape):
                profile.set_shape(spec.name, *extents(spec, signature, span))
        config.add_optimization_profile(profile)
    layers = [_layer(network.get_layer(i)) for i in range(network.num_layers)]
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(
            f"TensorRT found no engine for this graph: {'; '.join(log.faults)}",
            hint="try precision fp32, or fewer free axes",
        )
    return bytes(plan), EngineFacts(library, str(trt.__version__), cards, spans, layers)


def _layer(layer: Any) -> dict[str, str]:
    dtype = str(layer.get_output(0).dtype).rpartition(".")[2] if layer.num_outputs else ""
    return {"name": str(layer.name), "type": str(layer.type).rpartition(".")[2], "dtype": dtype}


def _target(trt: Any, config: Any, options: Options) -> list[str]:
    """The compute capabilities that the engine is built for; only TensorRT-RTX lets them be chosen."""
    here = sorted({gpu.capability for gpu in machines.here().gpus})
    if not hasattr(config, "num_compute_capabilities"):
        return here[:1]
    known = {word: getattr(trt.ComputeCapability, f"SM{word.replace('.', '')}", None) for word in _RTX_CARDS}
    asked = options.get("compute") or [word for word in here if known.get(word) is not None] or list(_RTX_USUAL)
    wanted = asked if isinstance(asked, list) else [str(asked)]
    if strange := [word for word in wanted if known.get(word) is None]:
        raise BadConfig(f"tensorrt: compute {strange[0]!r} is unknown", hint=f"use some of {', '.join(_RTX_CARDS)}")
    config.num_compute_capabilities = len(wanted)
    for place, word in enumerate(wanted):
        config.set_compute_capability(known[word], place)
    return wanted


def row_spans(signature: Signature) -> list[tuple[int, int]]:
    """The least and most rows of each profile: one row, a few, and many are other kernels."""
    most = signature.max_rows
    first = signature.inputs[0].shape[0] if signature.batched and signature.inputs[0].shape else 1
    least = max(first.min, 1) if isinstance(first, Free) else 1
    ends = [end for end in (1, _FEW) if least <= end < most]
    return list(zip((least, *(end + 1 for end in ends)), (*ends, most), strict=True))


def extents(spec: TensorSpec, signature: Signature, span: tuple[int, int]) -> list[tuple[int, ...]]:
    """The least, usual and largest shape of a tensor for a number of rows within `span`."""

    def lengths(position: int, axis: Axis) -> tuple[int, int, int]:
        if isinstance(axis, int):
            return axis, axis, axis
        if position == 0 and signature.batched:
            return span[0], span[1], span[1]
        least, most = max(axis.min, 1), axis.max or max(_CEILING, axis.min)
        return least, max(least, most // 2), most

    found = [lengths(position, axis) for position, axis in enumerate(spec.shape)]
    return [tuple(axis[which] for axis in found) for which in range(3)]


def _read(path: Path) -> EngineFacts:
    try:
        return msgspec.json.decode((path / FACTS).read_bytes(), type=EngineFacts)
    except (OSError, msgspec.MsgspecError) as fault:
        raise CorruptArtifact(
            f"{FACTS} does not say what built the engine: {fault}", hint="optimize the model again"
        ) from fault


def _against(facts: EngineFacts) -> str:
    """Why the library here does not take this engine; empty where it does."""
    if facts.library not in _MODULES or find_spec(facts.library) is None:
        return f"{facts.library} {facts.version} built it, and is not installed"
    here = str(importlib.import_module(facts.library).__version__)
    return "" if here == facts.version else f"{facts.library} {facts.version} built it, and {here} is installed"


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Load the engine. Where only rows are free, each batch size has a context of its own, replayed as a CUDA graph;
    option `graphs` = false runs them as they come. Raises CorruptArtifact, WrongMachine or Unavailable.
    """
    from torchship.lowering.cuda import CudaStage, batch_sizes

    if not _module():
        raise Unavailable("neither tensorrt nor TensorRT-RTX is installed", hint=f"pip install {_PIP}, or {_PIP_RTX}")
    device = torch_stage.device_of({**options, "device": "cuda"}, device=device)
    facts = _read(path)
    if why := _against(facts):
        raise WrongMachine(f"{FILE}: {why}", hint="install that version, or optimize the model again")
    prepare(device=device, threads=threads, tf32=options.get("precision") == "tf32")
    _refuse_card(facts, device)
    engine = Engine((path / FILE).read_bytes(), facts, signature, device)
    graphs = signature.fixed and options.get("graphs") is not False
    sizes = batch_sizes(signature.max_rows) if graphs and signature.batched else []
    bodies = {size: engine.body(size) for size in sizes}
    return CudaStage(engine, signature=signature, device=device, check=True, graphs=graphs, bodies=bodies)


def _refuse_card(facts: EngineFacts, device: str) -> None:
    import torch

    here = ".".join(map(str, torch.cuda.get_device_capability(device)))
    if facts.cards and here not in facts.cards:
        name = torch.cuda.get_device_name(device)
        raise WrongMachine(
            f"{FILE} was built for compute {' '.join(facts.cards)}, and {name} has {here}", hint="optimize it here"
        )


class Engine:
    """A loaded engine. Called with tensors on the card in the order of the signature, it gives a list of its answers.

    Contexts work in one piece of torch's memory, one after the other.
    """

    def __init__(self, plan: bytes, facts: EngineFacts, signature: Signature, device: str) -> None:
        import torch

        from torchship.lowering.variants import to_torch_dtype

        self._trt, log = importlib.import_module(facts.library), _logger(facts.library)
        self._runtime = self._trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            why = "; ".join(log.faults) or "it was built for another card or driver"
            raise WrongMachine(f"{FILE} cannot be loaded: {why}", hint="optimize it here")
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        given = {name for name in names if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT}
        # outputs by their places: a name that an input has too is another one in the graph
        outputs = [name for name in names if name not in given]
        # what the network does not read is no input of the engine
        self._inputs = [spec.name if spec.name in given else "" for spec in signature.inputs]
        self._outputs = [(n, to_torch_dtype(spec.dtype)) for n, spec in zip(outputs, signature.outputs, strict=True)]
        self._spans, self._batched, self._device = facts.spans, signature.batched, torch.device(device)
        self._memory = torch.empty(int(self._engine.device_memory_size_v2), dtype=torch.uint8, device=device)
        self._bodies: dict[int, Body] = {}

    def __call__(self, *tensors: Any) -> list[Any]:
        """Run with the profile for so many rows."""
        rows = tensors[0].shape[0] if self._batched else 1
        place = self._place(rows)
        if place not in self._bodies:
            self._bodies[place] = self.body(rows)
        found: list[Any] = self._bodies[place](*tensors)
        return found

    def _place(self, rows: int) -> int:
        """The profile for so many rows; the last for more, which TensorRT refuses itself."""
        return next((i for i, (_, most) in enumerate(self._spans) if rows <= most), len(self._spans) - 1)

    def body(self, rows: int) -> Body:
        """What runs so many rows with a context of its own, as a CUDA graph needs it: the graph holds its addresses."""
        import torch

        context = self._context()
        stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        if not context.set_optimization_profile_async(self._place(rows), stream.cuda_stream):
            raise Unavailable(f"TensorRT has no profile for {rows} rows", hint="optimize the model again")
        stream.synchronize()

        def run(*tensors: Any) -> list[Any]:
            current = torch.cuda.current_stream(self._device)
            if current != torch.cuda.default_stream(self._device):
                return self._run(context, tensors, current)
            stream.wait_stream(current)  # TensorRT would wait for the whole card on the default stream
            found = self._run(context, tensors, stream)
            current.wait_stream(stream)
            return found

        return run

    def _context(self) -> Any:
        trt = self._trt
        strategy: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT-RTX compiles kernels where it runs
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            strategy = config
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise Unavailable("TensorRT has no memory left for a context", hint="serve fewer models on this card")
        if self._memory.numel():
            context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        return context

    def _run(self, context: Any, tensors: Sequence[Any], stream: Any) -> list[Any]:
        import torch

        for name, tensor in zip(self._inputs, tensors, strict=True):
            if name and not (
                context.set_input_shape(name, tuple(tensor.shape))
                and context.set_tensor_address(name, tensor.data_ptr())
            ):
                raise StageFailed(f"TensorRT refuses input {name!r} with shape {list(tensor.shape)}")
        answers = []
        for name, dtype in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise errors.Unsupported(
                    f"the length of output {name!r} depends on values", hint="use another backend for this model"
                )
            answers.append(torch.empty(shape, dtype=dtype, device=self._device))
            context.set_tensor_address(name, answers[-1].data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise StageFailed(f"TensorRT cannot run this input: {'; '.join(_logger(self._trt.__name__).faults)}")
        return answers
