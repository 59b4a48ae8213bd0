"""The user's own module from its source, with the submodules that export run by another backend.

For models that neither `torch.export` nor TorchScript takes: the part that cannot be exported stays Python. The
artifact holds weights and compiled parts; the code is imported from the package that the recipe names, so that package
must be installed where the artifact is opened, and the artifact opens only with trust.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from torchship import plugins
from torchship.errors import BuildFailed, CorruptArtifact, NotFound
from torchship.hardware import Hardware
from torchship.lowering.needs import missing
from torchship.lowering.torch_stage import TorchStage, prepare
from torchship.model import Model, to_numpy, to_torch
from torchship.recipe import Options, Recipe
from torchship.stage import Stage
from torchship.tensors import Signature

if TYPE_CHECKING:
    import torch

KIND = "native"
PACKAGES = ("torch",)
PLAN = "hybrid.json"
WEIGHTS = "weights.safetensors"


class Cut(msgspec.Struct, frozen=True):
    """One submodule that another backend runs; its files lie in `parts/NUMBER`."""

    path: str
    recipe: Recipe
    signature: Signature


class Plan(msgspec.Struct, frozen=True):
    """The content of `hybrid.json`. `args` and `kwargs` hold {"slot": n} where tensor n belongs."""

    source: str
    args: list[Any]
    kwargs: dict[str, Any]
    paths: list[list[tuple[str, str | int]]]
    moves: list[int]
    cuts: list[Cut]


def probe(*, hardware: Hardware) -> str:
    """Why it cannot run here, with the mend; empty when it can."""
    return missing("torch", pip="torchship[optimize]")


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """Nothing by itself: the search asks for it where a model does not export."""
    return []


def build(model: Model, *, options: Options, out: Path) -> None:
    """Write weights, plan and parts. Options: source (module:attribute that makes the module; required), parts (the
    backend of the submodules; none: all stays eager), precision (of the parts). Raises BuildFailed.
    """
    from safetensors.torch import save_model

    source = str(options.get("source") or "")
    inner: Any = model.module.inner
    twin = _make(source) if ":" in source else None
    if twin is None or list(twin.state_dict()) != list(inner.state_dict()):
        raise BuildFailed(
            f"hybrid: {source!r} does not make this module again",
            hint="name a function that builds it: module:function",
        )
    frame: Any = model.module.frame
    args, kwargs = [_emptied(value) for value in frame.args], {k: _emptied(v) for k, v in frame.kwargs.items()}
    cuts = _cut(model, options, out) if options.get("parts") else []
    if options.get("parts") and not cuts:
        raise BuildFailed(f"hybrid: no submodule can be built by {options['parts']}", hint="leave it eager")
    paths: Any = [list(path) for path in model.module.paths]  # type: ignore[union-attr]
    plan = Plan(source, args, kwargs, paths, list(model.module.moves), cuts)  # type: ignore[arg-type]
    (out / PLAN).write_bytes(msgspec.json.encode(plan))
    save_model(inner, str(out / WEIGHTS))


def _make(source: str) -> torch.nn.Module:
    """The module that `module:attribute` is or makes."""
    import torch

    module, _, attribute = source.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
        found = found if isinstance(found, torch.nn.Module) else found()
    except (ImportError, AttributeError, TypeError) as fault:
        raise NotFound(f"hybrid: {source!r} cannot be imported: {fault}", hint="install the model's package") from fault
    if not isinstance(found, torch.nn.Module):
        raise NotFound(f"hybrid: {source!r} makes a {type(found).__name__}, not a module")
    return found


def _emptied(value: Any) -> Any:
    """An argument as JSON, slots instead of tensors."""
    if hasattr(value, "index") and type(value).__name__ == "Slot":
        return {"slot": value.index}
    if isinstance(value, dict):
        return {"dict": {str(key): _emptied(item) for key, item in value.items()}}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_emptied(item) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"is": value}
    raise BuildFailed(f"hybrid: an argument of type {type(value).__name__} cannot be written down")


def _filled(value: dict[str, Any], tensors: tuple[Any, ...]) -> Any:
    ((kind, content),) = value.items()
    if kind == "slot":
        return tensors[content]
    if kind == "dict":
        return {key: _filled(item, tensors) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_filled(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def _cut(model: Model, options: Options, out: Path) -> list[Cut]:
    from torchship.lowering import cutting

    backend = plugins.load("backends", name=str(options["parts"]))
    wanted: Options = {"precision": options["precision"]} if options.get("precision") else {}
    cuts: list[Cut] = []

    def builds(path: str, part: Model) -> bool:
        folder = out / "parts" / str(len(cuts))
        folder.mkdir(parents=True)
        try:
            backend.build(part, options=wanted, out=folder)
        except Exception:  # whatever stops it, its own submodules are tried next
            shutil.rmtree(folder)
            return False
        cuts.append(Cut(path, Recipe(str(options["parts"]), wanted), part.signature))
        return True

    cutting.parts(model, builds=builds)
    return cuts


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Import the source, load the weights, put the parts in their places. Runs the user's code.

    Raises NotFound when the source is not installed, CorruptArtifact when the weights do not fit it.
    """
    from safetensors.torch import load_model

    prepare(device=device, threads=threads)
    plan = msgspec.json.decode((path / PLAN).read_bytes(), type=Plan)
    module = _make(plan.source).eval().requires_grad_(False)
    try:
        load_model(module, str(path / WEIGHTS))
    except (RuntimeError, OSError) as fault:
        raise CorruptArtifact(f"the weights do not fit {plan.source}: {str(fault)[:300]}") from fault
    for number, cut in enumerate(plan.cuts):
        backend = plugins.load("backends", name=cut.recipe.backend)
        stage = backend.open(
            path / "parts" / str(number),
            signature=cut.signature,
            options=cut.recipe.options,
            device=device,
            threads=threads,
        )
        module.set_submodule(cut.path, _as_module(stage))
    module.to(device)
    return TorchStage(_body(module, plan), signature=signature, device=device)


def _as_module(stage: Stage) -> torch.nn.Module:
    import torch

    class Compiled(torch.nn.Module):
        """A stage in the place of a submodule."""

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            """Cross over to the stage and back."""
            feed: Any = {f"x{i}": to_numpy(tensor) for i, tensor in enumerate(tensors)}
            return to_torch(stage(feed)["y"]).to(tensors[0].device)

    return Compiled()


def _body(module: torch.nn.Module, plan: Plan) -> Any:
    def body(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        args = [_filled(value, tensors) for value in plan.args]
        answer = module(*args, **{name: _filled(value, tensors) for name, value in plan.kwargs.items()})
        found = []
        for path in plan.paths:
            value = answer
            for how, key in path:
                value = getattr(value, str(key)) if how == "field" else value[key]
            found.append(value)
        moves = plan.moves or [0] * len(found)
        return tuple(out.movedim(axis, 0) if axis else out for out, axis in zip(found, moves, strict=True))

    return body
