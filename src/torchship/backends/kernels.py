"""A model on a CUDA card with the fastest code for each batch size, shipped in the artifact, replayed as CUDA graphs.

Three kinds of code are timed for each batch size: the exported program by plain torch, inductor's kernels, and
convolutions fused by cuDNN's graph engines and Triton (`lowering.fused_conv`). `torch.compile` at opening costs half a
minute and more, again after every restart; here opening reads what was compiled and captures it.
"""

from __future__ import annotations

import copy
import logging
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from torchship.errors import BuildFailed, CorruptArtifact, Unavailable, Unsupported
from torchship.hardware import Hardware
from torchship.lowering import program, torch_stage
from torchship.lowering.torch_stage import prepare, takes_pictures
from torchship.model import Model
from torchship.plugins import missing
from torchship.recipe import Options, Recipe
from torchship.stage import Stage
from torchship.tensors import Signature

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from torchship.lowering.cuda import Body
    from torchship.lowering.fused_conv import Tuned

_log = logging.getLogger("torchship.kernels")
KIND = "native"
PARTS = ("cuda",)  # where it runs parts of a model that stays Python
TRIED = 1  # in this order among the backends: on a card nothing else wins as often
TAKES = ("rowwise",)  # transforms that it gains from
PACKAGES = ("torch", "nvidia-cudnn-frontend")
OPTIONS = torch_stage.OPTIONS
PLAN = "kernels.json"
CUDNN_PLANS = "cudnn.msgpack"  # cuDNN's compiled plans by the key of the convolution
_ANY = 0  # stands for every batch size, and for what has no rows
_OTHER = "they were compiled by another version of torch or cuDNN: optimize the model again"
_SEARCH_GAIN = 0.97  # of the time without a search; what gains less is not worth the wait at every opening
_GAIN = 0.99  # of plain torch's time; what is not faster than this is not kept
_RECURRENT = ("lstm.", "gru.", "rnn_")  # cuDNN has them; inductor would unroll them over time
_PLAIN, _INDUCTOR, _FUSED = "torch", "inductor", "fused"
_FUSED_FROM = 64  # rows; a smaller batch gains nothing from fused convolutions, and tuning a size takes ten seconds


class KernelPlan(msgspec.Struct, frozen=True):
    """The kind of code for each batch size (0: all), what is fastest for each fused convolution and shape, and the
    sizes for which cuDNN searches its algorithms at opening: most take none, and a search may take seconds."""

    sizes: dict[int, str]
    tuned: dict[str, str] = {}
    searched: tuple[int, ...] = ()


def probe(*, hardware: Hardware) -> str:
    """Why it cannot run here, with the mend; empty when it can."""
    return missing("torch") or ("" if hardware.gpus else "compiled kernels need an NVIDIA card: none is here")


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """Half precision first, then bf16, which overflows later, then tf32."""
    layout: Options = {"channels_last": True} if takes_pictures(model) else {}
    wishes: list[Options] = [{"device": "cuda", "precision": word} for word in ("fp16", "bf16", "tf32")]
    return [Recipe("kernels", wish | layout) for wish in wishes]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Export, then compile and time for each batch size; where other axes are free, compile once for all sizes.

    Options: device, precision, mode, channels_last, keep (see `lowering.torch_stage`). Raises BuildFailed, BadConfig
    or Unavailable without a card.
    """
    device = torch_stage.device_of(options, device="cuda")
    _on_first(device)
    prepare(device=device, threads=0, tf32=options.get("precision") == "tf32", tune=model.signature.fixed)
    exported = program.export(torch_stage.shaped(torch_stage.folded(model), options), device=device)
    program.save(exported, out)
    inputs = model.torch_inputs(model.examples[0], device=device)
    if model.signature.fixed:
        plan = _fastest(exported, inputs, model.signature, out)
    elif (made := _tried(exported, inputs, "from_graph")) is None:
        plan = KernelPlan({_ANY: _PLAIN})
    else:
        _keep(made, out, _ANY)
        plan = KernelPlan({_ANY: _INDUCTOR})
    (out / PLAN).write_bytes(msgspec.json.encode(plan))


def _fastest(exported: ExportedProgram, example: Sequence[torch.Tensor], signature: Signature, out: Path) -> KernelPlan:
    """What is fastest for each batch size; a size for which the card has no memory is run in pieces."""
    import torch

    from torchship.lowering import cuda

    plain = _plain(exported)
    fused = None if _lacking() else _fused(exported)
    sizes: dict[int, str] = {}
    searched: list[int] = []
    compiles = True
    for size in cuda.batch_sizes(signature.max_rows) if signature.batched else [_ANY]:
        rows = torch.arange(size, device=example[0].device)
        inputs = [tensor[rows % tensor.shape[0]] for tensor in example] if size else list(example)
        bodies: dict[str, Body] = {_PLAIN: plain}
        try:
            made = _tried(exported, inputs, "from_example_inputs") if compiles else None
            if compiles := made is not None:
                bodies[_INDUCTOR] = _bound(made, exported)
            if fused is not None and size >= _FUSED_FROM:
                bodies[_FUSED] = fused[0]
            sizes[size], search = _choice(bodies, inputs, searches=_calls(exported, "conv"))
        except torch.OutOfMemoryError:
            break
        searched += [size] if search else []
        if sizes[size] == _INDUCTOR:
            _keep(made, out, size)
    if fused is None or _FUSED not in sizes.values():
        return KernelPlan(sizes, searched=tuple(searched))
    (out / CUDNN_PLANS).write_bytes(msgspec.msgpack.encode(fused[1].plans))
    return KernelPlan(sizes, fused[1].names, tuple(searched))


def _choice(bodies: Mapping[str, Body], inputs: list[torch.Tensor], *, searches: bool) -> tuple[str, bool]:
    """The fastest kind of code, and whether cuDNN should search its algorithms for it."""
    from torchship.lowering import cuda

    times = {name: cuda.graph_ms(_searching(body, False), inputs) for name, body in bodies.items()}
    best = min(times, key=times.__getitem__)
    best = best if times[best] < times[_PLAIN] * _GAIN else _PLAIN
    if not searches or best == _FUSED:
        return best, False
    return best, cuda.graph_ms(_searching(bodies[best], True), inputs) < times[best] * _SEARCH_GAIN


def _calls(exported: ExportedProgram, *names: str) -> bool:
    """Whether an operator is in it whose name begins so."""
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    return any(target.startswith(f"aten.{name}") for target in targets for name in names)


def _plain(exported: ExportedProgram) -> Any:
    """The program by torch; the weights of recurrent layers lie together, as cuDNN wants them."""
    import torch

    module: Any = exported.module(check_guards=False)
    for node in module.graph.nodes:
        kind = {"aten.lstm.input": "LSTM", "aten.gru.input": "GRU"}.get(str(node.target))
        if kind is None:
            continue
        _, _, weights, biases, layers, _, _, both_ways, batch_first = node.args
        found = [operator.attrgetter(weight.target)(module) for weight in weights if weight.op == "get_attr"]
        each = 4 if biases else 2
        if len(found) != each * layers * (2 if both_ways else 1):  # with a projection, or weights that are computed
            continue
        mode: int = torch.backends.cudnn.rnn.get_cudnn_mode(kind)  # type: ignore[no-untyped-call]
        width, hidden = found[0].shape[1], found[1].shape[1]
        with torch.no_grad():
            torch._cudnn_rnn_flatten_weight(found, each, width, mode, hidden, 0, layers, batch_first, both_ways)
    return module


def _searching(body: Body, search: bool) -> Body:
    """`body`, before which cuDNN is told whether to time its algorithms for shapes that it has not seen."""
    import torch

    def run(*inputs: torch.Tensor) -> Any:
        torch.backends.cudnn.benchmark = search
        return body(*inputs)

    return run


def _tried(exported: ExportedProgram, inputs: Sequence[torch.Tensor], shapes: str) -> Any:
    """What inductor makes of it; None for what it cannot compile, or would unroll over time."""
    if _calls(exported, *_RECURRENT):
        return None
    try:
        return compiled(exported, inputs, shapes)
    except BuildFailed as fault:
        _log.info("%s; plain torch is left", fault)
        return None


def compiled(exported: ExportedProgram, inputs: Sequence[torch.Tensor], shapes: Any) -> Any:
    """One graph by inductor, with the weights as inputs. Raises BuildFailed, torch.OutOfMemoryError."""
    import torch
    from torch._inductor import config, standalone_compile

    try:
        with torch.no_grad(), config.patch(freezing=False):  # frozen code keeps its weights, and cannot be written
            graph = copy.deepcopy(exported.graph_module)
            return standalone_compile(graph, [*_weights(exported), *inputs], dynamic_shapes=shapes)
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:
        raise BuildFailed(f"inductor cannot compile this model: {program.one_line(fault)}") from fault


def _keep(compiled: Any, out: Path, size: int) -> None:
    try:
        compiled.save(path=str(out / f"{size}.bin"), format="binary")
    except Exception as fault:
        raise BuildFailed(f"inductor's code cannot be written: {program.one_line(fault)}") from fault


def _read(file: Path) -> Any:
    """What `_keep` wrote. Inductor takes two seconds to import, so only where there is such a file."""
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=str(file), format="binary")


def _weights(exported: ExportedProgram) -> list[torch.Tensor]:
    """What the graph takes before the user's inputs: parameters, buffers and constants, in its order."""
    kept: Mapping[str, Any] = {**exported.state_dict, **exported.constants}
    specs = exported.graph_signature.input_specs
    return [kept[str(spec.target)] for spec in specs if spec.kind.name != "USER_INPUT"]


def _bound(compiled: Callable[..., Any], exported: ExportedProgram) -> Body:
    weights = _weights(exported)
    return lambda *inputs: compiled(*weights, *inputs)


def _lacking() -> str:
    return missing("cudnn triton", pip="nvidia-cudnn-frontend triton")


def _fused(exported: ExportedProgram, tuned: Tuned | None = None) -> tuple[Body, Tuned] | None:
    """The program with fused convolutions and what is known of them; None where there are none."""
    from torchship.lowering.fused_conv import Tuned, fuse

    module: Any = exported.module(check_guards=False)
    tuned = tuned or Tuned()
    return (module, tuned) if fuse(module, tuned) else None


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Read program and kernels, and capture the batch sizes: the smallest and the largest first, so that rows of any
    number are answered soon, the others beside the calls. The kernels are read by pickle: opens with trust only.

    Raises UnsafeArtifact, CorruptArtifact, Unavailable or Unsupported.
    """
    from torchship.lowering.cuda import CudaStage

    device = torch_stage.device_of(options, device=device)
    _on_first(device)
    prepare(device=device, threads=threads, tf32=options.get("precision") == "tf32", tune=signature.fixed)
    threading.Thread(target=_wake, args=(device,)).start()
    exported = program.load_exported(path)
    try:
        plan = msgspec.json.decode((path / PLAN).read_bytes(), type=KernelPlan)
        compiled = {size for size, kind in plan.sizes.items() if kind == _INDUCTOR}
        later = compiled - {min(plan.sizes), max(plan.sizes)} if signature.fixed and signature.batched else set[int]()
        read = {size: _read(path / f"{size}.bin") for size in compiled - later}
    except Exception as fault:
        raise CorruptArtifact(f"the kernels cannot be loaded: {program.one_line(fault)}", hint=_OTHER) from fault
    plain = _plain(exported)
    tables = program.table_sizes(plain)
    bodies: dict[int, Body] = dict.fromkeys(plan.sizes.keys() - later, plain)
    bodies |= {size: _bound(compiled, exported) for size, compiled in read.items()}
    if _FUSED in plan.sizes.values():
        fused = _tuned(path, plan, exported)
        bodies |= {size: fused for size, kind in plan.sizes.items() if kind == _FUSED}

    def read_later(size: int) -> Body:
        return _searching(_bound(_read(path / f"{size}.bin"), exported), size in plan.searched)

    bodies = {size: _searching(body, size in plan.searched) for size, body in bodies.items()}
    every = bodies.pop(_ANY, plain) if not signature.fixed else plain
    rest = {size: partial(read_later, size) for size in later}
    return CudaStage(every, signature=signature, device=device, graphs=True, bodies=bodies, later=rest, tables=tables)


def _wake(device: str) -> None:
    """Make the card's context, which takes most of a second, while torch imports what reads programs."""
    import torch

    with suppress(RuntimeError):  # whoever uses the card next is told
        torch.zeros(1, device=device)


def _tuned(path: Path, plan: KernelPlan, exported: ExportedProgram) -> Body:
    """The program with fused convolutions as it was tuned when it was built. Raises Unavailable, CorruptArtifact."""
    if lacking := _lacking():
        raise Unavailable(f"this artifact's kernels need it: {lacking}")
    from torchship.lowering.fused_conv import Tuned

    try:
        plans = msgspec.msgpack.decode((path / CUDNN_PLANS).read_bytes(), type=dict[str, bytes])
        tuned = Tuned(plan.tuned, plans)
    except Exception as fault:
        raise CorruptArtifact(f"cuDNN's plans cannot be loaded: {program.one_line(fault)}", hint=_OTHER) from fault
    found = _fused(exported, tuned)
    if found is None:
        raise CorruptArtifact("there are plans, but no convolutions that they fit", hint=_OTHER)
    return found[0]


def _on_first(device: str) -> None:
    if device not in ("cuda", "cuda:0"):
        raise Unsupported(
            f"compiled kernels run on the first card that a process sees, not on {device!r}",
            hint="set CUDA_VISIBLE_DEVICES to that card for this process, and use device cuda",
        )
