"""A Model as an ONNX file, with the path of the module that each node came from."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path
from typing import Any

from torchship.errors import BuildFailed
from torchship.lowering import script
from torchship.lowering.program import one_line, quiet, within_bounds
from torchship.model import Model
from torchship.plugins import missing
from torchship.tensors import Free

OPSET = 18
_SCOPES = "pkg.torch.onnx.name_scopes"
_KEPT = (_SCOPES, "namespace")
_SOURCE = "pkg.torch.onnx.fx_node"
_LOWEST = {1: -1e30, 10: -6e4, 11: -1e30, 16: -1e30}  # for FLOAT, FLOAT16, DOUBLE, BFLOAT16: what leaves a place out
_PROTOBUF_LIMIT = 1_900_000_000


def write(model: Model, path: Path) -> None:
    """Export to `path` with the signature's names and free axes (opset 18).

    The exporter that builds on `torch.export` goes first, the one on TorchScript second: it traces, or takes a
    scripted module where the path depends on data. An export that lies on the model's shelf is copied.
    Raises BuildFailed with both reasons.
    """
    kept = model.kept("model.onnx")
    if kept is not None and kept.is_file():
        shutil.copyfile(kept, path)
        return
    absent = missing("torch onnx onnxscript")
    if absent:
        raise BuildFailed(f"no ONNX export: {absent}")
    try:
        _write_exported(model, path)
    except Exception as first:
        try:
            _write_traced(model, path)
        except Exception as second:
            raise BuildFailed(
                f"no ONNX export: {one_line(first)}; traced: {one_line(second, limit=200)}",
                hint="torchship doctor says where and why",
            ) from first
    _forget_sources(path)
    if kept is not None and _size(model) < _PROTOBUF_LIMIT:  # beyond it the weights lie in files of their own
        draft = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(path, draft)
        draft.rename(kept)


def _names(model: Model) -> list[str]:
    """Of the graph's inputs, then outputs: those of the signature, but an output that is named like an input is called
    otherwise, for values of a graph have one name each."""
    inputs = [spec.name for spec in model.signature.inputs]
    outputs = [spec.name for spec in model.signature.outputs]
    return [*inputs, *(f"{name}_torchship_out" if name in inputs else name for name in outputs)]


def _write_exported(model: Model, path: Path) -> None:
    """By `torch.export`, under names that no operator's output has; then inputs and outputs get the signature's names.

    The exporter does not see that a value in the middle may have such a name already (`embedding`, `add`): that one
    gets another.
    """
    import onnx
    import torch

    names = {f"torchship_{number}": name for number, name in enumerate(_names(model))}
    plain, inputs = list(names), len(model.signature.inputs)

    def exporting(shapes: Any) -> None:
        torch.onnx.export(
            model.module.eval(),
            model.torch_inputs(model.examples[0]),
            str(path),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=plain[:inputs],
            output_names=plain[inputs:],
            external_data=_size(model) > _PROTOBUF_LIMIT,
            opset_version=OPSET,
            verbose=False,
        )

    with quiet(), torch.no_grad():
        within_bounds(model, exporting)
    made = onnx.load(str(path), load_external_data=False)
    taken = {name for node in made.graph.node for name in node.output} | {v.name for v in made.graph.initializer}
    clashes = taken.intersection(names.values()).difference(names)
    _rename(made.graph, {**names, **{name: f"{name}_torchship_inner" for name in clashes}})
    _refuse_fixed(made.graph, model)
    _answer_empty_rows(made.graph)
    onnx.save(made, str(path))


def _refuse_fixed(graph: Any, model: Model) -> None:
    """Raise BuildFailed where the exporter took the length of a free axis for a constant, as it does for loops.

    A recurrent layer is such a loop; the exporter that traces writes it as one node.
    """
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    for spec in model.signature.inputs:
        for position, (length, axis) in enumerate(zip(shapes.get(spec.name, ()), spec.shape, strict=False)):
            if isinstance(axis, Free) and length.HasField("dim_value"):
                raise BuildFailed(f"the export has axis {position} of {spec.name!r} fixed at {length.dim_value}")


def _answer_empty_rows(graph: Any) -> None:
    """Let attention answer 0 where a mask of numbers leaves out every place of a row, as torch's does: the softmax of
    ONNX gives NaN. The exporter itself does so for masks of truths."""
    from onnx import helper

    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    constant = {value.name for value in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    before: dict[str, list[Any]] = {}
    after: dict[str, list[Any]] = {}
    for number, softmax in enumerate(node for node in graph.node if node.op_type == "Softmax"):
        source = "".join(entry.value for entry in softmax.metadata_props if entry.key == _SOURCE)
        total = made_by.get(softmax.input[0])
        product = [node for node in graph.node if softmax.output[0] in node.input]
        if total is None or total.op_type != "Add" or [node.op_type for node in product] != ["MatMul"]:
            continue
        mask: str = total.input[1]
        kind = kinds.get(mask, 0)
        if "scaled_dot_product_attention" not in source or kind not in _LOWEST or mask in constant:
            continue
        lowest, none, last, bounded, most, some, answer = (f"torchship_rows_{number}_{part}" for part in "lnabmsr")
        for name, value in ((lowest, _LOWEST[kind]), (none, 0.0)):
            graph.initializer.append(helper.make_tensor(name, kind, (), [value]))
        graph.initializer.append(helper.make_tensor(last, 7, (1,), [-1]))  # INT64
        before[total.output[0]] = [helper.make_node("Max", [mask, lowest], [bounded])]
        total.input[1] = bounded
        (reader,) = product
        final, reader.output[0] = reader.output[0], answer
        after[answer] = [
            helper.make_node("ReduceMax", [mask, last], [most], keepdims=1),
            helper.make_node("Greater", [most, lowest], [some]),
            helper.make_node("Where", [some, answer, none], [final]),
        ]
    nodes = [
        one for node in graph.node for one in (*before.get(node.output[0], ()), node, *after.get(node.output[0], ()))
    ]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Rename values throughout a graph and the graphs inside its nodes."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _rename(inner, names)
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)


def _write_traced(model: Model, path: Path) -> None:
    import torch

    names, inputs = _names(model), len(model.signature.inputs)
    specs = (*model.signature.inputs, *model.signature.outputs)
    with quiet(), torch.no_grad():
        module: Any = model.module
        if not script.exports(model):
            module = script.scripted(model, traced=script.traceable(model))
        torch.onnx.export(
            module.eval(),
            model.torch_inputs(model.examples[0]),
            str(path),
            dynamo=False,
            dynamic_axes={
                name: [i for i, axis in enumerate(spec.shape) if isinstance(axis, Free)]
                for name, spec in zip(names, specs, strict=True)
            },
            input_names=names[:inputs],
            output_names=names[inputs:],
            opset_version=OPSET,
        )


def _size(model: Model) -> int:
    tensors = (*model.module.parameters(), *model.module.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _forget_sources(path: Path) -> None:
    """Drop stack traces with the builder's own file names; keep the module paths."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False)
    for node in graph.graph.node:
        kept = [(entry.key, entry.value) for entry in node.metadata_props if entry.key in _KEPT]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)
    onnx.save(graph, str(path))


def module_paths(graph: Any) -> dict[str, str]:
    """Node name to the path of the module it came from (`inner.layer1.0.conv1`), for nodes where it is known."""
    found = {}
    for node in graph.graph.node:
        for entry in node.metadata_props:
            if entry.key == _SCOPES:
                scopes = ast.literal_eval(entry.value)
                found[node.name] = scopes[-2] if len(scopes) > 1 else ""
    return found
