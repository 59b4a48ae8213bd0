"""One Trial: a child process builds and packs a recipe, another opens it from disk, guards and measures it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from torchship import plugins, process
from torchship.artifact import open_artifact, package, tensorfile
from torchship.artifact.manifest import Evidence, Provenance, Timing, Verdict
from torchship.errors import BadInput, BuildFailed
from torchship.model import Model, Shelf
from torchship.optimize import workspace
from torchship.optimize.guard import LAW_LIMITS, Guard, judge, precision_of
from torchship.optimize.judge import bounded, judged
from torchship.optimize.measure import SERVING_BATCH, Effort, curve, peak_memory
from torchship.recipe import FINETUNE, PRUNE, Recipe
from torchship.stage import Stage
from torchship.tensors import Array, Tensors

METRIC = "metric.safetensors"  # the reference's value of the user's metric for each row
Status: TypeAlias = Literal["ok", "refused", "failed", "skipped"]
_NEAR = 2.0  # times the best of its batch size: who is farther behind is measured at 1 and 8 rows alone


class Trial(msgspec.Struct, frozen=True):
    """What became of one recipe. `failure` says why it is not `ok`; `artifact` is a folder; times in seconds.

    `notes` tell what the search did about it: layers left out, measured again, taken from the cache.
    """

    recipe: Recipe
    status: Status
    key: str = ""
    artifact: str = ""
    verdict: Verdict | None = None
    timing: Timing | None = None
    failure: str = ""
    log: str = ""
    build_s: float = 0.0
    seconds: float = 0.0
    cached: bool = False
    notes: tuple[str, ...] = ()


class TrialLimits(msgspec.Struct, frozen=True):
    """What a child may take: seconds and bytes."""

    timeout: float = 300.0
    memory: int | None = None


class BuildTask(msgspec.Struct, frozen=True):
    """What the building child is told: the model's file in the workspace, and what to make of it in folder `out`."""

    model: str
    recipe: Recipe
    out: str
    name: str
    provenance: Provenance


class ProofTask(msgspec.Struct, frozen=True):
    """What the proving child is told.

    `best_ms` at batch 1 and `best_rate` (rows a second, up to 8 rows) are the best so far (0: none). Who is far behind
    in both, or the first of all, is not measured at other batches unless the `whole` curve is asked for. What was
    `measured` before is not measured at all, only judged.
    """

    artifact: str
    reference: str
    recipe: Recipe
    guard: Guard
    effort: Effort
    answers: str
    device: str = "cpu"
    threads: int = 0
    best_ms: float = 0.0
    best_rate: float = 0.0
    whole: bool = False
    measured: Timing | None = None
    evaluate: str = ""
    reference_metric: float | None = None


def build_here(argument: Any) -> None:
    """The building child: applies the transforms, builds and packs."""
    task = msgspec.convert(argument, BuildTask)
    model = workspace.take(Path(task.model))
    shelf = Path(f"{task.model}.exports")
    shelf.mkdir(mode=0o700, exist_ok=True)
    model = replace(model, shelf=Shelf(shelf, model.module))
    for step in task.recipe.transforms:
        if step.transform not in (FINETUNE, PRUNE):
            model = plugins.load("transforms", name=step.transform).apply(model, options=dict(step.options))
    try:
        packed(model, Path(task.out), recipe=task.recipe, name=task.name, provenance=task.provenance)
    except BuildFailed as fault:
        # the doctor stands above the search, and uses its capture: it is asked by name
        raise process.resolve("torchship.doctor.diagnose:in_plain_words")(fault) from fault


def packed(
    model: Model, out: Path, *, recipe: Recipe, name: str, provenance: Provenance, outputs: Tensors = {}
) -> None:
    """Build a model by the backend of `recipe`, and pack it as an artifact in the new folder `out`."""
    (out / "backend").mkdir(parents=True)
    backend = plugins.load("backends", name=recipe.backend)
    backend.build(model, options=dict(recipe.options), out=out / "backend")
    package.pack(
        out,
        name=name,
        signature=model.signature,
        recipe=recipe,
        provenance=provenance,
        max_batch=model.signature.max_rows,
        inputs=model.examples[0],
        outputs=outputs,
    )


def prove_here(argument: Any) -> tuple[Verdict, Timing]:
    """The proving child: opens, guards and measures, and imports only what serving needs."""
    task = msgspec.convert(argument, ProofTask)
    artifact = open_artifact(task.artifact)
    started = time.perf_counter()
    stage = artifact.open(device=task.device, threads=task.threads, trust=True)
    load_s = time.perf_counter() - started
    example, signature = artifact.inputs(), artifact.manifest.signature
    points = list(task.measured.curve if task.measured else ())
    further = iter(()) if points else curve(stage, example, batched=signature.batched, effort=task.effort)
    for found in further:
        points.append(found)
        if found.batch >= SERVING_BATCH:
            break
    peak = peak_memory()
    law_limit = LAW_LIMITS[precision_of(task.recipe)]
    verdict = judged(stage, Path(task.reference), signature=signature, law_limit=law_limit)
    verdict = judge(verdict, guard=task.guard, recipe=task.recipe) if not task.evaluate else verdict
    Path(task.answers).write_bytes(tensorfile.encode(stage(example)))
    if verdict.passed:
        rate = max(found.rows_per_s for found in points)
        near = points[0].p50_ms <= _NEAR * task.best_ms or (task.best_rate and rate * _NEAR >= task.best_rate)
        if near or task.whole:
            points += further
        verdict = _by_metric(stage, verdict, task) if task.evaluate else verdict
    stage.close()
    points.sort(key=lambda found: found.batch)
    return verdict, task.measured or Timing(tuple(points), load_s, peak, artifact.size, task.threads)


def _by_metric(stage: Stage, found: Verdict, task: ProofTask) -> Verdict:
    """The verdict by the user's metric, with an interval where it gives a value for each row."""
    metric, rows = read_metric(workspace.take(Path(task.evaluate))(stage))
    reference = Path(task.reference, METRIC)
    evidence = found.evidence or Evidence()
    if rows is not None and reference.is_file() and len(wanted := tensorfile.load(reference)["rows"]) == len(rows):
        moved = np.abs(wanted - rows)[wanted != rows]
        event = float(moved.mean() if len(moved) else np.abs(wanted).max())
        sure = bounded(wanted - rows, groups=None, event=event)
        evidence = msgspec.structs.replace(sure, measure="metric", broken=evidence.broken)
    else:
        evidence = Evidence(broken=evidence.broken)
    measured = msgspec.structs.replace(found, metric=metric, reference_metric=task.reference_metric, evidence=evidence)
    return judge(measured, guard=task.guard, recipe=task.recipe)


def read_metric(given: Any) -> tuple[float, Array | None]:
    """What the user's metric returned, as one number and, where it gave one for each row, those. Raises BadInput."""
    try:
        rows = np.asarray(given, np.float64)
    except (TypeError, ValueError):  # words, a dict, rows of different lengths
        rows, words = np.full(1, math.nan), f"a {type(given).__name__} that is no numbers"
    else:
        words = f"values of shape {list(rows.shape)}" if rows.ndim > 1 else "None" if given is None else ""
    metric = float(rows.mean()) if rows.size and rows.ndim < 2 else math.nan
    if not math.isfinite(metric):
        words = words or f"{metric}"
        raise BadInput(
            f"the evaluate function returned {words}",
            hint="return a finite number, or one for each row, higher is better",
        )
    return metric, rows if rows.ndim == 1 and len(rows) > 1 else None
