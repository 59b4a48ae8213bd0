"""Fine-tuning: int8 that the guard refused, with weights from the user's own training loop.

The loop runs quantization-aware, with distillation from the float model: weights and inputs of convolutions and linear
layers go through simulated int8 on the way forward, gradients pass straight through (Jacob et al., arXiv:1712.05877);
the student learns the float model's answers beside the user's own loss (Hinton et al., arXiv:1503.02531).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn.utils import parametrize

from torchship import process
from torchship.artifact import folder as folders
from torchship.artifact import tensorfile
from torchship.errors import OptimizeError
from torchship.lowering.program import as_error
from torchship.model import Model, to_numpy, to_torch
from torchship.optimize import cache as caching
from torchship.optimize import workspace
from torchship.optimize.attempt import SearchContext
from torchship.optimize.config import Loop
from torchship.optimize.sensitivity import round_signed, round_unsigned
from torchship.optimize.strategies import Asked
from torchship.optimize.strategies.mixed_precision import worth_it
from torchship.optimize.training import distillation
from torchship.optimize.trial import Trial
from torchship.recipe import FINETUNE, Step

_QUANTIZED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class FineTuning:
    """Asks, once, for the refused int8 candidates with tuned weights, where there is a loop to tune them."""

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        self._waiting: list[Asked] | None = None

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """The best candidate first. Trains in a child before the first is asked for."""
        self._waiting = self._tuned(results) if self._waiting is None else self._waiting[1:]
        return self._waiting

    def _tuned(self, results: Sequence[Trial]) -> list[Asked]:
        context, config = self._context, self._context.config
        candidates = worth_it(results, goal=config.goal)
        if not candidates or config.finetune is None:
            return []
        key = caching.digest(context.model_hash, caching.hash_function(config.finetune))
        workspace.put(context.work / "loop.pkl", config.finetune, what="the fine-tuning loop")
        weights = context.cache.root / "tuned" / f"{key}.safetensors"
        outcome = process.run(
            "torchship.optimize.strategies.finetuning:tune_here",
            argument={"work": str(context.work), "weights": str(weights)},
            timeout=max(30.0, context.deadline - time.monotonic()),
            memory=config.limits.memory,
            threads=config.threads,
        )
        failure = f"fine-tuning: {outcome.fault}" if outcome.fault else ""
        recipes = [
            msgspec.structs.replace(trial.recipe, transforms=(Step(FINETUNE), *trial.recipe.transforms))
            for trial in candidates
        ]
        context.trained[FINETUNE] = key
        return [Asked(recipe, failure=failure) for recipe in recipes]


def tune_here(argument: Any) -> None:
    """The training child: keeps the weights as safetensors in `weights` (used again when there), and writes the tuned
    model into the workspace `work`.
    """
    work, weights = Path(argument["work"]), Path(argument["weights"])
    model: Model = workspace.take(work / "model.pkl")
    if not weights.is_file():
        tuned = tune(model, workspace.take(work / "loop.pkl"))
        folders.write(weights, tensorfile.encode({k: to_numpy(t) for k, t in tuned.module.state_dict().items()}))
    model.module.load_state_dict({name: to_torch(array) for name, array in tensorfile.load(weights).items()})
    workspace.put(work / f"{FINETUNE}.pkl", model, what="the tuned module")


def tune(model: Model, loop: Loop) -> Model:
    """The model with weights that `loop(student, distill)` trained under simulated int8.

    `student` is the user's own module in train mode, its batch norms frozen; `distill(outputs, *args, **kwargs)` is
    the loss of the student's `outputs` against the float model's on the same arguments. Raises OptimizeError when
    the loop fails or leaves weights that are not finite.
    """
    flat: Any = copy.deepcopy(model.module)
    student, teacher = flat.inner, model.module.inner
    student.requires_grad_(True).train()
    for part in student.modules():
        if isinstance(part, _NORMS):
            part.eval()
    failed = as_error(OptimizeError, "the fine-tuning loop failed", hint="it is called as loop(student, distill)")
    with _simulated_int8(student), failed:
        loop(student, distillation(teacher))
    bad = [name for name, tensor in student.named_parameters() if not torch.isfinite(tensor).all()]
    if bad:
        raise OptimizeError(f"fine-tuning left NaN or infinity in {bad[0]}", hint="lower the learning rate")
    fresh = copy.deepcopy(model.module)  # taking the rounding off again leaves traces in the student
    fresh.load_state_dict(flat.state_dict())
    return replace(model, module=fresh)


class _Rounded(nn.Module):
    """A weight as int8 per output channel would hold it; gradients pass straight through."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The rounded weight."""
        return weight + (round_signed(weight.detach(), axis=0) - weight.detach())


@contextmanager
def _simulated_int8(student: nn.Module) -> Iterator[None]:
    layers = [part for part in student.modules() if isinstance(part, _QUANTIZED)]
    hooks = [layer.register_forward_pre_hook(_round_inputs) for layer in layers]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Rounded())
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _round_inputs(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    floats = [isinstance(value, torch.Tensor) and value.is_floating_point() for value in inputs]
    return tuple(
        value + (round_unsigned(value.detach()) - value.detach()) if its else value
        for value, its in zip(inputs, floats, strict=True)
    )
