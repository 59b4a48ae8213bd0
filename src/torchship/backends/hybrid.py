"""The user's own module as Python, with the submodules that export run by another backend.

For models that neither `torch.export` nor TorchScript takes. The artifact holds a blueprint (class names and plain
attributes), weights and compiled parts, never a pickle. The classes are imported by name where it is opened, so their
package must be installed there; what a script defines itself goes along as source text. It opens only with trust.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from torchship import plugins, process
from torchship.errors import BuildFailed, CorruptArtifact, NotFound
from torchship.hardware import Hardware
from torchship.lowering import blueprint, program, torch_stage
from torchship.lowering.blueprint import Blueprint, Cut
from torchship.lowering.torch_stage import no_fast_path, prepare
from torchship.model import Model
from torchship.plugins import needs
from torchship.recipe import Options, Recipe, choice
from torchship.stage import Stage
from torchship.tensors import Signature

if TYPE_CHECKING:
    import torch

KIND = "native"
PLAIN = ("source",)  # with no more options than these it is the module as it is
PACKAGES = ("torch",)
probe = needs("torch")
OPTIONS = ("source", "parts", "precision", "mode", "device")
PLAN = "hybrid.json"
WEIGHTS = "weights.safetensors"
SCRIPT = "script.py"
_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_MODES = ("autocast", "cast")
_VERSIONED = (*sys.stdlib_module_names, "torch", "torchvision", "torchaudio", "torchship")


class HybridPlan(msgspec.Struct, frozen=True):
    """The content of `hybrid.json`. `call` is the pair of arguments and keyword arguments, with slots for tensors.

    The module comes out of `drawn`, or is made by the function that `source` names. `digests` are those of the classes'
    source code.
    """

    source: str
    drawn: Blueprint | None
    digests: dict[str, str]
    call: Blueprint
    paths: list[list[tuple[str, str | int]]]
    moves: list[int]
    written: list[int]
    cuts: list[Cut]


def propose(model: Model, *, hardware: Hardware) -> list[Recipe]:
    """Nothing by itself: the search asks for it where a model does not export."""
    return []


def stand_in(model: Model, *, source: str, hardware: Hardware, among: Sequence[str]) -> list[Recipe]:
    """For a model that no other engine takes: kept as Python, whole or with its parts run by some `among` the backends.

    `source` names the function that makes the module, for one that cannot be written down.
    """
    own: Options = {}
    try:
        blueprint.draw(model.module.inner)
    except BuildFailed:
        own = {"source": source} if ":" in source else {}
    engines = [
        name
        for name in sorted(among, key=lambda name: int(plugins.fact("backends", name, "TRIED", 9)))
        if plugins.fact("backends", name, "PARTS", ())
        and not plugins.reason_against("backends", name=name, hardware=hardware)
    ]
    found = [own]
    if hardware.gpus:
        card: Options = {**own, "device": "cuda"}
        half = {**card, "precision": "fp16"}
        parts = [{**half, "parts": name} for name in engines if "cuda" in plugins.fact("backends", name, "PARTS")]
        found += [card, half, *parts[:1], {**half, "mode": "cast"}, {**card, "precision": "tf32"}]
    found += [{**own, "parts": name} for name in engines if "cpu" in plugins.fact("backends", name, "PARTS")]
    if hardware.has_bf16:
        found.append({**own, "precision": "bf16"})
    return [Recipe("hybrid", options) for options in found]


def build(model: Model, *, options: Options, out: Path) -> None:
    """Write blueprint, weights and parts. Options: parts (the backend of the submodules; none: all stays eager),
    precision (of the parts; where all stays eager fp32, tf32, bf16, fp16), mode (autocast or cast), device, source
    (module:function that makes the module, for one that cannot be written down). Raises BuildFailed or BadConfig.
    """
    import torch
    from safetensors.torch import save_file

    flat: Any = model.module
    source = str(options.get("source") or "")
    choice(options, "mode", _MODES, of="hybrid")
    if not options.get("parts"):
        choice(options, "precision", _PRECISIONS, of="hybrid")
    drawing = None if source else blueprint.draw(flat.inner)
    tensors = drawing.tensors if drawing else _by_source(source, flat.inner)
    call = blueprint.draw((flat.frame.args, flat.frame.kwargs))
    named = {**(drawing.named if drawing else {}), **call.named}
    own = {name: value for name, value in named.items() if name.startswith("__main__:")}
    plan = HybridPlan(
        source=source,
        drawn=drawing and drawing.blueprint,
        digests=_digests({name: value for name, value in named.items() if name not in own}),
        call=call.blueprint,
        paths=[list(path) for path in flat.paths],
        moves=list(flat.moves),
        written=list(flat.written),
        cuts=_cut(model, options, out) if options.get("parts") else [],
    )
    if own:
        (out / SCRIPT).write_text(_script(own))
    (out / PLAN).write_bytes(msgspec.json.encode(plan))
    # safetensors know neither complex numbers nor shared memory
    plain = {k: (torch.view_as_real(t) if t.is_complex() else t).contiguous().clone() for k, t in tensors.items()}
    save_file(plain, str(out / WEIGHTS), {"complex": " ".join(name for name, t in tensors.items() if t.is_complex())})


def _cut(model: Model, options: Options, out: Path) -> list[Cut]:
    from torchship.lowering import cutting

    backend = str(options["parts"])
    recipe = Recipe(backend, {key: options[key] for key in ("precision", "device") if options.get(key)})
    return cutting.cut(model, recipe, build=plugins.load("backends", name=backend).build, out=out / "parts")


def _script(named: dict[str, Any]) -> str:
    """What these classes and functions need of the script that defines them. Raises BuildFailed without its file."""
    names = [name.partition(":")[2] for name in named]
    fault = BuildFailed(
        f"hybrid: {names[0]} is defined in no file", hint="move the classes from the notebook to a module"
    )
    members = (vars(value).values() if isinstance(value, type) else [value] for value in named.values())
    functions = [one for one in itertools.chain(*members) if isinstance(one, types.FunctionType)]
    for file in dict.fromkeys(function.__code__.co_filename for function in functions):
        try:
            return blueprint.excerpt(Path(file).read_text(), names=names, file=file)
        except OSError:
            continue
        except BuildFailed as found:  # decorators bring functions from elsewhere
            fault = found
    raise fault


def _digests(named: dict[str, Any]) -> dict[str, str]:
    """Short hashes of the source code of the classes, with those that they build on, and of the functions."""
    found = {name: "".join(map(_source_of, getattr(value, "__mro__", (value,)))) for name, value in named.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items() if text}


def _source_of(value: Any) -> str:
    """Empty for Python's and torch's own, which come with a version, and for what was not written in Python."""
    if str(value.__module__).partition(".")[0] in _VERSIONED:
        return ""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""


def _by_source(source: str, inner: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights, by the names that the module of `source` has for them. Raises BuildFailed."""
    twin = _make(source) if ":" in source else None
    if twin is None or list(twin.state_dict()) != list(inner.state_dict()):
        raise BuildFailed(
            f"hybrid: {source!r} does not make this module again",
            hint="name a function that builds it: module:function",
        )
    return dict(inner.state_dict())


def _make(source: str) -> torch.nn.Module:
    """The module that `module:attribute` is or makes."""
    import torch

    try:
        found: Any = process.resolve(source)
        found = found if isinstance(found, torch.nn.Module) else found()
    except (ImportError, AttributeError, TypeError) as fault:
        raise NotFound(f"hybrid: {source!r} cannot be imported: {fault}", hint="install the model's package") from fault
    if not isinstance(found, torch.nn.Module):
        raise NotFound(f"hybrid: {source!r} makes a {type(found).__name__}, not a module")
    return found


def open(path: Path, *, signature: Signature, options: Options, device: str = "cpu", threads: int = 0) -> Stage:
    """Import the classes, put the module together, put the parts in their places. Runs the user's code.

    Raises NotFound when a class is not installed, CorruptArtifact when its code or the weights do not fit.
    """
    import torch

    from torchship.lowering import cutting, variants

    device = torch_stage.device_of(options, device=device)
    # what is free inside is not known, so no time is spent on tuning for a shape
    prepare(device=device, threads=threads, tf32=options.get("precision") == "tf32", tune=False)
    try:
        plan = msgspec.json.decode((path / PLAN).read_bytes(), type=HybridPlan)
    except msgspec.MsgspecError as fault:
        raise CorruptArtifact(
            f"{PLAN} is not what this version of torchship writes: {fault}",
            hint="it was made by another version: optimize the model again, or open it with that one",
        ) from fault
    module, call = _raised(plan, path, device)
    module.eval().requires_grad_(False)
    for number, cut in enumerate(plan.cuts):
        backend = plugins.load("backends", name=cut.recipe.backend)
        stage = backend.open(
            path / "parts" / str(number),
            signature=cut.signature,
            options=cut.recipe.options,
            device=device,
            threads=threads,
        )
        if (settle := getattr(stage, "settle", None)) is not None:
            settle()  # a part is called without the stage's lock
        module.set_submodule(cut.path, cutting.CutModule(stage, cut, module.get_submodule(cut.path)))
    module.to(device)
    word = "" if plan.cuts else str(options.get("precision", ""))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(word)
    cast = dtype is not None and options.get("mode") == "cast"
    body = _body(module, plan, call, narrow=None if cast else dtype, device=device)
    if dtype is not None and cast:
        variants.narrow_inputs(module.to(dtype), dtype)
        body = _cast(body, signature, dtype)
    return torch_stage.staged(_on_one_device(body, device), signature=signature, device=device)


def _raised(plan: HybridPlan, path: Path, device: str) -> tuple[torch.nn.Module, Any]:
    """The module, and the arguments and keyword arguments of its call, with their tensors on `device`: those too that
    are plain attributes, which `Module.to` does not move."""
    import torch
    from safetensors import safe_open

    with safe_open(str(path / WEIGHTS), "pt", device=device) as file:
        names = (file.metadata() or {}).get("complex", "").split()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    named: dict[str, Any] = {}
    script = _run_script(path / SCRIPT) if (path / SCRIPT).is_file() else None

    def resolve(name: str) -> Any:
        home, _, attribute = name.partition(":")
        if home != "__main__" or script is None:
            named[name] = process.resolve(name)
            return named[name]
        return functools.reduce(getattr, attribute.split("."), script)

    call = blueprint.raise_up(plan.call, {}, resolve=resolve)
    if plan.drawn is None:
        module = _make(plan.source)
        try:
            module.load_state_dict(weights)
        except RuntimeError as fault:
            raise CorruptArtifact(f"the weights do not fit {plan.source}: {str(fault)[:300]}") from fault
    else:
        for name in names:
            weights[name] = torch.view_as_complex(weights[name])
        module = blueprint.raise_up(plan.drawn, weights, resolve=resolve)
    changed = [name for name, digest in _digests(named).items() if plan.digests.get(name, digest) != digest]
    if changed:
        raise CorruptArtifact(
            f"the code of {changed[0]} is not what it was when the artifact was made",
            hint="install that version of it, or optimize the model again",
        )
    return module, call


def _run_script(path: Path) -> types.ModuleType:
    """The artifact's own source text as a module."""
    text = path.read_bytes()
    module = types.ModuleType(f"torchship_script_{hashlib.sha256(text).hexdigest()[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(text, str(path), "exec"), vars(module))  # noqa: S102  # opened with trust only
    return module


def _body(
    module: torch.nn.Module, plan: HybridPlan, call: Any, *, narrow: torch.dtype | None, device: str
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The flat call; under autocast to `narrow` where that is given."""
    import torch

    from torchship.lowering import tree

    moves = plan.moves or [0] * len(plan.paths)
    kind = torch.device(device).type

    def body(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors = tuple(tensor.clone() if i in plan.written else tensor for i, tensor in enumerate(tensors))
        args, kwargs = tree.fill(call, tensors)
        with torch.autocast(kind, dtype=narrow, enabled=narrow is not None), no_fast_path():
            answer = module(*args, **kwargs)
        found = (tree.follow(answer, tuple(path)) for path in plan.paths)
        return tuple(out.movedim(axis, 0) if axis else out for out, axis in zip(found, moves, strict=True))

    return body


def _cast(
    body: Callable[..., tuple[torch.Tensor, ...]], signature: Signature, dtype: torch.dtype
) -> Callable[..., Any]:
    """`body` of a module whose weights are of `dtype`: what goes in is made to fit, what comes out is as promised."""
    from torchship.lowering.variants import to_torch_dtype

    wanted = [to_torch_dtype(spec.dtype) for spec in signature.outputs]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        answers = body(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors))
        return tuple(answer.to(kind) for answer, kind in zip(answers, wanted, strict=True))

    return run


def _on_one_device(body: Callable[..., Any], device: str) -> Callable[..., Any]:
    """`body`; where it makes tensors on the processor (`torch.arange(n)`) and joins them with those on a card, it is
    run again with the card as the place of new tensors, and so from then on, at some microseconds for each operator."""
    import torch

    if device == "cpu":
        return body
    place: Any = contextlib.nullcontext()

    def run(*tensors: torch.Tensor) -> Any:
        nonlocal place
        try:
            with place:
                return body(*tensors)
        except RuntimeError as fault:
            if isinstance(place, torch.device) or not program.on_two_devices(fault):
                raise
        place = torch.device(device)
        with place:
            return body(*tensors)

    return run
