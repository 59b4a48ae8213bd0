"""The race: runs recipes one after another as Trials, from the cache where nothing changed, within a budget."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from torchship import __version__, plugins
from torchship.artifact.manifest import Provenance
from torchship.hardware import Hardware
from torchship.model import Model
from torchship.optimize import cache as caching
from torchship.optimize import combine
from torchship.optimize import trial as trials
from torchship.optimize.cache import Cache, digest
from torchship.optimize.choose import Goal, is_valid
from torchship.optimize.forkserver import Forkserver
from torchship.optimize.guard import Guard, judge
from torchship.optimize.judge import HOPELESS
from torchship.optimize.measure import Effort
from torchship.optimize.order import hopeless, next_up
from torchship.optimize.trial import BuildTask, Limits, Proof, ProofTask, Trial
from torchship.recipe import Options, Recipe

OnTrial = Callable[[Trial, int, int], None]
Instead = Callable[[Sequence[Trial]], Sequence[Recipe]]
_EARLY = ("onnxruntime", "openvino", "tensorrt", "inductor")  # they win most often; the others follow by name
_PASSING = ("did not finish", "took ", "killed by", "exited with")


@dataclass(frozen=True, kw_only=True)
class Course:
    """Everything that is the same for all trials of one search."""

    model: Model
    name: str
    source: str
    model_hash: str
    work: Path
    cache: Cache
    forks: Forkserver
    hardware: Hardware
    guard: Guard
    effort: Effort
    limits: Limits
    threads: int
    device: str
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


def propose(model: Model, *, hardware: Hardware, backends: Sequence[str] | None) -> tuple[list[Recipe], dict[str, str]]:
    """Recipes in the order to try them, eager first, then each backend's best guess; and why backends are left out.

    Raises BadConfig for a backend that does not exist.
    """
    known = plugins.names("backends")
    wanted = (
        list(backends) if backends else [*(n for n in _EARLY if n in known), *(n for n in known if n not in _EARLY)]
    )
    reasons: dict[str, str] = {}
    ranked: list[tuple[int, int, Recipe]] = []
    for place, name in enumerate(wanted):
        module = plugins.load("backends", name=name) if backends else None
        reason = plugins.reason_against("backends", name=name, hardware=hardware)
        if reason:
            reasons[name] = reason
            continue
        try:
            module = module or plugins.load("backends", name=name)
            found = module.propose(model, hardware=hardware)
        except Exception as fault:
            reasons[name] = f"its proposals failed: {type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
            continue
        ranked += [(rank, place, recipe) for rank, recipe in enumerate(found)]
        more = combine.combined(model, hardware=hardware, among=[name])
        ranked += [(rank, place, recipe) for rank, recipe in more]
    if reason := combine.reason_against("quantize"):
        reasons["torch's own int8"] = reason
    ranked.sort(key=lambda item: item[:2])
    eager = Recipe("eager")
    others = [recipe for _, _, recipe in ranked if recipe != eager]
    return [eager, *{recipe.key: recipe for recipe in others}.values()], reasons


def run(
    recipes: Sequence[Recipe],
    *,
    course: Course,
    goal: Goal,
    deadline: float,
    prune: bool = False,
    instead: Instead | None = None,
    on_trial: OnTrial | None = None,
) -> tuple[list[Trial], bool]:
    """Trials of `recipes`, best first, and whether the user interrupted; what the budget did not reach is skipped.

    The first recipe (plain eager) runs whatever the budget; where it ends badly, `instead` says what to try next, and
    the module as it is stands in for it.
    `prune` skips what cannot win any more.
    """
    waiting, done = list(recipes), list[Trial]()
    interrupted = False
    while waiting:
        recipe = waiting.pop(next_up(waiting, done, goal=goal))
        left, urgent = deadline - time.monotonic(), not done or _stands_in(recipe, done)
        if interrupted:
            found = Trial(recipe, "skipped", failure="interrupted")
        elif left <= 0 and not urgent:  # what is known costs no time
            found = _known(recipe, course) or Trial(recipe, "skipped", failure="the budget was used up")
        elif prune and (why := hopeless(recipe, done, goal=goal)):
            found = Trial(recipe, "skipped", failure=why)
        else:
            try:
                found = attempt(recipe, course=course, left=max(left, 60.0) if urgent else left, done=done)
            except KeyboardInterrupt:
                interrupted = True
                found = Trial(recipe, "skipped", failure="interrupted")
        done.append(found)
        if len(done) == 1 and found.status != "ok" and instead is not None:
            waiting = [*instead(done), *waiting]
        try:
            if on_trial is not None:
                on_trial(found, len(done), len(done) + len(waiting))
        except KeyboardInterrupt:
            interrupted = True
    return done, interrupted


def _stands_in(recipe: Recipe, done: Sequence[Trial]) -> bool:
    """Whether this is the user's own Python, whole, and there is nothing valid and nothing like it yet."""
    whole = recipe.backend == "hybrid" and not recipe.options.keys() & {"parts", "precision"}
    return whole and not any(trial.status == "ok" or trial.recipe == recipe for trial in done)


def attempt(recipe: Recipe, *, course: Course, left: float, done: Sequence[Trial] = ()) -> Trial:
    """One recipe as a Trial: from the cache, or built and proven within `left` seconds. Never raises for its faults."""
    known = _known(recipe, course)
    if known is not None:
        return known
    built_key, proof_key = _keys(recipe, course)
    started = time.monotonic()
    folder, fault, log = _built(recipe, built_key, course, left)
    build_s = time.monotonic() - started
    if folder is None:
        found = Trial(recipe, "failed", proof_key, failure=fault, log=log, build_s=build_s, seconds=build_s)
    else:
        found = _proven(recipe, proof_key, folder, course, left=left - build_s, done=done)
        found = msgspec.structs.replace(found, build_s=build_s, seconds=time.monotonic() - started)
    if found.failure.startswith("did not finish") and left < course.limits.timeout:
        found = msgspec.structs.replace(found, status="skipped", failure="the budget ended while it ran")
    elif not found.failure.startswith(_PASSING):
        course.cache.keep_trial(proof_key, found)
    return found


def _known(recipe: Recipe, course: Course) -> Trial | None:
    """What an earlier search found out about this very recipe."""
    known = course.cache.trial(_keys(recipe, course)[1])
    return None if known is None else _judged_again(msgspec.structs.replace(known, cached=True), course)


def _keys(recipe: Recipe, course: Course) -> tuple[str, str]:
    packages = caching.versions([*_packages(recipe), "torch", "numpy"])
    # a backend may hand parts of the model to another that its options name
    code = caching.own_code((recipe.backend, *_words(recipe.options), *(step.transform for step in recipe.transforms)))
    built = digest(course.model_hash, recipe.key, packages, code, course.hardware.fingerprint)
    proof = digest(built, course.judged_hash, course.metric_hash, course.effort, course.threads, course.device)
    return built, proof


def _words(options: Options) -> list[str]:
    return sorted(value for value in options.values() if isinstance(value, str) and value.isidentifier())


def _packages(recipe: Recipe) -> Sequence[str]:
    found: Sequence[str] = getattr(plugins.load("backends", name=recipe.backend), "PACKAGES", ())
    return found


def _limits(course: Course, left: float) -> Limits:
    return msgspec.structs.replace(course.limits, timeout=max(5.0, min(course.limits.timeout, left)))


def _built(recipe: Recipe, key: str, course: Course, left: float) -> tuple[Path | None, str, str]:
    folder = course.cache.built(key)
    if folder is not None:
        return folder, "", ""
    out = course.work / f"build-{key}"
    shutil.rmtree(out, ignore_errors=True)
    provenance = Provenance(
        torchship=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=course.source,
        model_hash=course.model_hash,
        packages=caching.versions([*_packages(recipe), "torch"]),
    )
    task = BuildTask(str(course.capsule), recipe, str(out), course.name, provenance)
    outcome = trials.build(task, limits=_limits(course, left), forks=course.forks)
    if outcome.fault:
        shutil.rmtree(out, ignore_errors=True)
        return None, f"build: {outcome.fault}" if not outcome.fault.startswith(_PASSING) else outcome.fault, outcome.log
    return course.cache.keep_build(key, out), "", ""


def _proven(recipe: Recipe, key: str, folder: Path, course: Course, *, left: float, done: Sequence[Trial]) -> Trial:
    timings = [trial.timing for trial in done if trial.timing and is_valid(trial)]
    task = ProofTask(
        artifact=str(folder),
        reference=str(course.reference),
        recipe=recipe,
        guard=course.guard,
        effort=course.effort,
        answers=str(course.cache.root / "builds" / f"{folder.name}.answers"),
        device=course.device,
        threads=course.threads,
        best_ms=min((timing.curve[0].p50_ms for timing in timings), default=0.0),
        best_rate=max((point.rows_per_s for timing in timings for point in timing.curve), default=0.0),
        evaluate=course.metric,
        reference_metric=course.reference_metric,
    )
    outcome = trials.prove(task, limits=_limits(course, left), threads=course.threads)
    if outcome.fault:
        return Trial(recipe, "failed", key, artifact=str(folder), failure=outcome.fault, log=outcome.log)
    proof = msgspec.convert(outcome.value, Proof)
    found = Trial(recipe, "ok", key, artifact=str(folder), verdict=proof.verdict, timing=proof.timing)
    return _status(found)


def _judged_again(trial: Trial, course: Course) -> Trial:
    """A cached trial under today's limits: the numbers hold, the verdict may not."""
    if trial.verdict is None or trial.status == "failed" or trial.verdict.error >= HOPELESS:
        return trial
    raw = msgspec.structs.replace(trial.verdict, passed=True, reason="")
    verdict = judge(raw, guard=course.guard, recipe=trial.recipe)
    return _status(msgspec.structs.replace(trial, verdict=verdict))


def _status(trial: Trial) -> Trial:
    assert trial.verdict is not None  # noqa: S101  # only proven trials come here
    if trial.verdict.passed:
        return msgspec.structs.replace(trial, status="ok", failure="")
    return msgspec.structs.replace(trial, status="refused", failure=f"guard: {trial.verdict.reason}")
