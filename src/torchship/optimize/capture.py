"""Captures a module: any nn.Module with example inputs becomes a Model with flat, named, typed tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from torchship.errors import BadInput, CaptureFailed
from torchship.lowering.program import one_line
from torchship.lowering.torch_stage import no_fast_path
from torchship.lowering.tree import Parts
from torchship.model import Model, to_numpy, to_torch
from torchship.optimize import axes, decisions, freeze, reparameterize
from torchship.optimize.flatten import CallTemplate, Flat, kind_of, outline, parameters_of, take_apart
from torchship.optimize.places import Place, innermost
from torchship.optimize.rows import Call, Run, Shape
from torchship.optimize.samples import as_call, flatten_samples, masked, random_inputs, vocabularies
from torchship.tensors import Free, Signature, Tensors, TensorSpec, dtype_name

CALIBRATION_ROWS = 512


def capture(
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    calibration: Iterable[Any] | None = None,
    free: Mapping[str, Mapping[int, Free | str]] = {},
    batched: bool | None = None,
    name: str = "",
) -> Model:
    """The Model of `module`, in eval mode with frozen weights; the given module is left as it is.

    `example_inputs`: a tensor; a tuple of arguments; a dict of keyword arguments; a list of several of these with
    different shapes; or TensorSpecs (random inputs are made; they are matched to the arguments by name, else by
    order). Arguments may nest tensors in dicts, lists and tuples. Axes whose length differs between examples are
    free, those that vary alike are one named axis; `free` frees others: `{"ids": {1: "seq"}}`. Axis 0 is the batch
    axis, and free, where the module keeps the rows and treats each by itself (this is tried); `batched=False`
    forbids it. Outputs are flattened: dict keys, fields and indices give the names; None is dropped.

    Raises CaptureFailed when the module cannot run on the examples, naming its own error.
    """
    inner = freeze.frozen(module)
    specs, examples = _examples(inner, example_inputs)
    dense = freeze.make_dense(inner)
    inner, fused = reparameterize.fused(inner, lambda net: net(*examples[0][0], **examples[0][1]))
    frame, first = take_apart(inner, *examples[0])
    names = [spec.name for spec in specs] if specs else [name for name, _ in first]
    calls = _calls(inner, examples, frame)
    restore = freeze.remember(inner)
    flat = _flat(inner, frame, names, calls[0], dense=dense)
    changed = restore()
    decided = _decided(flat, calls[0])
    restore()
    with torch.inference_mode():
        shapes = [spec.shape for spec in specs] if specs else axes.input_shapes(names, calls, free=free)
        if any(not spec.shape or isinstance(spec.shape[0], int) for spec in specs):
            batched = False  # the caller fixed axis 0
        study = axes.study(_watched(flat), calls, shapes, names=names, batched=batched, decided=decided)
    flat.remembers = restore(attributes=True)
    inputs = _specs(names, calls[0], study.inputs)
    signature = Signature(inputs, _specs(flat.output_names, study.outputs, study.output_shapes), study.batched)
    # other lengths and values are examples too: the guard is to see them
    examples = _longer(flat, _arrays(names, [*calls, *study.tried]), signature)
    edges = _arrays(names, study.edges)
    flat.notes = [*dense, *fused, *study.notes, *flat.dropped, *_on_buffers(changed)]
    flat.moves, flat.steady = study.moves, study.steady
    flat.decided, flat.tried = tuple(decided), len(study.tried)  # so many of the last examples are made up
    fit = () if calibration is None else flatten_samples(calibration, signature=signature, rows=CALIBRATION_ROWS)
    name = name or type(module).__name__
    return Model(module=flat, signature=signature, examples=examples, edges=edges, calibration=fit, name=name)


def _decided(flat: Any, call: Call) -> list[Place]:
    # what stands for the lines of a module that has none of Python
    outside = Place("TorchScript", 0, code="its code") if isinstance(flat.inner, torch.jit.ScriptModule) else None
    return decisions.decisions(flat.run, call, outside=outside)


def _on_buffers(changed: Sequence[str]) -> list[str]:
    if not changed:
        return []
    return [f"forward changes buffers ({', '.join(changed[:4])}): what they gather while serving is not kept"]


def _arrays(names: Sequence[str], calls: Iterable[Call]) -> list[Tensors]:
    return [{n: to_numpy(t) for n, t in zip(names, call, strict=True)} for call in calls]


def _specs(names: Sequence[str], tensors: Sequence[torch.Tensor], shapes: Sequence[Shape]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(n, _dtype(n, t), s) for n, t, s in zip(names, tensors, shapes, strict=True))


def _calls(module: torch.nn.Module, examples: Sequence[Any], frame: CallTemplate) -> list[list[torch.Tensor]]:
    """The tensors of each example: copies, for forward may write into what it is given."""
    frames, taken = zip(*(take_apart(module, *call) for call in examples), strict=True)
    for name, tensor in taken[0]:
        _dtype(name, tensor)
    if any(other != frame for other in frames):
        counts = [len(call) for call in taken]
        raise CaptureFailed(
            f"the examples differ in their number of tensors ({counts}), or in arguments that are no tensors",
            hint="an artifact has one set of inputs: optimize once for each",
        )
    if any(call and all(tensor.ndim and not len(tensor) for _, tensor in call) for call in taken):
        raise CaptureFailed("the example inputs hold no rows", hint="give tensors with two rows or more on axis 0")
    return [[tensor.detach().cpu().clone() for _, tensor in call] for call in taken]


def _examples(module: torch.nn.Module, given: Any) -> tuple[list[TensorSpec], list[Any]]:
    """The specs where there are such, and the examples, each as arguments and keyword arguments."""
    several = given if isinstance(given, list | tuple) and given else [given]
    if all(isinstance(item, TensorSpec) for item in several):
        specs = list(several)
        if left_out := [spec.name for spec in specs if spec.optional]:
            raise CaptureFailed(
                f"inputs {left_out} are optional, which those of an exported model cannot be",
                hint="an artifact has one set of inputs: optimize once for each",
            )
        made = [t for size in vocabularies(module) for t in masked(specs, random_inputs(specs, vocabulary=size))]
        calls = [_by_name(module, specs, tensors) for tensors in made]
        return specs, [next((call for call in calls if _has_numbers(module, call)), calls[0])]
    if isinstance(given, list) and not given:
        raise CaptureFailed("there are no example inputs", hint="give a tensor, a tuple, a dict, or TensorSpecs")
    calls = [as_call(example) for example in (given if isinstance(given, list) else [given])]
    order = calls[0][1]
    return [], [(args, {**{name: kw[name] for name in order if name in kw}, **kw}) for args, kw in calls]


def _has_numbers(module: torch.nn.Module, call: Any) -> bool:
    """Whether the module answers without NaN: it does not where a mask leaves a row nothing to attend to."""
    args, kwargs = copy.deepcopy(call)
    try:
        with torch.inference_mode(), no_fast_path():
            return not any(bool(torch.isnan(leaf.value).any()) for leaf in outline(module(*args, **kwargs)))
    except Exception:  # what it is will be told where the example is run
        return False


def _by_name(module: torch.nn.Module, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> Any:
    """Keyword arguments where every name is a parameter of forward, else arguments in order."""
    known = {parameter.name for parameter in parameters_of(module)}
    if all(spec.name in known for spec in specs):
        return (), {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)}
    return tuple(tensors), {}


def _flat(
    module: torch.nn.Module,
    frame: CallTemplate,
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    *,
    dense: Sequence[str],
) -> Any:
    given = [tensor.clone() for tensor in tensors]
    args, kwargs = frame.fill(given)
    try:
        with torch.inference_mode(), no_fast_path():
            answer = module(*args, **kwargs)
    except Exception as fault:
        failed = _failed(module, frame, names, tensors, fault)
        if not dense:
            raise failed from fault
        raise CaptureFailed(
            f"{dense[0]}; so {failed}",
            hint="keep the indices and values of what must be sparse as buffers: index_select and index_add take them",
        ) from fault
    parts = Parts()
    leaves = outline(answer, parts)
    for leaf in parts.hiding:
        name = f"output {leaf.name!r}" if leaf.name else f"what {type(module).__name__} returns"
        raise CaptureFailed(
            f"{name} is a {kind_of(leaf.value)}: its tensors are out of reach",
            hint="return tensors, in lists, dicts, dataclasses or objects that keep them as attributes",
        )
    if not leaves:
        raise CaptureFailed(f"{type(module).__name__} returns no tensor", hint="return tensors, or containers of them")
    for leaf in leaves:
        _dtype(leaf.name, leaf.value)
    flat: Any = Flat(module, frame=frame, names=names, paths=[leaf.path for leaf in leaves])
    flat.output_names = [leaf.name for leaf in leaves]
    flat.dropped = [
        f"output {leaf.name!r} is a {kind_of(leaf.value)}, no tensor of rows: it is left out" for leaf in parts.others
    ]
    versions = zip(given, tensors, strict=True)
    flat.written = tuple(i for i, (now, was) in enumerate(versions) if now._version or not freeze.same(now, was))
    return flat.eval()


def _failed(
    module: torch.nn.Module,
    frame: CallTemplate,
    names: Sequence[str],
    tensors: Sequence[torch.Tensor],
    fault: Exception,
) -> CaptureFailed:
    """What to say of a module that fails on its examples: where, and whether it is for want of gradients."""
    name, where = type(module).__name__, innermost(fault)
    at = f" at {where}: {where.code}" if where else ""
    args, kwargs = frame.fill([tensor.clone() for tensor in tensors])
    try:
        with torch.enable_grad():
            module(*args, **kwargs)
    except Exception:  # it fails with gradients as well
        shapes = ", ".join(f"{n}{list(t.shape)}" for n, t in zip(names, tensors, strict=True))
        return CaptureFailed(
            f"{name} fails on its example inputs ({shapes}){at}: {one_line(fault)}",
            hint="are these the shapes and dtypes that forward takes? in eval mode?",
        )
    return CaptureFailed(
        f"{name} computes gradients in its forward (torch.autograd.grad, backward or requires_grad){at}: an artifact "
        "runs without autograd",
        hint="use torch.func.grad, which needs no autograd around it, or return the energy and differentiate outside",
    )


def _watched(flat: Any) -> Run:
    """What `flat` does, where its outputs keep the names that they had at first. Raises CaptureFailed."""

    def run(call: Call) -> tuple[torch.Tensor, ...]:
        output = flat.answer(call)
        found = [leaf.name for leaf in outline(output)]
        if found != flat.output_names:
            raise CaptureFailed(
                f"the outputs change with the input: {', '.join(flat.output_names)} for the first example, "
                f"{', '.join(found) or 'none'} for inputs of shape {[list(tensor.shape) for tensor in call]}",
                hint="return the same outputs each time: stack a list that grows with the input into one tensor, "
                "put a tensor where one can be missing",
            )
        return flat.take(output)  # type: ignore[no-any-return]

    return run


def _dtype(name: str, tensor: torch.Tensor) -> str:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise CaptureFailed(
            f"tensor {name!r} is {kind}, which no wire format carries",
            hint="take and return dense tensors: the indices and values of a sparse one, the padded rows of a nested "
            "one, and dequantize()",
        )
    try:
        return dtype_name(to_numpy(tensor).dtype)
    except (BadInput, TypeError) as fault:
        raise CaptureFailed(
            f"tensor {name!r} is {tensor.dtype}, which no wire format carries",
            hint="use torch.view_as_real for complex numbers, and int8 or float16 for exotic ones",
        ) from fault


def _longer(flat: Flat, examples: Sequence[Tensors], signature: Signature) -> list[Tensors]:
    """The examples, the first with free axes of two or more where that may be: exporters specialise on one."""
    longer = dict(examples[0])
    for spec in signature.inputs:
        for position, axis in enumerate(spec.shape):
            grows = isinstance(axis, Free) and (axis.max is None or axis.max >= 2)
            if grows and longer[spec.name].shape[position] == 1:
                longer[spec.name] = longer[spec.name].repeat(2, axis=position)
    if all(longer[name].shape == array.shape for name, array in examples[0].items()):
        return list(examples)
    try:
        with torch.no_grad():
            flat.run([to_torch(array) for array in longer.values()])
    except Exception:  # some lengths are refused; then the example stays as it is
        return list(examples)
    return [longer, *examples]
