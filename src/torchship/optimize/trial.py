"""One Trial: a child process builds and packs a recipe, another opens it from disk, guards and measures it."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np

from torchship import hardware, plugins, process
from torchship.artifact import open_artifact, tensorfile
from torchship.artifact.manifest import BatchPoint, Evidence, Provenance, Timing, Verdict
from torchship.errors import BadInput, BuildFailed
from torchship.model import Shelf
from torchship.optimize.forkserver import Forkserver
from torchship.optimize.guard import LAW_LIMITS, Guard, judge, precision_of
from torchship.optimize.judge import bounded, judged
from torchship.optimize.measure import Effort, curve, peak_memory
from torchship.recipe import Recipe
from torchship.stage import Stage
from torchship.tensors import Array, Signature, Tensors

METRIC = "metric.safetensors"  # the reference's value of the user's metric for each row
Status: TypeAlias = Literal["ok", "refused", "failed", "skipped"]
_SERVING_BATCH = 8  # memory is what serving up to this many rows at once takes


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
    """What the building child is told; paths are absolute."""

    capsule: str
    recipe: Recipe
    out: str
    name: str
    provenance: Provenance


class ProofTask(msgspec.Struct, frozen=True):
    """What the proving child is told. `best_ms` and `best_rate` are the best so far: who is far behind in both is not
    measured at large batches."""

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
    evaluate: str = ""
    reference_metric: float | None = None


class Proof(msgspec.Struct, frozen=True):
    """What the proving child found."""

    verdict: Verdict
    timing: Timing


def build(task: BuildTask, *, limits: TrialLimits, forks: Forkserver) -> process.Outcome:
    """Apply the transforms, build and pack in a child; the Outcome's fault says why it failed."""
    return forks.run(
        "torchship.optimize.trial:build_here",
        argument=msgspec.to_builtins(task),
        timeout=limits.timeout,
        memory=limits.memory,
    )


def prove(task: ProofTask, *, limits: TrialLimits, threads: int) -> process.Outcome:
    """Open, guard and measure in a fresh child, pinned, that imports only what serving needs; the value is a Proof."""
    return process.run(
        "torchship.optimize.trial:prove_here",
        argument=msgspec.to_builtins(task),
        timeout=limits.timeout,
        memory=limits.memory,
        threads=threads,
        cpus=hardware.cpus(threads),
    )


def build_here(argument: Any) -> None:
    """The building child's side."""
    from torchship.artifact import package
    from torchship.optimize import capsule

    task = msgspec.convert(argument, BuildTask)
    model = capsule.take(Path(task.capsule))
    shelf = Path(f"{task.capsule}.exports")
    shelf.mkdir(mode=0o700, exist_ok=True)
    model = replace(model, shelf=Shelf(shelf, model.module))
    for step in task.recipe.transforms:
        if step.transform == "finetune":
            continue  # the capsule holds the tuned weights
        model = plugins.load("transforms", name=step.transform).apply(model, options=dict(step.options))
    out = Path(task.out)
    (out / "backend").mkdir(parents=True)
    try:
        plugins.load("backends", name=task.recipe.backend).build(
            model, options=dict(task.recipe.options), out=out / "backend"
        )
    except BuildFailed as fault:
        # the doctor stands above the search, and uses its capture: it is asked by name
        raise process.resolve("torchship.doctor.diagnose:in_plain_words")(fault) from fault
    package.pack(
        out,
        name=task.name,
        signature=model.signature,
        recipe=task.recipe,
        provenance=task.provenance,
        max_batch=model.signature.max_rows,
        inputs=model.examples[0],
    )


def prove_here(argument: Any) -> Any:
    """The proving child's side."""
    task = msgspec.convert(argument, ProofTask)
    artifact = open_artifact(task.artifact)
    started = time.perf_counter()
    stage = artifact.open(device=task.device, threads=task.threads, trust=True)
    load_s = time.perf_counter() - started
    example = artifact.inputs()
    points, peak = _first_points(stage, example, artifact.manifest.signature, task.effort)
    limit = LAW_LIMITS[precision_of(task.recipe)]
    found = judged(stage, Path(task.reference), signature=artifact.manifest.signature, law_limit=limit)
    found = judge(found, guard=task.guard, recipe=task.recipe) if not task.evaluate else found
    Path(task.answers).write_bytes(tensorfile.encode(stage(example)))
    if found.passed:
        if not _far_behind(points, task):
            points += _further_points(stage, example, artifact.manifest.signature, task.effort, points)
        found = _metric(stage, found, task)
    stage.close()
    timing = Timing(tuple(points), load_s, peak, artifact.size, task.threads)
    return msgspec.to_builtins(Proof(found, timing))


def _first_points(stage: Stage, example: Tensors, signature: Signature, effort: Effort) -> tuple[list[BatchPoint], int]:
    """The curve up to eight rows, and the memory that this took."""
    small = msgspec.structs.replace(effort, max_batch=min(_SERVING_BATCH, effort.max_batch))
    points = list(curve(stage, example, batched=signature.batched, effort=small))
    return points, peak_memory()


def _further_points(
    stage: Stage, example: Tensors, signature: Signature, effort: Effort, done: list[BatchPoint]
) -> list[BatchPoint]:
    if not signature.batched or effort.max_batch <= _SERVING_BATCH:
        return []
    return list(curve(stage, example, batched=True, effort=effort, after=tuple(done)))


def _far_behind(points: list[BatchPoint], task: ProofTask) -> bool:
    rate = max(found.rows_per_s for found in points)
    return bool(task.best_ms) and points[0].p50_ms > 3 * task.best_ms and rate * 3 < task.best_rate


def _metric(stage: Stage, found: Verdict, task: ProofTask) -> Verdict:
    if not task.evaluate:
        return found
    from torchship.optimize import capsule

    metric, rows = read_metric(capsule.take(Path(task.evaluate))(stage))
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
    rows = np.asarray(given, np.float64)
    metric = float(rows.mean()) if rows.size and rows.ndim < 2 else math.nan
    if not math.isfinite(metric):
        words = f"values of shape {list(rows.shape)}" if rows.ndim > 1 else f"{metric}"
        raise BadInput(
            f"the evaluate function returned {words}",
            hint="return a finite number, or one for each row, higher is better",
        )
    return metric, rows if rows.ndim == 1 and len(rows) > 1 else None
