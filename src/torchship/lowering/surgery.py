"""Finds out how a Model's layers are wired, and makes changed copies of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from torchship.lowering import program
from torchship.model import Model


class Wiring:
    """The exported graph of a Model, with the path of the module behind every parameter."""

    def __init__(self, model: Model) -> None:
        """Raises BuildFailed when the model cannot be exported."""
        exported = program.export(model)
        signature = exported.graph_signature
        self.nodes: list[Node] = list(exported.graph.nodes)
        self._tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def kind(self, node: Any) -> str:
        """`conv2d` for a call of aten.conv2d.default, `relu` for aten.relu_; empty for anything else."""
        if not isinstance(node, Node) or node.op != "call_function" or not str(node.target).startswith("aten."):
            return ""
        return str(node.target).split(".")[1].strip("_")

    def tensor(self, node: Node, position: int) -> str:
        """The path of the parameter or buffer at an argument; empty where it is something else."""
        argument = node.args[position] if len(node.args) > position else None
        return self._tensors.get(argument.name, "") if isinstance(argument, Node) else ""

    def owner(self, node: Node, *, tensors: tuple[int, ...] = (1,)) -> str:
        """The path of the module whose weight this node alone uses; empty where there is none."""
        for position in tensors:
            path = self.tensor(node, position)
            if path and len(node.args[position].users) == 1:  # type: ignore[union-attr]
                return path.rpartition(".")[0]
        return ""

    def only_user(self, node: Node) -> Node | None:
        """The one node that uses this one's answer, if there is just one."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    def place(self, node: Node) -> str:
        """The path of the module that this node was called in."""
        stack = node.meta.get("nn_module_stack") or {}
        return [str(path) for path, _ in stack.values()][-1] if stack else ""


def copied(model: Model) -> Model:
    """The model with a copy of its module, free to be changed."""
    return replace(model, module=copy.deepcopy(model.module))


def with_inner(model: Model, inner: torch.nn.Module) -> Model:
    """The model with `inner` in the place of the user's own module."""
    own = getattr(model.module, "inner", None)
    if not isinstance(own, torch.nn.Module):
        return replace(model, module=inner)
    return replace(model, module=copy.deepcopy(model.module, {id(own): inner}))


def put(root: torch.nn.Module, path: str, module: torch.nn.Module) -> None:
    """Set the submodule at `path`."""
    parent, _, name = path.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, torch.nn.Sequential | torch.nn.ModuleList):
        owner[int(name)] = module
    else:
        setattr(owner, name, module)


def fold_batch_norms(model: Model, wiring: Wiring) -> None:
    """Fold every batch norm into the convolution or linear layer that feeds it alone; the model's module is changed."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    for norm in wiring.nodes:
        before = norm.args[0] if wiring.kind(norm) == "batch_norm" else None
        if not isinstance(before, torch.fx.Node) or wiring.only_user(before) is not norm:
            continue
        layer_path, norm_path = wiring.owner(before), wiring.owner(norm, tensors=(3, 1))
        if not layer_path or not norm_path:
            continue
        layer: Any = model.module.get_submodule(layer_path)
        batch_norm: Any = model.module.get_submodule(norm_path)
        if type(layer) is torch.nn.Linear:
            fused: Any = fuse_linear_bn_eval(layer, batch_norm)
        elif type(layer) in (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d):
            fused = fuse_conv_bn_eval(layer, batch_norm)
        else:
            continue
        put(model.module, layer_path, fused)
        put(model.module, norm_path, torch.nn.Identity())
