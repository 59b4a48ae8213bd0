"""Pruning: the user's module with fewer channels, trained again, races beside the original.

After each round of pruning and training the recipe that won so far is built of what is left, judged and measured like
every other; what is measured says whether and how far the next round goes. Each round is kept as a state dict
(safetensors) and a channel map (JSON), so that a search that was killed goes on after the last one.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from torchship import process
from torchship.artifact import folder as folders
from torchship.artifact import tensorfile
from torchship.errors import BadConfig, OptimizeError, Unavailable, Unsupported
from torchship.lowering.program import as_error
from torchship.model import Model, to_numpy, to_torch
from torchship.optimize import cache as caching
from torchship.optimize import pruning, training, workspace
from torchship.optimize.attempt import SearchContext
from torchship.optimize.channels import ChannelMap, Prune, PrunedRound
from torchship.optimize.choose import cost, is_valid
from torchship.optimize.config import Train
from torchship.optimize.measure import resized
from torchship.optimize.strategies import Asked
from torchship.optimize.trial import Trial
from torchship.plugins import missing
from torchship.recipe import PRUNE, Recipe, Step
from torchship.tensors import Tensors

_FEWEST = 32  # rows that training is worth a try with
_EQUAL = 1.02  # costs of rounds that count as one: then the one with more channels is taken
_NEAR, _MOST = 3.0, 6  # which of the other recipes are built of the pruned module too, and how many
_STEP, _STRIDE = 0.9, 0.6  # what one round leaves at most, and at least, of the multiplications, steered by latency
# what labels weigh in the loss of training: half where the user's metric judges, for that is of the truth; a tenth
# where the guard compares with the original's answers
_BY_METRIC, _BY_ORIGINAL = 0.5, 0.1
_INNER = "inner."  # before the names of the user's own module


class Pruning:
    """Asks for the best recipe so far of the module after each round, then for the other good ones of the best round.

    `rounds` are those that are done; `note` says why there are no more of them.
    """

    def __init__(self, context: SearchContext) -> None:
        self._context = context
        self._steps: Generator[Asked, Trial, None] | None = None
        self._last: Asked | None = None
        self.rounds: list[PrunedRound] = []
        self.note = ""

    def ask(self, results: Sequence[Trial]) -> list[Asked]:
        """The next recipe. Trains in a child before the first of each round is asked for."""
        if self._context.config.prune is None:
            return []
        try:
            if self._steps is None:
                self._steps = self._asking(results, self._context.config.prune)
                self._last = next(self._steps)
            elif self._last is not None:
                recipe = self._last.recipe
                tried = [trial for trial in results if trial.recipe == recipe]
                self._last = self._steps.send(tried[-1]) if tried else self._last
        except StopIteration:
            self._last = None
        return [self._last] if self._last else []

    def _asking(self, results: Sequence[Trial], wish: Prune) -> Generator[Asked, Trial, None]:
        goal = self._context.config.goal
        valid = sorted(filter(is_valid, results), key=lambda trial: cost(trial, goal=goal))
        valid = [trial for trial in valid if not trial.recipe.weights]
        if not valid:
            self.note = "pruning: no recipe of the original is valid, so none was tried on a pruned one"
            return
        yield from self._pruned(valid, wish)

    def _pruned(self, valid: Sequence[Trial], wish: Prune) -> Generator[Asked, Trial, None]:
        goal, best = self._context.config.goal, valid[0]
        good, trial = list[tuple[PrunedRound, Trial]](), best
        for number in range(1, wish.rounds + 1):
            found = self._round(number, _end(self.rounds, wish, trial))
            if isinstance(found, str):
                self.note = f"pruning: round {number} of {wish.rounds}: {found}"
                break
            self.rounds.append(found)
            trial = yield Asked(_of(best.recipe, found), note=found.told())
            if not is_valid(trial):
                self.note = f"pruning ended after round {number}: {trial.recipe.label}: {trial.failure}"
                break
            good.append((found, trial))
            if _fast_enough(trial, wish) or found.cut >= wish.flops:
                break
        if not self.rounds:
            return
        costs = [cost(tried, goal=goal) for _, tried in good]
        chosen = next(
            (r for (r, _), price in zip(good, costs, strict=True) if price <= min(costs) * _EQUAL), self.rounds[0]
        )
        near = [other for other in valid[1:] if cost(other, goal=goal) <= _NEAR * cost(best, goal=goal)]
        for other in near[:_MOST]:
            yield Asked(_of(other.recipe, chosen), note=chosen.told())

    def _round(self, number: int, left: float) -> PrunedRound | str:
        """One round that leaves a share of the original's multiplications: done now or before; or why it is not."""
        context, config = self._context, self._context.config
        shown = context.work / "training.json"
        told: list[Any] = []

        def meanwhile() -> None:
            if config.on_step is None:
                return
            with suppress(OSError, ValueError):
                now = json.loads(shown.read_bytes())
                if [number, now] != told:
                    told[:] = [number, now]
                    words = f"pruning, round {number}: loss {now['loss']:.3g} after epoch"
                    config.on_step(words, now["epoch"], now["of"])

        seconds = context.deadline - time.monotonic()
        outcome = process.run(
            "torchship.optimize.strategies.pruned:round_here",
            argument={"work": str(context.work), "number": number, "left": left},
            timeout=max(30.0, seconds),
            memory=config.limits.memory,
            threads=config.threads,
            meanwhile=meanwhile,
        )
        shown.unlink(missing_ok=True)
        if outcome.fault:
            return f"{outcome.fault}; the same command again goes on after round {number - 1}"
        found = msgspec.convert(outcome.value, PrunedRound)
        context.trained[f"{PRUNE}{number}"] = caching.digest(context.model_hash, found.content)
        if config.on_step is not None:
            config.on_step(found.told(), 1, 1)
        return found


def _of(recipe: Recipe, found: PrunedRound) -> Recipe:
    """A recipe of the original, of the module after a round."""
    step = Step(PRUNE, {"cut": found.cut, "round": found.number})
    return msgspec.structs.replace(recipe, transforms=(step, *recipe.transforms))


def _p50(trial: Trial) -> float:
    return trial.timing.curve[0].p50_ms if trial.timing else float("inf")


def _fast_enough(trial: Trial, wish: Prune) -> bool:
    return bool(wish.latency) and _p50(trial) <= wish.latency


def _end(rounds: Sequence[PrunedRound], wish: Prune, last: Trial) -> float:
    """The share of the original's multiplications that the next round is to leave: by equal steps, or as much less as
    the last one, as it was measured, is too slow. Pure."""
    if not wish.latency:
        return pruning.ends(1.0, wish=wish)[len(rounds)]
    now = rounds[-1].flops / rounds[-1].whole if rounds else 1.0
    return max(1 - wish.flops, now * min(_STEP, max(_STRIDE, wish.latency / _p50(last))))


def refuse(model: Model, wish: Prune | None, *, data: bool) -> None:
    """Raises what stands against pruning a model: Unavailable, BadConfig without data, Unsupported where channels
    cannot be taken out, which is tried on a copy."""
    if wish is None:
        return
    if lacking := missing("torch_pruning", pip='"torchship[prune]"'):
        raise Unavailable(f"--prune needs it: {lacking}")
    if not data:
        raise BadConfig(
            "--prune: what is pruned is trained again, and there is no data",
            hint="add --data with real inputs, with their labels where you have them: (inputs, labels)",
        )
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.module.modules()):
        raise Unsupported("--prune: TorchScript has no layers to narrow", hint="give the nn.Module it was made of")
    flat = copy.deepcopy(model.module)
    inputs = _inputs(model)
    whole = pruning.flops_of(flat, inputs)
    share = _STEP if wish.latency else 1 - wish.flops
    plain = msgspec.structs.replace(_named(wish), importance="magnitude")
    found = pruning.prune(flat, inputs, flops=whole * share, wish=plain)
    again = pruning.narrow(copy.deepcopy(model.module), found)
    with torch.no_grad():
        same = all(map(torch.equal, flat(*inputs), again(*inputs)))
    if not same:
        raise Unsupported("--prune: the pruned module cannot be made again from its channel map", hint="see `keep`")


def prepare(
    context: SearchContext, samples: Sequence[Any], *, held_back: Sequence[Tensors], groups: Sequence[int] | None
) -> None:
    """Lay out for the children what rounds need, where pruning is asked for. Raises BadConfig for too few rows."""
    config, model, wish = context.config, context.model, context.config.prune
    if wish is None:
        return
    rows = training.training_rows(samples, model=model, held_back=held_back, groups=groups)
    many = training.count(rows, model)
    if many < _FEWEST:
        raise BadConfig(
            f"--prune: {many} rows of the data are left to train on, beside those that the guard judges on",
            hint=f"give {_FEWEST} or more, in four batches at least: half of the first 1,536 rows are the guard's",
        )
    labels = [known for _, known in rows]
    content = caching.hash_tensors([batch for batch, _ in rows])
    known = caching.hash_tensors([{"labels": array} for array in labels if array is not None])
    train = caching.hash_function(config.train) if config.train is not None else ""
    by_labels = _BY_METRIC if context.metric_hash else _BY_ORIGINAL
    key = caching.digest(context.model_hash, content, known, train, by_labels, wish)
    folder = context.cache.root / "pruned" / key
    task = RoundTask(work=context.work, folder=folder, wish=wish, rows=rows, train=config.train, by_labels=by_labels)
    workspace.put(context.work / "rounds.pkl", task, what="the training function")


@dataclass(frozen=True, kw_only=True)
class RoundTask:
    """What a training child needs: which round, how much of the multiplications it leaves, and what it trains with."""

    work: Path
    folder: Path
    wish: Prune
    rows: training.Rows
    train: Train | None
    by_labels: float
    number: int = 1
    left: float = 1.0


def round_here(argument: Any) -> PrunedRound:
    """The training child: a round of pruning and training, unless it lies in the cache; puts its model into `work`."""
    work, number = Path(argument["work"]), int(argument["number"])
    model: Model = workspace.take(work / "model.pkl")
    task: RoundTask = replace(workspace.take(work / "rounds.pkl"), number=number, left=argument["left"])
    student: Any = copy.deepcopy(model.module)
    found = _kept(task.folder, number)
    if found is not None:
        restored(student.inner, found)
    else:
        before = _kept(task.folder, number - 1)
        if before is not None:
            restored(student.inner, before)
        found = _one(task, model, student, before)
    for weight in student.parameters():
        weight.grad = None
    student.eval().requires_grad_(False)
    workspace.put(work / f"{PRUNE}{number}.pkl", replace(model, module=student), what="the pruned module")
    return found


def restored(module: torch.nn.Module, found: PrunedRound) -> torch.nn.Module:
    """`module`, the original as it was captured or as its class makes it, as a round left it; in place."""
    pruning.narrow(module, found.channels)
    module.load_state_dict({name: to_torch(array) for name, array in tensorfile.load(Path(found.weights)).items()})
    return module


def _kept(folder: Path, number: int) -> PrunedRound | None:
    """The record of a round whose weights are there, whole."""
    try:
        found = msgspec.json.decode((folder / f"round-{number}.json").read_bytes(), type=PrunedRound)
        whole = caching.digest(Path(found.weights).read_bytes()) == found.content
    except (OSError, msgspec.MsgspecError):
        return None
    return found if whole else None


def _one(task: RoundTask, model: Model, student: Any, before: PrunedRound | None) -> PrunedRound:
    """Prune `student`, which is as the round `before` left it, train it, and keep it: the weights, then the record."""
    began, inputs, wish = time.monotonic(), _inputs(model), task.wish
    loss = training.importance_loss(task.rows, model) if wish.importance == "taylor" else None
    known = {f"{_INNER}{name}": kept for name, kept in (before.channels if before else {}).items()}
    whole = pruning.flops_of(model.module, inputs)
    found = pruning.prune(student, inputs, flops=whole * task.left, wish=_named(wish), loss=loss, known=known)
    student.requires_grad_(True)
    trained = _train(task, model, student)
    student.eval()
    bad = [name for name, weight in student.inner.state_dict().items() if not torch.isfinite(weight).all()]
    if bad:
        raise OptimizeError(f"training left NaN or infinity in {bad[0]}", hint="lower the learning rate")
    data = tensorfile.encode({name: to_numpy(weight) for name, weight in student.inner.state_dict().items()})
    channels: ChannelMap = {name.removeprefix(_INNER): kept for name, kept in found.items()}
    layers: Any = {name: model.module.get_submodule(_INNER + name) for name in channels}
    record = PrunedRound(
        number=task.number,
        flops=pruning.flops_of(student, inputs),
        whole=whole,
        seconds=time.monotonic() - began,
        channels=channels,
        widths={
            name: (len(kept.out), pruning.width(layers[name], True)) for name, kept in channels.items() if kept.out
        },
        weights=str(task.folder / f"round-{task.number}.safetensors"),
        content=caching.digest(data),
        rows=training.count(task.rows, model) if trained is None else trained.rows,
        epochs=0 if trained is None else trained.epochs,
        loss=None if trained is None else trained.loss,
    )
    folders.write(Path(record.weights), data)
    folders.write(task.folder / f"round-{task.number}.json", msgspec.json.encode(record))
    return record


def _train(task: RoundTask, model: Model, student: Any) -> training.Trained | None:
    """By the caller's function where there is one, which tells nothing; else by the default loop."""
    flat: Any = model.module
    if task.train is None:

        def shown(epoch: int, loss: float) -> None:
            partly = task.work / "training.part"
            partly.write_text(json.dumps({"epoch": epoch, "of": task.wish.epochs, "loss": loss}))
            os.replace(partly, task.work / "training.json")

        return training.distil(
            student, model, task.rows, epochs=task.wish.epochs, by_labels=task.by_labels, on_epoch=shown
        )
    batches = [
        (*flat.frame.fill(model.torch_inputs(batch)), None if labels is None else to_torch(labels))
        for batch, labels in training.in_batches(task.rows, model)
    ]
    student.train()
    with as_error(OptimizeError, "the training function failed", hint="it is called as train(student, teacher, rows)"):
        task.train(student.inner, flat.inner, batches)
    return None


def _inputs(model: Model) -> tuple[torch.Tensor, ...]:
    """The first example, as one row where there are rows."""
    example = model.examples[0]
    return model.torch_inputs(resized(example, rows=1) if model.signature.batched else example)


def _named(wish: Prune) -> Prune:
    """The wish with the names of modules as they are below the flat one."""
    return msgspec.structs.replace(wish, keep=tuple(f"{_INNER}{name}" for name in wish.keep))
