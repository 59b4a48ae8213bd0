"""From a module and example inputs to a published artifact: `optimize` by a search with a report, `build` without."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

import msgspec
import torch

from torchship import __version__, home, plugins
from torchship import hardware as machines
from torchship.artifact import Artifact, Store, open_artifact, tensorfile
from torchship.artifact import folder as folders
from torchship.artifact.manifest import Provenance
from torchship.errors import BadInput, GuardRefused
from torchship.lowering.program import as_error
from torchship.model import Model
from torchship.optimize import cache as caching
from torchship.optimize import loop, probes, workspace
from torchship.optimize.attempt import SearchContext
from torchship.optimize.cache import Cache
from torchship.optimize.capture import capture
from torchship.optimize.choose import Goal, baseline, choose
from torchship.optimize.config import Metric, SearchConfig, Settings, batches, read
from torchship.optimize.facts import Facts
from torchship.optimize.forkserver import Forkserver
from torchship.optimize.guard import Guard, judge
from torchship.optimize.judge import compare
from torchship.optimize.loop import OnTrial
from torchship.optimize.publishing import Publisher
from torchship.optimize.reference import EagerStage, Reference, refuse_unsteady, split
from torchship.optimize.report import Report
from torchship.optimize.strategies import Strategy, pruned, winners
from torchship.optimize.strategies.cutting import Cutting
from torchship.optimize.strategies.finetuning import FineTuning
from torchship.optimize.strategies.mixed_precision import MixedPrecision
from torchship.optimize.strategies.overflow import Overflow
from torchship.optimize.strategies.proposals import Proposals, propose
from torchship.optimize.strategies.pruned import Pruning
from torchship.optimize.trial import METRIC, Trial, packed, read_metric
from torchship.optimize.yardstick import study, told
from torchship.recipe import Recipe

_SLOW_ROW = 0.1  # seconds: the trial of plain eager, which answers some 130 of them, is not waited for
_SLOW_IMPORTS = ("torch", "torch.export", "onnxscript", "torchship.optimize.trial", "torchship.artifact.package")
_OFTEN_MEANT = frozenset(("torchvision", "timm", "transformers"))  # where the user's module comes from


def optimize(
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    calibration: Iterable[Any] | None = None,
    evaluate: Metric | None = None,
    goal: Goal = "latency",
    backends: Sequence[str] | None = None,
    budget: float = 600.0,
    max_drop: float | None = None,
    guard: Guard | None = None,
    store: Store | str | Path | None = None,
    name: str | None = None,
    on_trial: OnTrial | None = None,
    **settings: Unpack[Settings],
) -> Report:
    """Search the best valid way to run `module` here, publish it to the store, and report every trial.

    `example_inputs`: see `capture`. `calibration`: real inputs, in batches, for quantizers and the guard (half of it is
    held back for the guard; a dict's "group" names rows that belong together). `evaluate(stage)` is your metric, one
    number or one for each row, higher is better. A candidate may lose at most `max_drop` (default 0.01) of it, or else
    of what eager fp32 answers, see `Guard`. `goal`: latency (p50 at batch 1), throughput, size or memory. `backends`
    narrows the search, `budget` (seconds) bounds it. `on_trial(trial, done, total)` is called as trials finish. Ctrl-C
    ends the race and keeps what is done; the best so far is published on the way, see `Publisher`; see `Settings`, too.

    Raises CaptureFailed, BadConfig, BadInput; a backend that fails, hangs or crashes is a row of the report instead.
    When no trial is valid the report has no winner and nothing is published.
    """
    config = read(
        module, goal=goal, backends=backends, budget=budget, max_drop=max_drop, guard=guard, settings=settings
    )
    samples = batches(calibration)
    model = capture(
        module,
        example_inputs,
        free=settings.get("free", {}),
        batched=settings.get("batched"),
        name=artifact_name(name or type(module).__name__),
    )
    pruned.refuse(model, config.prune, data=bool(samples))
    root = Path(settings.get("cache") or home.folder("TORCHSHIP_CACHE", ".cache", "torchship"))
    forks = Forkserver((*_SLOW_IMPORTS, *_OFTEN_MEANT.intersection(sys.modules)), threads=config.threads)
    with folders.room(root), workspace.private_folder(root / "work") as work, closing(forks):
        context = _prepare(model, samples, evaluate, config, work=work, cache=Cache(root), forks=forks)
        publisher = Publisher(store, context=context) if settings.get("publish", True) else None
        facts = _search(context, on_trial, publisher)
        winners.learn(facts, context=context)
        won = () if facts.winner is None or publisher is None else publisher.finish(facts, facts.winner)
        return Report(facts, *won)


def artifact_name(text: str) -> str:
    """`text` as a name that the store takes."""
    word = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")
    return word[:100] if word[:1].isalpha() else f"m{word}"[:100]


def _prepare(
    model: Model,
    samples: Iterable[Any],
    evaluate: Metric | None,
    config: SearchConfig,
    *,
    work: Path,
    cache: Cache,
    forks: Forkserver,
) -> SearchContext:
    """Compute the reference once, and lay everything out for the children."""
    forks.start()  # its imports take about as long as the reference does
    model, held_back, groups = split(model, samples)
    if evaluate is None:
        refuse_unsteady(model)
    deadline = time.monotonic() + config.budget
    # first, so that nothing that the reference leaves behind in the module goes along
    workspace.put(work / "model.pkl", model, what=f"the module {model.name!r}")
    stepwise = not config.guard.strict  # which has no use for what is not proved
    judged = Reference(work / "reference", model, held_back=held_back, groups=groups, stepwise=stepwise)
    metric_hash, reference_metric = "", None
    if evaluate is not None:
        workspace.put(work / "metric.pkl", evaluate, what="the evaluate function")
        metric_hash = caching.hash_function(evaluate)
        reference_metric = _reference_metric(evaluate, EagerStage(model), judged.folder)
    context = SearchContext(
        config=config,
        model=model,
        model_hash=caching.digest(
            caching.hash_model(model), caching.hash_tensors([*model.examples, *model.calibration])
        ),
        work=work,
        cache=cache,
        forks=forks,
        hardware=machines.here(),
        deadline=deadline,
        reference=judged,
        metric_hash=metric_hash,
        reference_metric=reference_metric,
    )
    pruned.prepare(context, list(samples), held_back=held_back, groups=groups)
    return context


def _reference_metric(evaluate: Metric, eager: EagerStage, folder: Path) -> float:
    """The reference's own value; its values by row, where there are such, are kept in `folder`."""
    hint = "it takes a Stage, calls it with a dict of arrays, and returns one number"
    with as_error(BadInput, "the evaluate function fails on the eager model", hint=hint):
        given = evaluate(eager)
    found, rows = read_metric(given)
    if rows is not None:
        (folder / METRIC).write_bytes(tensorfile.encode({"rows": rows}))
    return found


def _search(context: SearchContext, on_trial: OnTrial | None, publisher: Publisher | None) -> Facts:
    """The loop, which publishes as it goes, then the close ones again, and what came of it all."""
    config = context.config
    recipes, left_out = _proposed(context)
    mixed, overflow, tuning = MixedPrecision(context), Overflow(context), FineTuning(context)
    pruning = Pruning(context)
    if config.recipes is None:
        cutting = Cutting(context)
        liked = winners.known(context)
        hurried = context.reference.row_s > _SLOW_ROW
        proposals = Proposals(recipes, goal=config.goal, instead=cutting.instead, favourites=liked, hurried=hurried)
        strategies: list[Strategy] = [proposals, cutting, overflow, mixed, tuning, pruning]
    else:  # what the caller lists is tried to its end, and nothing else but what mends it
        recipes = [baseline(), *(recipe for recipe in config.recipes if recipe != baseline())]
        strategies = [Proposals(recipes, goal=config.goal), overflow, mixed, tuning, pruning]
    facts = partial(_facts, context, left_out=left_out, mixed=mixed, pruning=pruning)
    done: list[Trial] = []

    def tell(trial: Trial, count: int, total: int) -> None:
        done[:] = [trial if before.recipe == trial.recipe else before for before in done]
        if trial not in done:
            done.append(trial)
        if on_trial is not None:
            on_trial(trial, count, total)
        if publisher is not None and trial.status != "skipped":
            publisher.offer(facts(done))

    trials, interrupted = loop.run(strategies, context=context, on_trial=tell)
    try:
        if not interrupted:
            first = choose(trials, goal=config.goal, constraints=config.constraints)
            trials = loop.remeasured(trials, first, context=context)
    except KeyboardInterrupt:
        interrupted = True
    context.cache.trim()
    return facts(trials, interrupted=interrupted)


def _facts(
    context: SearchContext,
    trials: Sequence[Trial],
    *,
    left_out: dict[str, str],
    mixed: MixedPrecision,
    pruning: Pruning,
    interrupted: bool = False,
) -> Facts:
    """What came of the trials so far."""
    config = context.config
    notes = [*getattr(context.model.module, "notes", ()), *told(context.reference.plan.yards)]
    load, cores = os.getloadavg()[1], context.hardware.cores
    if load >= cores * 2 + 1:  # our own trials make a load of about one a core
        notes.append(f"the machine was busy (load {load:.1f} on {cores} cores): single figures are noisy")
    return Facts(
        name=context.model.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        torchship=__version__,
        source=config.source,
        signature=str(context.model.signature),
        hardware=context.hardware.line,
        cards=tuple(gpu.name for gpu in context.hardware.gpus),
        fingerprint=context.hardware.fingerprint,
        threads=config.threads,
        device=config.device,
        goal=config.goal,
        constraints=config.constraints,
        trials=tuple(trials),
        choice=choose(trials, goal=config.goal, constraints=config.constraints),
        left_out=left_out,
        notes=tuple([*notes, pruning.note] if pruning.note else notes),
        command=config.command,
        rows=context.reference.rows,
        seconds=time.monotonic() - context.deadline + config.budget,
        interrupted=interrupted,
        reference_metric=context.reference_metric,
        packages=caching.versions(["torch", "onnxruntime", "openvino", "nncf", "torchao"]),
        sensitivity=tuple((layer.path, layer.db) for layer in mixed.layers),
        pruned=tuple(pruning.rounds),
    )


def _proposed(context: SearchContext) -> tuple[list[Recipe], dict[str, str]]:
    """Recipes in the order to try them, and why backends are left out, here or on this machine's card."""
    config, hardware = context.config, context.hardware
    found, left_out = propose(context.model, hardware=hardware, backends=config.backends, device=config.device)
    found = [thrifty(recipe) for recipe in found] if config.serves else found
    recipes, refused = probes.without_refused(found, cache=context.cache, hardware=hardware)
    return recipes, left_out | refused


def thrifty(recipe: Recipe) -> Recipe:
    """The recipe with what its backend states to take less memory."""
    options = plugins.fact("backends", recipe.backend, "THRIFTY", None) or {}
    return msgspec.structs.replace(recipe, options={**options, **recipe.options})


def build(
    module: torch.nn.Module,
    example_inputs: Any,
    *,
    recipe: Recipe,
    name: str,
    store: Store | str | Path | None = None,
    guard: Guard | None = None,
) -> Artifact:
    """Publish `module` by `recipe`, in this process: nothing else is tried and nothing is measured.

    `example_inputs`: see `capture`; on them the artifact, opened from disk, must agree with the module as `guard` says.
    Transforms are the search's business: `recipe` has none. Raises CaptureFailed, BuildFailed, GuardRefused.
    """
    model = capture(module, example_inputs, name=name)
    example = model.examples[0]
    wanted = EagerStage(model)(example)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    provenance = Provenance(__version__, created, f"torchship.build:{name}", caching.hash_model(model))
    with TemporaryDirectory(prefix="torchship-build-") as scratch:
        folder = Path(scratch) / "artifact"
        packed(model, folder, recipe=recipe, name=name, provenance=provenance, outputs=wanted)
        with closing(open_artifact(folder).open(trust=True)) as stage:
            yards = study([wanted], signature=model.signature)
            found = compare([wanted], [stage(example)], signature=model.signature, yards=yards)
            found = judge(found, guard=guard or Guard(), recipe=recipe)
        if not found.passed:
            raise GuardRefused(f"{name}: {recipe.label}: {found.reason}", hint="try another recipe, or let it search")
        where = store if isinstance(store, Store) else Store(store)
        number = where.publish(folder, name=name)
    return open_artifact(where.resolve(f"{name}@{number}"), verify=False)
