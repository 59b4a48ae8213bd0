"""The subject: the module that TARGET names with its inputs, brought up in the child process that examines it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchship.difference import relative_error
from torchship.model import Model, to_numpy
from torchship.optimize.capture import capture
from torchship.optimize.samples import random_inputs, vocabulary_of
from torchship.optimize.targets import module_at
from torchship.tensors import TensorSpec


@dataclass(frozen=True)
class Subject:
    """The user's module as it came, and the Model that capture made of it."""

    module: torch.nn.Module
    model: Model

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The example as the model takes it."""
        return self.model.torch_inputs(self.model.examples[0])

    def unseen(self) -> tuple[torch.Tensor, ...]:
        """Other values, other lengths of the free axes, and one row more where the rows are free."""
        rows = 3 if self.model.signature.batched else 2
        vocabulary = vocabulary_of(self.module)
        return tuple(random_inputs(self.model.signature.inputs, rows=rows, free=24, vocabulary=vocabulary, seed=7))

    def mirrored(self) -> tuple[torch.Tensor, ...]:
        """The example with its floats turned round and doubled: a frozen branch or number shows here."""
        return tuple(-2 * tensor if tensor.is_floating_point() else tensor for tensor in self.tensors())


def admit(target: str, inputs: Sequence[str]) -> Subject:
    """Bring up what the command line names. Raises BadConfig, NotFound and CaptureFailed."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, "")
    torch.manual_seed(0)
    module = module_at(target)
    return Subject(module, capture(module, [TensorSpec.parse(text) for text in inputs]))


def call(module: Any, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run without gradients, on copies: a module may write into its inputs."""
    with torch.inference_mode():
        found = module(*(tensor.clone() for tensor in tensors))
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def worst_error(expected: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> float:
    """The largest relative L2 error over outputs; infinite where number, shape or NaNs differ."""
    if len(expected) != len(given):
        return float("inf")
    return max((relative_error(to_numpy(a), to_numpy(b)) for a, b in zip(expected, given, strict=True)), default=0.0)
