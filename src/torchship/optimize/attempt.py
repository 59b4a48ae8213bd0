"""One attempt: a recipe becomes a Trial, out of the cache where nothing changed, or built and proven in children."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from torchship import __version__, hardware, plugins, process
from torchship.artifact.manifest import Provenance, Timing, Verdict
from torchship.errors import TorchshipError
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.optimize import cache as caching
from torchship.optimize import footprint, probes
from torchship.optimize.cache import Cache, digest
from torchship.optimize.choose import accelerated, is_plain, is_valid
from torchship.optimize.config import SearchConfig
from torchship.optimize.forkserver import Forkserver
from torchship.optimize.guard import judge
from torchship.optimize.judge import HOPELESS
from torchship.optimize.measure import SERVING_BATCH, Effort
from torchship.optimize.reference import Reference
from torchship.optimize.trial import BuildTask, ProofTask, Trial
from torchship.recipe import Recipe

LEAST_S = 60.0  # of what must be tried, whatever the budget
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
    reference: Reference
    weights: str = ""  # which ones `model_hash` is of, see `Recipe.weights`
    trained: dict[str, str] = field(default_factory=dict)  # hashes of the weights that strategies made, by their names
    metric_hash: str = ""
    reference_metric: float | None = None

    @property
    def model_file(self) -> Path:
        """Where the model lies for the children."""
        return self.work / f"{self.weights or 'model'}.pkl"

    def of(self, recipe: Recipe) -> SearchContext:
        """The context with the weights that a recipe builds."""
        name = recipe.weights
        return replace(self, weights=name, model_hash=self.trained[name]) if name else self


def attempt(recipe: Recipe, *, context: SearchContext, left: float, done: Sequence[Trial] = ()) -> Trial:
    """One recipe as a Trial: from the cache, or built and proven within `left` seconds. Never raises for its faults."""
    if (before := known(recipe, context)) is not None:
        return before
    started, context = time.monotonic(), context.of(recipe)
    if why := probes.verdict(recipe, cache=context.cache, hardware=context.hardware, left=left):
        return Trial(recipe, "failed", failure=why, seconds=time.monotonic() - started)
    if why is None:
        return Trial(recipe, "skipped", failure="the budget is too short to try this backend out on the card")
    built_key, proof_key = _keys(recipe, context)
    found = Trial(recipe, "failed", proof_key)
    folder = context.cache.built(built_key) or _built(recipe, built_key, context, left)
    build_s = time.monotonic() - started
    if isinstance(folder, process.Outcome):
        why = folder.fault if folder.fault.startswith(_PASSING) else f"build: {folder.fault}"
        found = msgspec.structs.replace(found, failure=why, log=folder.log)
    else:
        found = msgspec.structs.replace(found, artifact=str(folder))
        found = _proven(found, context, left=left - build_s, done=done)
    found = msgspec.structs.replace(found, build_s=build_s, seconds=time.monotonic() - started)
    if found.failure.startswith("did not finish") and left < context.config.limits.timeout:
        found = msgspec.structs.replace(found, status="skipped", failure="the budget ended while it ran")
    elif not found.failure.startswith(_PASSING):
        context.cache.keep("trials", proof_key, found)
    return found


def known(recipe: Recipe, context: SearchContext) -> Trial | None:
    """What an earlier search found out about this recipe, under today's limits: numbers hold, the verdict may not."""
    trial = context.cache.trial(_keys(recipe, context)[1])
    if trial is None:
        return None
    trial = msgspec.structs.replace(trial, cached=True)
    if trial.verdict is None or trial.status == "failed" or trial.verdict.error >= HOPELESS:
        return trial
    raw = msgspec.structs.replace(trial.verdict, passed=True, reason="")
    verdict = judge(raw, guard=context.config.guard, recipe=recipe)
    return _ended(msgspec.structs.replace(trial, verdict=verdict))


def _keys(recipe: Recipe, context: SearchContext) -> tuple[str, str]:
    """What a build, and a trial, of this recipe are kept under."""
    context = context.of(recipe)
    packages = caching.versions([*_packages(recipe), "numpy"])
    # a backend may hand parts of the model to another that its options name
    words = sorted(word for word in recipe.options.values() if isinstance(word, str) and word.isidentifier())
    code = caching.own_code((recipe.backend, *words, *(step.transform for step in recipe.transforms)))
    built = digest(context.model_hash, recipe.key, packages, code, context.hardware.fingerprint)
    config = context.config
    how: tuple[object, ...] = (config.effort, config.threads, config.device)
    if config.serves:
        how = (*how, "served", config.constraints.max_memory)
    return built, digest(built, context.reference.hash, context.metric_hash, *how)


def _packages(recipe: Recipe) -> list[str]:
    return [*plugins.fact("backends", recipe.backend, "PACKAGES", ()), "torch"]


def _timeout(context: SearchContext, left: float) -> float:
    return max(5.0, min(context.config.limits.timeout, left))


def _built(recipe: Recipe, key: str, context: SearchContext, left: float) -> Path | process.Outcome:
    """The packed artifact, built in a forked child and kept in the cache; or why there is none."""
    out = context.work / f"build-{key}"
    shutil.rmtree(out, ignore_errors=True)
    provenance = Provenance(
        torchship=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=context.config.source,
        model_hash=context.model_hash,
        packages=caching.versions(_packages(recipe)),
    )
    outcome = context.forks.run(
        "torchship.optimize.trial:build_here",
        argument=BuildTask(str(context.model_file), recipe, str(out), context.model.name, provenance),
        timeout=_timeout(context, left),
        memory=context.config.limits.memory,
    )
    if not outcome.fault:
        return context.cache.keep_build(key, out)
    shutil.rmtree(out, ignore_errors=True)
    return outcome


def _effort(recipe: Recipe, context: SearchContext) -> Effort:
    """Where there is a card, the module as it is gives values on the processor; its speed matters at batch 1 alone."""
    effort = context.config.effort
    if not is_plain(recipe) or not context.hardware.gpus or context.config.device != "cpu":
        return effort
    return msgspec.structs.replace(effort, max_batch=1, calls=min(effort.calls, 10))


def completed(trial: Trial, *, context: SearchContext) -> Trial:
    """The trial with all points of its curve, where it was far behind, or the first, and has two."""
    if trial.timing is None or [point.batch for point in trial.timing.curve] != [1, SERVING_BATCH]:
        return trial
    left = max(context.deadline - time.monotonic(), LEAST_S)
    found = _proven(trial, context, left=left, done=(), whole=True)
    if not is_valid(found):
        return trial
    context.cache.keep("trials", trial.key, found)
    return found


def rejudged(trial: Trial, *, context: SearchContext) -> Trial:
    """A trial that was judged on fewer rows than there are by now, judged on them all; what was measured stays.

    One that gave other shapes, or no number, is what it was, and one that answered all of the few exactly.
    """
    found, exact = trial.verdict, trial.verdict is not None and trial.verdict.error == 0
    if found is None or trial.timing is None or found.error >= HOPELESS or (exact and trial.status == "ok"):
        return trial
    if (before := known(trial.recipe, context)) is not None:
        return before
    left = max(context.deadline - time.monotonic(), LEAST_S)
    trial = msgspec.structs.replace(trial, key=_keys(trial.recipe, context)[1])
    trial = _proven(trial, context, left=left, done=(), measured=trial.timing)
    note = f"judged on a few rows at first, then on {context.reference.rows}"
    trial = msgspec.structs.replace(trial, notes=(*trial.notes, note))
    if trial.verdict is not None and not trial.failure.startswith(_PASSING):
        context.cache.keep("trials", trial.key, trial)
    return trial


def _proven(
    trial: Trial,
    context: SearchContext,
    *,
    left: float,
    done: Sequence[Trial],
    whole: bool = False,
    measured: Timing | None = None,
) -> Trial:
    """The trial with what a fresh child, pinned, finds out about its artifact; with `measured`, the verdict alone."""
    timings = [other.timing for other in done if other.timing and is_valid(other)]
    few = [point for timing in timings for point in timing.curve if point.batch <= SERVING_BATCH]
    config = context.config
    task = ProofTask(
        artifact=trial.artifact,
        reference=str(context.reference.folder),
        recipe=trial.recipe,
        guard=config.guard,
        effort=_effort(trial.recipe, context),
        answers=f"{trial.artifact}.answers",
        device=config.device,
        threads=config.threads,
        best_ms=min((timing.curve[0].p50_ms for timing in timings), default=0.0),
        best_rate=max((point.rows_per_s for point in few), default=0.0),
        whole=whole,
        measured=measured,
        evaluate=str(context.work / "metric.pkl") if context.metric_hash else "",
        reference_metric=context.reference_metric,
    )
    outcome = process.run(
        "torchship.optimize.trial:prove_here",
        argument=task,
        timeout=_timeout(context, left),
        memory=config.limits.memory,
        threads=config.threads,
        cpus=hardware.cpus(config.threads),
    )
    if outcome.fault:
        return msgspec.structs.replace(trial, status="failed", failure=outcome.fault, log=outcome.log)
    verdict, timing = msgspec.convert(outcome.value, tuple[Verdict, Timing])
    if config.serves and verdict.passed and measured is None:
        return _served(msgspec.structs.replace(trial, verdict=verdict, timing=timing), context, left=left)
    return _ended(msgspec.structs.replace(trial, verdict=verdict, timing=timing))


def _served(trial: Trial, context: SearchContext, *, left: float) -> Trial:
    """A proven trial with what a whole fresh server of it takes, in one process where it needs no card."""
    config, timing = context.config, trial.timing
    assert timing is not None  # noqa: S101  # it was proven
    alone = config.device == "cpu" and not accelerated(trial.recipe)
    limit, timeout = config.constraints.max_memory, _timeout(context, left)
    try:
        found = footprint.fitted(
            Path(trial.artifact), limit=limit, threads=config.threads, one_process=alone, timeout=timeout
        )
    except TorchshipError as fault:
        return msgspec.structs.replace(trial, status="failed", failure=fault.line)
    return _ended(
        msgspec.structs.replace(trial, timing=msgspec.structs.replace(timing, peak_memory=found.peak, served=found))
    )


def _ended(trial: Trial) -> Trial:
    """A proven trial with the status that its verdict gives it."""
    assert trial.verdict is not None  # noqa: S101  # only proven trials come here
    if trial.verdict.passed:
        return msgspec.structs.replace(trial, status="ok", failure="")
    return msgspec.structs.replace(trial, status="refused", failure=f"guard: {trial.verdict.reason}")
