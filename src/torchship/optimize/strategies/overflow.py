"""Overflow: fp16 that the guard refused, with the layers whose values leave its range kept in fp32.

fp16 ends at 65,504. A value beyond it is lost where it is made, and where it is read; so what stays in fp32 is the
smallest module that holds both. Where that is the whole model, as with a residual stream that is too large everywhere,
nothing is asked for: bf16 has the range of fp32.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from torchship import plugins, process
from torchship.lowering import paths, program, surgery
from torchship.model import Model
from torchship.optimize import workspace
from torchship.optimize.attempt import SearchContext
from torchship.optimize.choose import Goal, cost, is_valid
from torchship.optimize.strategies import Asked
from torchship.optimize.trial import Trial
from torchship.recipe import Option, Recipe

LARGEST = 65504.0  # of fp16
_SHARES = (1.0, 0.25, 0.05)  # of it: sums inside an operator overflow before its answer does
_MOST_BATCHES = 8
_SECONDS = 120.0


def overflowed(trial: Trial) -> bool:
    """Whether a trial in fp16 was refused, and its backend can keep layers in fp32. Infinity need not arrive at the
    outputs: its inverse is 0."""
    fp16 = trial.recipe.options.get("precision") == "fp16"
    return (
        trial.status == "refused" and fp16 and "keep" in plugins.fact("backends", trial.recipe.backend, "OPTIONS", ())
    )


def worth_it(trials: Sequence[Trial], *, goal: Goal) -> Trial | None:
    """The best of the overflowed candidates that would win if they were valid and were not mended yet. Pure."""
    best = min((cost(trial, goal=goal) for trial in trials if is_valid(trial)), default=float("inf"))
    mended = {trial.recipe.backend for trial in trials if trial.recipe.options.get("keep")}
    found = [
        trial
        for trial in trials
        if overflowed(trial) and trial.recipe.backend not in mended and cost(trial, goal=goal) < best
    ]
    return min(found, key=lambda trial: cost(trial, goal=goal), default=None)


class Overflow:
    """Asks for a refused candidate with the layers in fp32 whose values leave the range, then, while it is refused,
    with those too that come near its end. Once for each backend, as soon as it is refused.
    """

    at_once = True

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        self._steps: Generator[Asked, Trial, None] | None = None
        self._asked: set[str] = set()  # backends

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """The next form, which depends on what became of the last."""
        while True:
            try:
                if self._steps is not None:
                    return [self._steps.send(results[-1])]
                candidate = worth_it(results, goal=self._context.config.goal)
                if candidate is None or candidate.recipe.backend in self._asked:
                    return []
                self._asked.add(candidate.recipe.backend)
                self._steps = self._forms(candidate.recipe)
                return [next(self._steps)]
            except StopIteration:
                self._steps = None

    def _forms(self, recipe: Recipe) -> Generator[Asked, Trial, None]:
        before: list[str] = []
        for share in _SHARES:
            layers = out_of_range(self._context, limit=share * LARGEST)
            if not layers or layers == before:
                continue
            kept: Option = list(layers)
            changed = Recipe(recipe.backend, {**recipe.options, "keep": kept}, recipe.transforms)
            trial = yield Asked(changed, note=f"kept in fp32, as fp16 cannot hold their values: {', '.join(layers)}")
            if not overflowed(trial):
                return
            before = layers


def out_of_range(context: SearchContext, *, limit: float) -> list[str]:
    """The modules that hold values beyond `limit`, found in a child; none where that fails, or where it is all."""
    seconds = min(_SECONDS, context.deadline - time.monotonic())
    outcome = process.run(
        "torchship.optimize.strategies.overflow:find_here",
        argument={"model": str(context.model_file), "limit": limit},
        timeout=seconds,
        memory=context.config.limits.memory,
        threads=context.config.threads,
    )
    return [] if outcome.fault else msgspec.convert(outcome.value, list[str])


def find_here(argument: Any) -> list[str]:
    """The child's side of `out_of_range`."""
    return beyond(workspace.take(Path(argument["model"])), limit=argument["limit"])


def beyond(model: Model, *, limit: float) -> list[str]:
    """Paths of the smallest modules of the user's module that hold each value beyond `limit`, where it is made and
    where it is read, on the model's examples. Empty where there is none, or where only the whole model does.
    """
    graph: Any = program.export(model).module(check_guards=False)
    watch = _RangeWatch(graph, limit)
    batches = [*model.examples, *model.edges, *model.calibration][:_MOST_BATCHES]
    with torch.inference_mode():
        for batch in batches:
            watch.run(*model.torch_inputs(batch))
    found = {_common([_place(one) for one in (node, *node.users) if one.op != "get_attr"]) for node in watch.large}
    if "" in found:
        return []
    return sorted(path for path in found if not any(path.startswith(f"{other}.") for other in found))


class _RangeWatch(Interpreter):
    """Computes in fp32, and notes the nodes whose values are finite and beyond the limit."""

    def __init__(self, graph: torch.fx.GraphModule, limit: float) -> None:
        super().__init__(graph)
        self._limit = limit
        self.large: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        answer = super().run_node(n)
        leaves = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        if n.op != "output" and any(_largest(leaf) > self._limit for leaf in leaves):
            self.large.add(n)
        return answer


def _largest(tensor: torch.Tensor) -> float:
    """The largest size of a finite number in it; 0 for integers."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0).abs().max())


def _place(node: Node) -> str:
    return paths.user_path(surgery.place_of(node))


def _common(places: Sequence[str]) -> str:
    """The path of the innermost module that all of these lie in."""
    inside = [place.replace(".", os.sep) for place in places]
    return os.path.commonpath(inside).replace(os.sep, ".") if inside else ""
