"""Gives every call of a module its own copy (the weights stay shared), and takes additions out of place.

Quantizers that look at modules refuse one that is called twice, as the ReLU of torchvision's residual blocks is.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

from torchship.errors import BuildFailed
from torchship.model import Model
from torchship.recipe import Options

OPTIONS: tuple[str, ...] = ()
ADDS_MODULES = True  # whose paths a recipe may name
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
}


def apply(model: Model, *, options: Options) -> Model:
    """Trace with torch.fx and rewrite the calls. Takes no options. Raises BuildFailed when fx cannot trace."""
    import copy

    import torch
    from torch import fx

    from torchship.lowering import surgery
    from torchship.lowering.program import as_error
    from torchship.lowering.variants import KeepFloat

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: Any, module_qualified_name: str) -> bool:
            # what keeps its own precision casts tensors, which are not there while tracing
            return isinstance(m, KeepFloat) or super().is_leaf_module(m, module_qualified_name)

    own = getattr(model.module, "inner", None)
    inner = copy.deepcopy(own if isinstance(own, torch.nn.Module) else model.module)
    with as_error(BuildFailed, "unshare: torch.fx cannot trace this model"):
        graph: Any = fx.GraphModule(inner, Tracer().trace(inner))
    called: Counter[int] = Counter()
    for node in graph.graph.nodes:
        node.meta.pop("nn_module_stack", None)  # it still tells the shared module's path
        if node.op == "call_function":
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
        elif node.op == "call_module":
            module = graph.get_submodule(node.target)
            called[id(module)] += 1
            if getattr(module, "inplace", False):
                module.inplace = False
            if called[id(module)] > 1:
                # the copy keeps the very same weights
                memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
                node.target = f"{node.target}_call{called[id(module)]}"
                graph.add_submodule(node.target, copy.deepcopy(module, memo))
    graph.recompile()
    return surgery.with_inner(model, graph.eval())
