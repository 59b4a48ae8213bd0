"""`optimize`: from a module and example inputs to a published artifact and a report."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

import msgspec
import torch

from torchship import __version__, home, plugins
from torchship import hardware as machines
from torchship.artifact import Artifact, Store, open_artifact, package, tensorfile
from torchship.artifact import folder as folders
from torchship.artifact.manifest import Verdict
from torchship.errors import BadInput
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.optimize import cache as caching
from torchship.optimize import capsule, loop, reference, remeasure
from torchship.optimize.attempt import SearchContext
from torchship.optimize.cache import Cache
from torchship.optimize.capture import capture
from torchship.optimize.choose import Goal, choose
from torchship.optimize.config import Metric, SearchConfig, Settings, read
from torchship.optimize.facts import Facts
from torchship.optimize.forkserver import Forkserver
from torchship.optimize.guard import Guard
from torchship.optimize.loop import OnTrial
from torchship.optimize.report import Report
from torchship.optimize.strategies import Strategy
from torchship.optimize.strategies.cutting import Cutting
from torchship.optimize.strategies.finetuning import FineTuning, source_hash
from torchship.optimize.strategies.mixed_precision import MixedPrecision
from torchship.optimize.strategies.proposals import Proposals, propose
from torchship.optimize.trial import METRIC, Trial, read_metric
from torchship.optimize.yardstick import told
from torchship.recipe import Recipe

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
    of what eager fp32 answers, see `Guard`.
    `goal`: latency (p50 at batch 1), throughput, size or memory. `backends` narrows the search, `budget` (seconds)
    bounds it. `on_trial(trial, done, total)` is called as trials finish. Ctrl-C ends the race and keeps what is
    done. `settings`: see `Settings`.

    Raises CaptureFailed, BadConfig, BadInput; a backend that fails, hangs or crashes is a row of the report instead.
    When no trial is valid the report has no winner and nothing is published.
    """
    config = read(
        module, goal=goal, backends=backends, budget=budget, max_drop=max_drop, guard=guard, settings=settings
    )
    model = capture(
        module,
        example_inputs,
        free=settings.get("free", {}),
        batched=settings.get("batched"),
        name=artifact_name(name or type(module).__name__),
    )
    model, groups = reference.with_data(model, () if calibration is None else calibration)
    if evaluate is None:
        reference.refuse_unsteady(model)
    root = Path(settings.get("cache") or home.folder("TORCHSHIP_CACHE", ".cache", "torchship"))
    forks = Forkserver((*_SLOW_IMPORTS, *_OFTEN_MEANT.intersection(sys.modules)), threads=config.threads)
    with folders.room(root), capsule.private_folder(root / "work") as work, closing(forks):
        facts = _search(model, groups, evaluate, config, work=work, cache=Cache(root), forks=forks, on_trial=on_trial)
        if not settings.get("publish", True) or facts.choice.winner is None:
            return Report(facts)
        where = store if isinstance(store, Store) else Store(store)
        return Report(facts, *_publish(facts, where, labels=config.labels, work=work))


def artifact_name(text: str) -> str:
    """`text` as a name that the store takes."""
    word = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")
    return word[:100] if word[:1].isalpha() else f"m{word}"[:100]


def _search(
    model: Model,
    groups: Sequence[int] | None,
    evaluate: Metric | None,
    config: SearchConfig,
    *,
    work: Path,
    cache: Cache,
    forks: Forkserver,
    on_trial: OnTrial | None,
) -> Facts:
    started = time.monotonic()
    context = _prepare(model, groups, evaluate, config, started=started, work=work, cache=cache, forks=forks)
    recipes, left_out = propose(context.model, hardware=context.hardware, backends=config.backends)
    mixed, tuning = MixedPrecision(context), FineTuning(context)
    if config.recipes is None:
        cutting = Cutting(context, among=config.backends or plugins.names("backends"))
        proposals = Proposals(recipes, goal=config.goal, instead=cutting.instead)
        strategies: list[Strategy] = [proposals, cutting, mixed, tuning]
    else:  # what the caller lists is tried to its end, and nothing else but what mends it
        recipes = [Recipe("eager"), *(recipe for recipe in config.recipes if recipe != Recipe("eager"))]
        strategies = [Proposals(recipes, goal=config.goal), mixed, tuning]
    trials, interrupted = loop.run(strategies, context=context, on_trial=on_trial)
    try:
        if not interrupted:
            first = choose(trials, goal=config.goal, constraints=config.constraints)
            trials = remeasure.run(trials, first, context=context)
    except KeyboardInterrupt:
        interrupted = True
    cache.trim()
    facts = _facts(context, trials, left_out)
    found = tuple((layer.path, layer.db) for layer in mixed.layers)
    seconds = time.monotonic() - started
    return msgspec.structs.replace(facts, sensitivity=found, interrupted=interrupted, seconds=seconds)


def _facts(context: SearchContext, trials: Sequence[Trial], left_out: dict[str, str]) -> Facts:
    model, config = context.model, context.config
    return Facts(
        name=model.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        torchship=__version__,
        source=config.source,
        signature=str(model.signature),
        hardware=context.hardware.line,
        fingerprint=context.hardware.fingerprint,
        threads=config.threads,
        device=config.device,
        goal=config.goal,
        constraints=config.constraints,
        trials=tuple(trials),
        choice=choose(trials, goal=config.goal, constraints=config.constraints),
        left_out=left_out,
        notes=(*getattr(model.module, "notes", ()), *context.doubts, *_busy(context.hardware)),
        command=config.command,
        rows=context.rows,
        reference_metric=context.reference_metric,
        packages=caching.versions(["torch", "onnxruntime", "openvino", "nncf", "torchao"]),
    )


def _busy(machine: Hardware) -> tuple[str, ...]:
    """A word of warning when others work on this machine: our own trials make a load of about one a core."""
    load = os.getloadavg()[1]
    if load < machine.cores * 2 + 1:
        return ()
    return (f"the machine was busy (load {load:.1f} on {machine.cores} cores): single figures are noisy",)


def _prepare(
    model: Model,
    groups: Sequence[int] | None,
    evaluate: Metric | None,
    config: SearchConfig,
    *,
    started: float,
    work: Path,
    cache: Cache,
    forks: Forkserver,
) -> SearchContext:
    """Compute the reference once, and lay everything out for the children."""
    fit, held_back, theirs = reference.split_calibration(model.calibration, groups, signature=model.signature)
    model = replace(model, calibration=fit)
    # first, so that nothing that the reference leaves behind in the module goes along
    capsule.put(work / "model.pkl", model, what=f"the module {model.name!r}")
    plan, judged_hash = reference.prepare(work / "reference", model, held_back=held_back, groups=theirs)
    if evaluate is not None:
        capsule.put(work / "metric.pkl", evaluate, what="the evaluate function")
    return SearchContext(
        config=config,
        model=model,
        model_hash=caching.digest(caching.hash_model(model), caching.hash_tensors([*model.examples, *fit])),
        work=work,
        cache=cache,
        forks=forks,
        hardware=machines.here(),
        deadline=started + config.budget,
        rows=plan.rows,
        doubts=tuple(told(plan.yards)),
        judged_hash=judged_hash,
        metric_hash="" if evaluate is None else source_hash(evaluate),
        reference_metric=None
        if evaluate is None
        else _reference_metric(evaluate, reference.EagerStage(model), work / "reference"),
    )


def _reference_metric(evaluate: Metric, eager: reference.EagerStage, folder: Path) -> float:
    """The reference's own value; its values by row, where there are such, are kept in `folder`."""
    try:
        given = evaluate(eager)
    except Exception as fault:
        raise BadInput(
            f"the evaluate function fails on the eager model: {type(fault).__name__}: {fault}",
            hint="it takes a Stage, calls it with a dict of arrays, and returns one number",
        ) from fault
    found, rows = read_metric(given)
    if rows is not None:
        (folder / METRIC).write_bytes(tensorfile.encode({"rows": rows}))
    return found


def _publish(facts: Facts, store: Store, *, labels: Sequence[str], work: Path) -> tuple[Artifact, int]:
    """Copy the winner, add what was measured, its own answers and the report, and publish that."""
    assert facts.choice.winner is not None  # noqa: S101  # the caller looked
    winner: Trial = facts.trials[facts.choice.winner]
    same = _published(facts.name, store, winner, labels)
    if same is not None:
        return same
    folder = work / "winner"
    shutil.copytree(winner.artifact, folder)
    answers = Path(f"{winner.artifact}.answers")
    if answers.is_file():
        folders.write(folder / "examples" / "outputs.safetensors", answers.read_bytes())
    Report(facts).save(folder / "report")
    package.amend(folder, name=facts.name, timing=winner.timing, verdict=_kept(winner), labels=tuple(labels))
    spare = portable([facts.trials[index] for index in facts.choice.ranking])
    if spare is not None:
        package.add_fallback(folder, other=spare.artifact)
    number = store.publish(folder, name=facts.name)
    return open_artifact(store.resolve(f"{facts.name}@{number}"), verify=False), number


def _kept(winner: Trial) -> Verdict | None:
    """What the manifest keeps of a verdict: the numbers and the sentence, as every reader of the format knows them."""
    return None if winner.verdict is None else msgspec.structs.replace(winner.verdict, evidence=None)


def portable(ranking: Sequence[Trial]) -> Trial | None:
    """The best trial that opens on any machine, where the winner (the first) is native code."""
    if not _is_native(ranking[0]):
        return None
    return next((trial for trial in ranking[1:] if not _is_native(trial)), None)


def _is_native(trial: Trial) -> bool:
    return bool(plugins.load("backends", name=trial.recipe.backend).KIND == "native")


def _published(name: str, store: Store, winner: Trial, labels: Sequence[str]) -> tuple[Artifact, int] | None:
    """The current version, where it is this very trial: a rerun out of the cache publishes nothing new."""
    if not store.versions(name):
        return None
    number = store.current(name)
    there = open_artifact(store.resolve(f"{name}@{number}"), verify=False)
    ours = open_artifact(winner.artifact, verify=False).manifest
    found = there.manifest
    same = (found.recipe, found.timing, found.verdict) == (winner.recipe, winner.timing, _kept(winner))
    if same and found.provenance.model_hash == ours.provenance.model_hash and found.labels == tuple(labels):
        return there, number
    return None
