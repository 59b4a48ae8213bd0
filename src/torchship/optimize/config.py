"""What a caller asks of a search, checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import msgspec
import torch

from torchship import hardware as machines
from torchship import plugins
from torchship.errors import BadConfig, BadInput, Unavailable
from torchship.lowering import paths
from torchship.optimize.channels import Prune
from torchship.optimize.choose import GOALS, Constraints, Goal
from torchship.optimize.guard import Guard
from torchship.optimize.measure import Effort
from torchship.optimize.trial import TrialLimits
from torchship.recipe import Recipe
from torchship.stage import Stage
from torchship.tensors import Free

Metric: TypeAlias = Callable[[Stage], Any]  # a number, or one for each row
Distill: TypeAlias = Callable[..., torch.Tensor]
Loop: TypeAlias = Callable[[torch.nn.Module, Distill], None]
# the pruned module, the original, and (arguments, keyword arguments, labels or None) for each batch
Train: TypeAlias = Callable[[torch.nn.Module, torch.nn.Module, Sequence[tuple[Any, Any, Any]]], None]
OnStep: TypeAlias = Callable[[str, int, int], None]
_MEMORY_SHARE = 0.8


class Settings(TypedDict, total=False):
    """The rarer arguments of `optimize`.

    `recipes`: race these (eager besides) instead of the backends' proposals. `max_latency_p99` in ms at batch 1,
    `max_memory` and `max_size` in bytes: a winner must keep them. `free` and `batched`: see `capture`.
    `publish=False` leaves the store alone; `labels` are class names kept in the artifact. `threads=0` means all
    cores. `trial_timeout` in seconds for building and for proving; `trial_memory` in bytes (default: 80 % of the
    machine's). `strict`: refuse what is not proved. `finetune(student, distill)` is your training loop, for int8
    that the guard refuses otherwise: see `strategies.finetuning`. `prune`: take channels out of the module, so great a
    share of its multiplications or as a `Prune` says, train it again, and race it beside the original; `train(student,
    teacher, rows)` is your training for it: see `strategies.pruned`. `effort`: how long to measure. `cache`: its
    folder. `on_step(words, done, total)` is told how training goes on. `command` and `source` are told in the report.
    """

    recipes: Sequence[Recipe] | None
    max_latency_p99: float | None
    max_memory: int | None
    max_size: int | None
    free: Mapping[str, Mapping[int, Free | str]]
    batched: bool | None
    publish: bool
    labels: Sequence[str]
    threads: int
    device: str
    trial_timeout: float
    trial_memory: int | None
    effort: Effort
    cache: str | Path | None
    command: str
    source: str
    finetune: Loop | None
    prune: float | Prune | None
    train: Train | None
    on_step: OnStep | None
    strict: bool


class SearchConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the caller asked for, checked and complete; see `Settings`."""

    goal: Goal
    constraints: Constraints
    guard: Guard
    limits: TrialLimits
    backends: Sequence[str] | None
    budget: float
    threads: int
    source: str
    effort: Effort
    recipes: Sequence[Recipe] | None
    device: str
    labels: Sequence[str]
    command: str
    finetune: Loop | None
    prune: Prune | None = None
    train: Train | None = None
    on_step: OnStep | None = None

    @property
    def serves(self) -> bool:
        """Whether a whole server of each valid candidate is measured: where memory is the goal or limited."""
        return self.goal == "memory" or self.constraints.max_memory is not None


def read(
    module: torch.nn.Module,
    *,
    goal: Goal,
    backends: Sequence[str] | None,
    budget: float,
    max_drop: float | None,
    guard: Guard | None,
    settings: Settings,
) -> SearchConfig:
    """Raises BadConfig for an unknown goal, backend, setting or number, Unavailable for a card that is not there."""
    _refuse_below_zero(budget, what="budget", hint="give a number of seconds")
    _refuse_below_zero(max_drop or 0.0, what="max_drop", hint="give a number that is not below 0, as 0.01")
    if goal not in GOALS:
        raise BadConfig(f"unknown goal {goal!r}", hint=f"use one of {', '.join(GOALS)}")
    _refuse_strange(settings)
    for name in backends or ():
        plugins.load("backends", name=name)
    for recipe in settings.get("recipes") or ():
        check(recipe, module)
    machine, limits = machines.here(), guard or Guard()
    device = settings.get("device", "cpu")
    if device.partition(":")[0] == "cuda" and not machine.gpus and not torch.cuda.is_available():
        raise Unavailable(f"there is no device {device!r} here", hint="torchship doctor says what this machine has")
    return SearchConfig(
        goal=goal,
        constraints=Constraints(settings.get("max_latency_p99"), settings.get("max_memory"), settings.get("max_size")),
        guard=msgspec.structs.replace(
            limits,
            max_drop=limits.max_drop if max_drop is None else max_drop,
            strict=settings.get("strict", limits.strict),
        ),
        limits=TrialLimits(
            settings.get("trial_timeout", 300.0), settings.get("trial_memory") or int(machine.memory * _MEMORY_SHARE)
        ),
        backends=backends,
        budget=budget,
        threads=settings.get("threads") or machine.cores,
        source=settings.get("source") or f"{type(module).__module__}.{type(module).__qualname__}",
        effort=settings.get("effort") or Effort(),
        recipes=settings.get("recipes"),
        device=device,
        labels=settings.get("labels", ()),
        command=settings.get("command", ""),
        finetune=settings.get("finetune"),
        **_training(settings),
    )


def _refuse_below_zero(value: Any, *, what: str, hint: str) -> None:
    if not isinstance(value, int | float) or not value >= 0:  # NaN too
        raise BadConfig(f"{what} is {value!r}", hint=hint)


def _refuse_strange(settings: Settings) -> None:
    unknown = sorted(set(settings).difference(Settings.__annotations__))
    if unknown:
        raise BadConfig(
            f"optimize: unknown setting {unknown[0]!r}", hint=f"there is {', '.join(Settings.__annotations__)}"
        )


def _training(settings: Settings) -> dict[str, Any]:
    wish = settings.get("prune")
    if settings.get("train") is not None and wish is None:
        raise BadConfig("a training function is given, and nothing to train", hint="ask for pruning: --prune 0.5")
    wish = Prune(wish, importance="taylor") if isinstance(wish, float) else wish
    return {"prune": wish, "train": settings.get("train"), "on_step": settings.get("on_step")}


def batches(given: Iterable[Any] | None) -> list[Any]:
    """The caller's `calibration`, none where it is left out. Raises BadInput where it holds nothing."""
    if given is not None and not isinstance(given, Iterable):
        raise BadInput(f"calibration is a {type(given).__name__}", hint="give batches of real inputs")
    found = [] if given is None else list(given)
    if given is not None and not found:
        raise BadInput("calibration holds no batch", hint="give batches of real inputs, or leave it out")
    return found


def check(recipe: Recipe, module: torch.nn.Module) -> None:
    """Raise BadConfig for a plugin or an option of `recipe` that does not exist, or a pattern that fits no module."""
    steps = [("backends", recipe.backend, recipe.options)]
    steps += [("transforms", step.transform, step.options) for step in recipe.transforms]
    plugged = [(plugins.load(kind, name=name), name, options) for kind, name, options in steps]
    for plugin, name, options in plugged:
        known = getattr(plugin, "OPTIONS", tuple(options))
        strange = sorted(set(options).difference(known))
        if strange:
            words = f"use {', '.join(known)}" if known else "it takes none"
            raise BadConfig(f"{name} has no option {strange[0]!r}", hint=words)
        if not any(getattr(other, "ADDS_MODULES", False) for other, _, _ in plugged):
            paths.refuse_strangers(paths.addressed(options), module=module)
