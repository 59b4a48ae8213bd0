"""`optimize`: from a module and example inputs to a published artifact and a report."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

import msgspec
import torch

from torchship import __version__, plugins
from torchship import hardware as machines
from torchship.artifact import Artifact, Store, open_artifact, package, tensorfile
from torchship.artifact import folder as folders
from torchship.artifact.manifest import Verdict
from torchship.errors import BadInput
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.optimize import cache as caching
from torchship.optimize import capsule, combine, finetune, race, reference, rematch, rescue
from torchship.optimize.cache import Cache
from torchship.optimize.capture import capture
from torchship.optimize.choose import Goal, choose
from torchship.optimize.facts import Facts
from torchship.optimize.forkserver import Forkserver
from torchship.optimize.guard import Guard
from torchship.optimize.race import Course, OnTrial
from torchship.optimize.report import Report
from torchship.optimize.trial import METRIC, Trial, read_metric
from torchship.optimize.wish import Metric, Settings, Wish, read
from torchship.optimize.yardstick import told
from torchship.recipe import Recipe, Step

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
    wish = read(module, goal=goal, backends=backends, budget=budget, max_drop=max_drop, guard=guard, settings=settings)
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
    root = Path(settings.get("cache") or caching.default_root())
    forks = Forkserver((*_SLOW_IMPORTS, *_OFTEN_MEANT.intersection(sys.modules)), threads=wish.threads)
    with folders.room(root), capsule.private_folder(root / "work") as work, closing(forks):
        facts = _race(model, groups, evaluate, wish, work=work, cache=Cache(root), forks=forks, on_trial=on_trial)
        if not settings.get("publish", True) or facts.choice.winner is None:
            return Report(facts)
        where = store if isinstance(store, Store) else Store(store)
        return Report(facts, *_publish(facts, where, labels=wish.labels, work=work))


def artifact_name(text: str) -> str:
    """`text` as a name that the store takes."""
    word = re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")
    return word[:100] if word[:1].isalpha() else f"m{word}"[:100]


def _race(
    model: Model,
    groups: Sequence[int] | None,
    evaluate: Metric | None,
    wish: Wish,
    *,
    work: Path,
    cache: Cache,
    forks: Forkserver,
    on_trial: OnTrial | None,
) -> Facts:
    started = time.monotonic()
    machine = machines.here()
    course = _prepare(model, groups, evaluate, wish, machine=machine, work=work, cache=cache, forks=forks)
    recipes, left_out = race.propose(course.model, hardware=machine, backends=wish.backends)
    if wish.recipes is not None:
        recipes = [Recipe("eager"), *(recipe for recipe in wish.recipes if recipe != Recipe("eager"))]
    deadline = started + wish.budget
    free = wish.recipes is None  # what the caller lists is tried, and nothing else
    among = wish.backends or plugins.names("backends")

    def cut(trials: Sequence[Trial]) -> list[Recipe]:
        return combine.cut(trials, course.model, source=wish.source, hardware=machine, among=among) if free else []

    trials, interrupted = race.run(
        recipes, course=course, goal=wish.goal, deadline=deadline, prune=free, instead=cut, on_trial=on_trial
    )
    layers: tuple[rescue.Layer, ...] = ()
    ended = time.monotonic() > deadline and any(trial.status == "ok" for trial in trials)
    if not (interrupted or ended) and all(trial.recipe.backend != "hybrid" for trial in trials):
        more, interrupted = race.run(cut(trials), course=course, goal=wish.goal, deadline=deadline, on_trial=on_trial)
        trials += more
    try:
        if not interrupted:
            layers = _rescue(trials, course, wish, deadline=deadline, on_trial=on_trial)
            if wish.finetune is not None:
                _finetune(trials, course, wish, deadline=deadline, on_trial=on_trial)
            first = choose(trials, goal=wish.goal, constraints=wish.constraints)
            trials = rematch.run(trials, first, course=course, goal=wish.goal, deadline=deadline)
    except KeyboardInterrupt:
        interrupted = True
    cache.trim()
    facts = _facts(course, wish, trials, left_out)
    found = tuple((layer.path, layer.db) for layer in layers)
    seconds = time.monotonic() - started
    return msgspec.structs.replace(facts, sensitivity=found, interrupted=interrupted, seconds=seconds)


def _rescue(
    trials: list[Trial], course: Course, wish: Wish, *, deadline: float, on_trial: OnTrial | None
) -> tuple[rescue.Layer, ...]:
    """Append trials that leave sensitive layers out of int8, where that could win; the ranking they went by."""
    candidates = rescue.worth_it(trials, goal=wish.goal)
    if not candidates or time.monotonic() > deadline:
        return ()
    layers = rescue.ranking(course, recipe=candidates[0].recipe, seconds=min(120.0, deadline - time.monotonic()))
    for trial in rescue.run(candidates, layers, tried=tuple(trials), course=course, deadline=deadline):
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial, len(trials), len(trials))
    return layers


def _finetune(trials: list[Trial], course: Course, wish: Wish, *, deadline: float, on_trial: OnTrial | None) -> None:
    """Append trials of the refused int8 candidates with weights from the user's training loop."""
    candidates = rescue.worth_it(trials, goal=wish.goal)
    if not candidates or wish.finetune is None or time.monotonic() > deadline:
        return
    key = caching.digest(course.model_hash, _source_hash(wish.finetune))
    capsule.put(course.work / "loop.pkl", wish.finetune, what="the fine-tuning loop")
    fault = finetune.in_child(
        work=course.work,
        weights=course.cache.root / "tuned" / f"{key}.safetensors",
        timeout=max(30.0, deadline - time.monotonic()),
        memory=wish.limits.memory,
        threads=wish.threads,
    )
    tuned = replace(course, tuned=True, model_hash=key)
    for candidate in candidates:
        old = candidate.recipe
        recipe = msgspec.structs.replace(old, transforms=(Step(finetune.STEP), *old.transforms))
        if fault:
            trial = Trial(recipe, "failed", failure=f"fine-tuning: {fault}")
        else:
            trial = race.attempt(recipe, course=tuned, left=max(30.0, deadline - time.monotonic()))
        trials.append(trial)
        if on_trial is not None:
            on_trial(trial, len(trials), len(trials))


def _facts(course: Course, wish: Wish, trials: Sequence[Trial], left_out: dict[str, str]) -> Facts:
    model = course.model
    return Facts(
        name=model.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        torchship=__version__,
        source=wish.source,
        signature=str(model.signature),
        hardware=course.hardware.line,
        fingerprint=course.hardware.fingerprint,
        threads=wish.threads,
        device=wish.device,
        goal=wish.goal,
        constraints=wish.constraints,
        trials=tuple(trials),
        choice=choose(trials, goal=wish.goal, constraints=wish.constraints),
        left_out=left_out,
        notes=(*getattr(model.module, "notes", ()), *course.doubts, *_busy(course.hardware)),
        command=wish.command,
        rows=course.rows,
        reference_metric=course.reference_metric,
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
    wish: Wish,
    *,
    machine: Hardware,
    work: Path,
    cache: Cache,
    forks: Forkserver,
) -> Course:
    """Compute the reference once, and lay everything out for the children."""
    fit, held_back, theirs = reference.split_calibration(model.calibration, groups, signature=model.signature)
    model = replace(model, calibration=fit)
    # first, so that nothing that the reference leaves behind in the module goes along
    capsule.put(work / "model.pkl", model, what=f"the module {model.name!r}")
    plan, judged_hash = reference.prepare(work / "reference", model, held_back=held_back, groups=theirs)
    if evaluate is not None:
        capsule.put(work / "metric.pkl", evaluate, what="the evaluate function")
    return Course(
        model=model,
        name=model.name,
        source=wish.source,
        model_hash=caching.digest(caching.hash_model(model), caching.hash_tensors([*model.examples, *fit])),
        work=work,
        cache=cache,
        forks=forks,
        hardware=machine,
        guard=wish.guard,
        effort=wish.effort,
        limits=wish.limits,
        threads=wish.threads,
        device=wish.device,
        rows=plan.rows,
        doubts=tuple(told(plan.yards)),
        judged_hash=judged_hash,
        metric_hash="" if evaluate is None else _source_hash(evaluate),
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


def _source_hash(function: Callable[..., Any]) -> str:
    """A hash of a function's source and defaults, or of its pickle where it has no source."""
    try:
        return caching.digest(inspect.getsource(function), repr(getattr(function, "__defaults__", None)))
    except (OSError, TypeError):
        import cloudpickle

        data: bytes = cloudpickle.dumps(function)
        return caching.digest(data)


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
