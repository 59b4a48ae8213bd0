"""A Model as an exported program (`torch.export`): made, straightened for compilers, saved, loaded as plain data."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import operator
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torchship.errors import BadConfig, BadInput, BuildFailed, CorruptArtifact, TorchshipError, Unavailable
from torchship.lowering.safety import refuse_code_in_program
from torchship.model import Model
from torchship.tensors import Signature, Tensors

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram
    from torch.nn import Module

Made = TypeVar("Made")
PROGRAM = "program.pt2"
_ModuleT = TypeVar("_ModuleT", bound="Module")
_HOMES = {"torchvision": "torchvision", "torchao": "torchao", "torchaudio": "torchaudio"}
_CALL = re.compile(rb"\bops\.(\w+)\.")
_TARGET = re.compile(rb'(?<!\\)"torch\.ops\.(\w+)\.')  # of a node; lines of the user's code are there too
_READ = (".json", ".py")
_SUGGESTED = re.compile(r"\b(\w+) = Dim\('\w+'((?:, (?:min|max)=\d+)+)\)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def one_line(fault: BaseException, *, limit: int = 400) -> str:
    """Type and message of an exception on one line of at most `limit` characters."""
    text = f"{type(fault).__name__}: {' '.join(_COLOUR.sub('', str(fault)).split())}"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@contextlib.contextmanager
def as_error(kind: type[TorchshipError], words: str, *, hint: str = "") -> Iterator[None]:
    """Turns whatever is raised inside into a `kind` that begins with `words`; wrong options stay BadConfig."""
    try:
        yield
    except (kind, BadConfig):
        raise
    except Exception as fault:
        raise kind(f"{words}: {one_line(fault)}", hint=hint) from fault


def export(model: Model, *, device: str = "cpu", ceiling: int | None = None) -> ExportedProgram:
    """`torch.export` on `device` with a Dim for every free axis (at most `ceiling` where unbounded).

    The example must have two rows or more: torch specialises on one. A module that makes tensors on the processor
    itself (`torch.arange(n)`) is exported there, and the program moved. Raises BuildFailed with torch's reason.
    """
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise BuildFailed(f"torch sees no device {device!r}", hint="check nvidia-smi and that torch is a CUDA build")
    module = model.module.eval() if device == "cpu" else copy.deepcopy(model.module).eval().to(device)
    inputs = model.torch_inputs(model.examples[0], device=device)
    hint = "torchship doctor says where and why"
    with as_error(BuildFailed, "torch.export cannot capture this model", hint=hint), torch.no_grad():
        try:
            return within_bounds(
                model, lambda shapes: torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False), ceiling
            )
        except Exception as fault:
            if device == "cpu" or not on_two_devices(fault):
                raise
            from torch.export.passes import move_to_device_pass

            return move_to_device_pass(export(model, ceiling=ceiling), device)


def on_two_devices(fault: BaseException) -> bool:
    """Whether this is torch's word for tensors that are not on one device."""
    return any(
        words in str(fault) for words in ("on the same device", "different devices", "not on the expected device")
    )


def within_bounds(model: Model, exporting: Callable[[Any], Made], ceiling: int | None = None) -> Made:
    """What `exporting(dynamic_shapes)` makes, tried again within the bounds that torch suggests where it refuses.

    A graph that holds for fewer lengths than the signature is told by the guard, which tries both ends.
    """
    limits: dict[str, tuple[int, int | None]] = {}
    while True:
        try:
            return exporting(model.dynamic_shapes(ceiling=ceiling, limits=limits))
        except Exception as fault:
            found = suggested(fault)
            if all(limits.get(name) == bounds for name, bounds in found.items()):
                raise
            limits |= found


def suggested(fault: BaseException | None) -> dict[str, tuple[int, int | None]]:
    """The bounds that torch suggests in an error, or in what caused it: `seq = Dim('seq', min=2, max=512)`."""
    found: dict[str, tuple[int, int | None]] = {}
    while fault is not None:
        for name, inside in _SUGGESTED.findall(str(fault)):
            ends = dict(re.findall(r"(min|max)=(\d+)", inside))
            found.setdefault(name, (int(ends.get("min", 1)), int(ends["max"]) if "max" in ends else None))
        fault = fault.__cause__
    return found


def save(program: ExportedProgram, out: Path) -> None:
    """Write `program` into the folder `out`. Raises BuildFailed when torch cannot write it as plain data."""
    import torch

    with as_error(BuildFailed, "the exported program cannot be saved as plain data"):
        torch.export.save(program, out / PROGRAM)
        refuse_code_in_program(out / PROGRAM)


def load(folder: Path) -> torch.nn.Module:
    """The module of the program in `folder`, on the device it was exported on; raises as `load_exported` does."""
    return load_exported(folder).module(check_guards=False)


def load_exported(folder: Path) -> ExportedProgram:
    """The program in `folder`. Raises CorruptArtifact, UnsafeArtifact or Unavailable."""
    import torch

    refuse_code_in_program(folder / PROGRAM)
    import torch.ao.quantization.fx._decomposed  # registers the operators of quantized programs

    register_operators(folder / PROGRAM)
    hint = "open it with the torch version that the manifest names"
    with as_error(CorruptArtifact, f"{PROGRAM} cannot be loaded by torch {torch.__version__}", hint=hint):
        return torch.export.load(folder / PROGRAM)


def register_operators(path: Path) -> None:
    """Import the packages whose operators the torch archive at `path` calls.

    Raises Unavailable without one, and for operators of the user's own that nothing has defined yet.
    """
    import torch

    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(_READ)]
        text = b"\n".join(map(archive.read, names))
    called = {word.decode() for word in _CALL.findall(text)}
    for home in sorted({_HOMES[name] for name in called if name in _HOMES}):
        try:
            import_module(home)
        except ImportError as fault:
            raise Unavailable(
                f"{path.name} calls operators of {home}, which is not to be had: {fault}", hint=f"pip install {home}"
            ) from fault
    known = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()} | {"higher_order"}
    if unknown := sorted({word.decode() for word in _TARGET.findall(text)} - known):  # TorchScript says so itself
        raise Unavailable(
            f"{path.name} calls operators of {unknown[0]!r}, which nothing has registered in this process",
            hint="import the module that defines them before the artifact is opened",
        )


def table_sizes(module: torch.nn.Module) -> dict[int, int]:
    """For each input of the program's module that is looked up in tables (embeddings) as it comes: by its place, the
    rows of the smallest. An index beyond costs a CUDA process its life, so it must be refused before."""
    import torch

    made: Any = module
    places = {node: place for place, node in enumerate(n for n in made.graph.nodes if n.op == "placeholder")}
    found: dict[int, int] = {}
    for node in made.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[1] in places:
            rows = int(operator.attrgetter(node.args[0].target)(made).shape[0])
            place = places[node.args[1]]
            found[place] = min(rows, found.get(place, rows))
    return found


def check_indices(signature: Signature, tensors: Tensors, tables: Mapping[int, int]) -> None:
    """Raise BadInput where an input holds an index that a table of the model has no row for.

    `tables` gives the rows of the smallest table by the input's place, see `table_sizes`.
    """
    for place, rows in tables.items():
        name = signature.inputs[place].name
        array = tensors[name]
        if array.size and (int(array.max()) >= rows or int(array.min()) < 0):
            wrong = int(array.max()) if int(array.max()) >= rows else int(array.min())
            raise BadInput(
                f"tensor {name!r} holds {wrong}, which is no row of a table with {rows} rows",
                hint=f"send values from 0 to {rows - 1}: is the tokenizer that of the model?",
            )


def straighten(module: _ModuleT) -> _ModuleT:
    """Put a copy before every linear layer of the graph module that reads three axes or more out of order, in place.

    `nn.MultiheadAttention` turns its input that way. With lengths that are fixed the compiler sees through it; with a
    free one it made a product of matrices for each row, each with a copy of the weights: 16 times slower in bf16.
    """
    import torch

    made: Any = module
    for node in list(made.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.linear.default:
            continue
        source = node.args[0]
        seen = source.meta.get("val")
        if seen is None or seen.dim() < 3 or seen.is_contiguous():
            continue
        with made.graph.inserting_before(node):
            kept = {"memory_format": torch.contiguous_format}
            copy = made.graph.call_function(torch.ops.aten.clone.default, (source,), kept)
        copy.meta = {**source.meta, "val": seen.contiguous()}
        node.replace_input_with(source, copy)
    made.recompile()
    return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and converters say nothing meanwhile: no output, no warnings, no log lines below errors."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
