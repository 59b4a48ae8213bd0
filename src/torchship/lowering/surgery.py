"""Finds out how a Model's layers are wired, and makes changed copies of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from torchship.lowering import program
from torchship.model import Model

_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


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

    @staticmethod
    def only_user(node: Node) -> Node | None:
        """The one node that uses this one's answer, if there is just one."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    def place(self, node: Node) -> str:
        """The path of the module that this node was called in."""
        return place_of(node)


def place_of(node: Node) -> str:
    """The path of the module that a node of an exported graph was called in; empty where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path) for path, _ in stack.values()][-1].removeprefix("L['self'].") if stack else ""


class Clipped(torch.nn.Module):
    """A ReLU6 with a ceiling of its own for each channel of the layer before it, which may then be rescaled."""

    ceiling: torch.Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight: torch.Tensor = layer.weight
        self.register_buffer("ceiling", weight.new_full((weight.shape[0], *[1] * (weight.ndim - 2)), 6.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Between nothing and the ceiling."""
        return torch.minimum(torch.relu(x), self.ceiling)


def copied(model: Model) -> Model:
    """The model with a copy of its module, free to be changed."""
    return replace(model, module=copy.deepcopy(model.module))


def with_inner(model: Model, inner: torch.nn.Module) -> Model:
    """The model with `inner` in the place of the user's own module."""
    own = getattr(model.module, "inner", None)
    if not isinstance(own, torch.nn.Module):
        return replace(model, module=inner)
    return replace(model, module=copy.deepcopy(model.module, {id(own): inner}))


def fold_batch_norms(model: Model, wiring: Wiring) -> None:
    """Fold every batch norm into the convolution or linear layer that feeds it alone; the model's module is changed."""
    for norm in wiring.nodes:
        before = norm.args[0] if wiring.kind(norm) == "batch_norm" else None
        if not isinstance(before, torch.fx.Node) or wiring.only_user(before) is not norm:
            continue
        layer_path, norm_path = wiring.owner(before), wiring.owner(norm, tensors=(3,))
        if not layer_path or not norm_path:
            continue
        layer: Any = model.module.get_submodule(layer_path)
        batch_norm: Any = model.module.get_submodule(norm_path)
        # a norm of the user's own may do more, and one that normalizes by the batch has nothing to fold
        if type(batch_norm) not in _NORMS or norm.args[5] or before.meta["val"].ndim != layer.weight.ndim:
            continue
        fused = _folded(layer, batch_norm)
        if fused is not None:
            model.module.set_submodule(layer_path, fused)
            model.module.set_submodule(norm_path, torch.nn.Identity())


def _folded(layer: Any, batch_norm: Any) -> Any:
    """The layer with the norm inside; None for a kind that does not take it in."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    if type(layer) is torch.nn.Linear:
        return fuse_linear_bn_eval(layer, batch_norm)
    if type(layer) in _CONVOLUTIONS:
        return fuse_conv_bn_eval(layer, batch_norm)
    if type(layer) in _TRANSPOSED and layer.groups == 1:
        return fuse_conv_bn_eval(layer, batch_norm, transpose=True)
    return None
