"""Gives every call of a module its own copy (the weights stay shared), and takes additions out of place.

Quantizers that look at modules refuse one that is called twice, as the ReLU of torchvision's residual blocks is.
"""

from __future__ import annotations

import operator
from typing import Any

from torchship.errors import BuildFailed
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.recipe import Options

OPTIONS: tuple[str, ...] = ()


def apply(model: Model, *, options: Options) -> Model:
    """Trace with torch.fx and rewrite the calls. Takes no options. Raises BuildFailed when fx cannot trace."""
    import copy

    import torch

    from torchship.lowering import surgery
    from torchship.lowering.program import one_line

    own = getattr(model.module, "inner", None)
    inner = copy.deepcopy(own if isinstance(own, torch.nn.Module) else model.module)
    try:
        graph = _traced(inner)
    except Exception as fault:
        raise BuildFailed(f"unshare: torch.fx cannot trace this model: {one_line(fault)}") from fault
    _split_calls(graph)
    plain = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}
    for node in graph.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # it still tells the shared module's path
        if node.op == "call_function" and node.target in plain:
            node.target = plain[node.target]
    graph.recompile()
    return surgery.with_inner(model, graph.eval())


def _traced(inner: Any) -> Any:
    from torch import fx

    from torchship.lowering.variants import KeepFloat

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
            # what keeps its own precision casts tensors, which are not there while tracing
            return isinstance(m, KeepFloat) or super().is_leaf_module(m, module_qualified_name)

    return fx.GraphModule(inner, Tracer().trace(inner))


def _split_calls(graph: Any) -> None:
    import copy

    called: dict[int, int] = {}
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        module = graph.get_submodule(node.target)
        number = called[id(module)] = called.get(id(module), 0) + 1
        if getattr(module, "inplace", False):
            module.inplace = False
        if number > 1:
            name = f"{node.target}_call{number}"
            # the copy keeps the very same weights
            memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
            graph.add_submodule(name, copy.deepcopy(module, memo))
            node.target = name


def propose(model: Model, *, hardware: Hardware) -> list[Options]:
    """Nothing by itself: it helps other steps."""
    return []
