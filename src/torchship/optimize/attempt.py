"""One attempt: a recipe becomes a Trial, out of the cache where nothing changed, or built and proven in children."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from torchship import __version__, plugins
from torchship.artifact.manifest import Provenance
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.optimize import cache as caching
from torchship.optimize import trial as trials
from torchship.optimize.cache import Cache, digest
from torchship.optimize.choose import is_valid
from torchship.optimize.config import SearchConfig
from torchship.optimize.forkserver import Forkserver
from torchship.optimize.guard import judge
from torchship.optimize.judge import HOPELESS
from torchship.optimize.trial import BuildTask, Proof, ProofTask, Trial, TrialLimits
from torchship.recipe import Options, Recipe

_PASSING = ("did not finish", "took ", "killed by", "exited with")


@dataclass(frozen=True, kw_only=True)
class SearchContext:
    """Everything that is the same for all trials of one search. `deadline` is on the monotonic clock."""

    config: SearchConfig
    model: Model
    model_hash: str
    work: Path
    cache: Cache
    forks: Forkserver
    hardware: Hardware
    deadline: float
    rows: int
    judged_hash: str
    doubts: tuple[str, ...] = ()
    tuned: bool = False
    metric_hash: str = ""
    reference_metric: float | None = None

    @property
    def capsule(self) -> Path:
        """Where the model lies for the children."""
        return self.work / ("tuned.pkl" if self.tuned else "model.pkl")

    @property
    def metric(self) -> str:
        """Where the user's metric lies for the children; empty without one."""
        return str(self.work / "metric.pkl") if self.metric_hash else ""

    @property
    def reference(self) -> Path:
        """Inputs and outputs of the eager reference."""
        return self.work / "reference"


def attempt(recipe: Recipe, *, context: SearchContext, left: float, done: Sequence[Trial] = ()) -> Trial:
    """One recipe as a Trial: from the cache, or built and proven within `left` seconds. Never raises for its faults."""
    if (before := known(recipe, context)) is not None:
        return before
    built_key, proof_key = _keys(recipe, context)
    started = time.monotonic()
    folder, fault, log = _built(recipe, built_key, context, left)
    build_s = time.monotonic() - started
    if folder is None:
        found = Trial(recipe, "failed", proof_key, failure=fault, log=log, build_s=build_s, seconds=build_s)
    else:
        found = _proven(recipe, proof_key, folder, context, left=left - build_s, done=done)
        found = msgspec.structs.replace(found, build_s=build_s, seconds=time.monotonic() - started)
    if found.failure.startswith("did not finish") and left < context.config.limits.timeout:
        found = msgspec.structs.replace(found, status="skipped", failure="the budget ended while it ran")
    elif not found.failure.startswith(_PASSING):
        context.cache.keep_trial(proof_key, found)
    return found


def known(recipe: Recipe, context: SearchContext) -> Trial | None:
    """What an earlier search found out about this very recipe, under today's limits."""
    before = context.cache.trial(_keys(recipe, context)[1])
    return None if before is None else _judged_again(msgspec.structs.replace(before, cached=True), context)


def _keys(recipe: Recipe, context: SearchContext) -> tuple[str, str]:
    packages = caching.versions([*_packages(recipe), "torch", "numpy"])
    # a backend may hand parts of the model to another that its options name
    code = caching.own_code((recipe.backend, *_words(recipe.options), *(step.transform for step in recipe.transforms)))
    built = digest(context.model_hash, recipe.key, packages, code, context.hardware.fingerprint)
    proof = digest(
        built,
        context.judged_hash,
        context.metric_hash,
        context.config.effort,
        context.config.threads,
        context.config.device,
    )
    return built, proof


def _words(options: Options) -> list[str]:
    return sorted(value for value in options.values() if isinstance(value, str) and value.isidentifier())


def _packages(recipe: Recipe) -> Sequence[str]:
    found: Sequence[str] = getattr(plugins.load("backends", name=recipe.backend), "PACKAGES", ())
    return found


def _limits(context: SearchContext, left: float) -> TrialLimits:
    limits = context.config.limits
    return msgspec.structs.replace(limits, timeout=max(5.0, min(limits.timeout, left)))


def _built(recipe: Recipe, key: str, context: SearchContext, left: float) -> tuple[Path | None, str, str]:
    folder = context.cache.built(key)
    if folder is not None:
        return folder, "", ""
    out = context.work / f"build-{key}"
    shutil.rmtree(out, ignore_errors=True)
    provenance = Provenance(
        torchship=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=context.config.source,
        model_hash=context.model_hash,
        packages=caching.versions([*_packages(recipe), "torch"]),
    )
    task = BuildTask(str(context.capsule), recipe, str(out), context.model.name, provenance)
    outcome = trials.build(task, limits=_limits(context, left), forks=context.forks)
    if outcome.fault:
        shutil.rmtree(out, ignore_errors=True)
        return None, f"build: {outcome.fault}" if not outcome.fault.startswith(_PASSING) else outcome.fault, outcome.log
    return context.cache.keep_build(key, out), "", ""


def _proven(
    recipe: Recipe, key: str, folder: Path, context: SearchContext, *, left: float, done: Sequence[Trial]
) -> Trial:
    timings = [trial.timing for trial in done if trial.timing and is_valid(trial)]
    task = ProofTask(
        artifact=str(folder),
        reference=str(context.reference),
        recipe=recipe,
        guard=context.config.guard,
        effort=context.config.effort,
        answers=str(context.cache.root / "builds" / f"{folder.name}.answers"),
        device=context.config.device,
        threads=context.config.threads,
        best_ms=min((timing.curve[0].p50_ms for timing in timings), default=0.0),
        best_rate=max((point.rows_per_s for timing in timings for point in timing.curve), default=0.0),
        evaluate=context.metric,
        reference_metric=context.reference_metric,
    )
    outcome = trials.prove(task, limits=_limits(context, left), threads=context.config.threads)
    if outcome.fault:
        return Trial(recipe, "failed", key, artifact=str(folder), failure=outcome.fault, log=outcome.log)
    proof = msgspec.convert(outcome.value, Proof)
    found = Trial(recipe, "ok", key, artifact=str(folder), verdict=proof.verdict, timing=proof.timing)
    return _status(found)


def _judged_again(trial: Trial, context: SearchContext) -> Trial:
    """A cached trial under today's limits: the numbers hold, the verdict may not."""
    if trial.verdict is None or trial.status == "failed" or trial.verdict.error >= HOPELESS:
        return trial
    raw = msgspec.structs.replace(trial.verdict, passed=True, reason="")
    verdict = judge(raw, guard=context.config.guard, recipe=trial.recipe)
    return _status(msgspec.structs.replace(trial, verdict=verdict))


def _status(trial: Trial) -> Trial:
    assert trial.verdict is not None  # noqa: S101  # only proven trials come here
    if trial.verdict.passed:
        return msgspec.structs.replace(trial, status="ok", failure="")
    return msgspec.structs.replace(trial, status="refused", failure=f"guard: {trial.verdict.reason}")
