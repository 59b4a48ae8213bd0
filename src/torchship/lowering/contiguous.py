"""What a compiled linear layer reads lies in one piece: across a transposed free axis it copies its weights per row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.nn import Module

_Module = TypeVar("_Module", bound="Module")


def straighten(module: _Module) -> _Module:
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
