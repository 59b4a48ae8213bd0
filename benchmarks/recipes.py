"""The artifacts that the search chose, against eager and each hand-written best recipe, timed in turns in one run.

    python -m benchmarks.recipes                               all four models, goals latency and throughput
    python -m benchmarks.recipes --models resnet18 --goals latency

`worst_vs_recipe` is the best valid hand-written recipe's time over the chosen artifact's, at its worst: 1 is equal,
bigger is better for us. A recipe is valid when it passes the guard that the search holds its own candidates to.
The search keeps its trials in the cache, and the recipes their files below `benchmarks/recipes` there: the first run
takes most of an hour on two cores, the next some minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks import hand_written, subjects
from benchmarks.contest import Contestant, Failed, race, ratio, ready, start

if TYPE_CHECKING:
    from torchship.optimize.choose import Goal

_SCREEN_SECONDS = 0.3
_HOPELESS = 1.5  # recipes this many times slower than the best leave after the first look


@dataclass(frozen=True)
class Result:
    """One model and goal: speedup over eager, the best valid recipe's time over the chosen one's, size ratio."""

    model: str
    goal: str
    over_eager: float
    over_recipe: float
    best: str
    size_x: float | None


@dataclass
class Field:
    """Who races for one model, and who left with which reason."""

    entered: list[Contestant]
    left: list[tuple[str, str]]
    batches: Sequence[int]

    def enter(self, fresh: Contestant, *, timeout: float, judged: bool) -> None:
        """Build, judge and screen a contestant; who cannot win at any batch size leaves again."""
        try:
            ready(fresh, timeout=timeout)
            if judged and (refused := _refused(fresh)):
                raise Failed(refused)
            for batch in self.batches:
                race([fresh], batch=batch, rounds=1, seconds=_SCREEN_SECONDS)
        except Failed as fault:
            self.left.append((fresh.name, str(fault)))
            fresh.close()
            return
        self.entered.append(fresh)
        print(f"  {fresh.name}: built in {fresh.build_s:.0f} s", flush=True)
        best = {batch: min(one.median(batch) for one in self.entered) for batch in self.batches}
        for one in list(self.entered):
            near = any(one.median(batch) <= best[batch] * _HOPELESS for batch in self.batches)
            if not near and one.name != "eager" and not one.name.startswith("chosen"):
                times = ", ".join(f"{one.median(batch):.1f} ms at batch {batch}" for batch in self.batches)
                self.left.append((one.name, f"{times}: out of the race"))
                self.entered.remove(one)
                one.close()

    def close(self) -> None:
        """End all processes."""
        for contestant in self.entered:
            contestant.close()


def chosen(argument: dict[str, Any]) -> hand_written.Runner:
    """The published artifact, opened as it is served."""
    from torchship.artifact import open_stage

    stage = open_stage(Path(argument["artifact"]), threads=argument["threads"], trust=True)
    (given,), (taken, *_) = stage.signature.inputs, stage.signature.outputs
    return hand_written.Runner(lambda array: stage({given.name: array})[taken.name])


def search(name: str, goal: str, *, folder: Path, options: argparse.Namespace) -> Path:
    """Run the search, and say which recipe won. Returns the published artifact's folder."""
    import torchship
    from torchship.optimize.search import optimize

    started = time.monotonic()
    report = optimize(
        subjects.module(name),
        [torchship.TensorSpec.parse(subjects.signature(name))],
        calibration=subjects.calibration(name),
        goal=cast("Goal", goal),
        threads=options.threads,
        budget=options.budget,
        store=folder / "store",
        name=name,
        on_trial=lambda trial, done, total: print(f"  trial {done}/{total}: {_told(trial)}", flush=True),
    )
    if report.winner is None or report.artifact is None:
        raise SystemExit(f"{name}: the search found no valid recipe")
    print(f"  goal {goal}: {report.winner.recipe.label} after {time.monotonic() - started:.0f} s", flush=True)
    return Path(report.artifact.path)


def _told(trial: Any) -> str:
    from torchship.optimize.report import line

    return line(trial)


def contest(name: str, artifacts: Mapping[str, Path], *, folder: Path, options: argparse.Namespace) -> list[Result]:
    """Build all contestants, drop the hopeless, time the rest in turns; a result for each goal."""
    goals = options.goals.split(",")
    sizes = {"latency": [1], "throughput": options.batches}
    field = Field([], [], sorted({batch for goal in goals for batch in sizes[goal]}))
    argument = {
        "model": name,
        "folder": str(folder),
        "files": str(hand_written.kept()),
        "threads": options.threads,
    }
    entries: list[tuple[str, str, dict[str, Any]]] = [
        (recipe.__name__, "benchmarks.hand_written:build", {"recipe": recipe.__name__})
        for recipe in hand_written.applicable(name)
        if not options.recipes or recipe.__name__ in ("eager", *options.recipes)
    ]
    picked = _picked(artifacts)
    entries[1:1] = [
        (label, "benchmarks.recipes:chosen", {"artifact": str(artifacts[goal])})
        for goal, label in picked.items()
        if label == f"chosen {goal}"
    ]
    try:
        for label, target, extra in entries:
            fresh = start(label, target=target, argument=argument | extra, threads=options.threads)
            field.enter(fresh, timeout=options.timeout, judged=target.startswith("benchmarks.hand_written"))
        for batch in field.batches:
            race(field.entered, batch=batch, rounds=options.rounds, seconds=options.seconds)
        _show(field)
        return [
            _result(name, goal, field, sizes[goal], picked.get(goal, ""), size_x=_size_x(artifacts.get(goal), name))
            for goal in goals
        ]
    finally:
        field.close()


def _picked(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """The contestant of each goal: one where two goals chose the same recipe."""
    from torchship.artifact import open_artifact

    labels: dict[str, str] = {}
    keys = {goal: open_artifact(artifact).manifest.recipe.key for goal, artifact in artifacts.items()}
    return {goal: labels.setdefault(key, f"chosen {goal}") for goal, key in keys.items()}


def _size_x(artifact: Path | None, name: str) -> float | None:
    """How many times smaller an int8 artifact's model files are than the fp32 ONNX file; None for other precisions."""
    onnx = hand_written.kept() / f"{name}.onnx"
    if artifact is None or not onnx.exists():
        return None
    from torchship.artifact import open_artifact
    from torchship.optimize.guard import precision_of

    if precision_of(open_artifact(artifact).manifest.recipe) != "int8":
        return None
    files = [path for path in (artifact / "backend").rglob("*") if path.is_file()]
    return onnx.stat().st_size / sum(path.stat().st_size for path in files)


def _refused(contestant: Contestant) -> str:
    """Why the search's own guard would refuse these outputs, empty when it would not."""
    import msgspec

    from torchship.artifact.manifest import Verdict
    from torchship.optimize.guard import Guard, judge
    from torchship.recipe import Recipe

    found = msgspec.convert(contestant.agreement, Verdict)
    verdict = judge(found, guard=Guard(), recipe=Recipe("", {"precision": contestant.name}))
    return "" if verdict.passed else verdict.reason


def _show(field: Field) -> None:
    batches = field.batches
    print(f"  {'recipe':26}" + "".join(f"{f'b{batch} ms':>10}" for batch in batches) + "   error  cosine  build s")
    for one in sorted(field.entered, key=lambda one: one.median(batches[0])):
        times = "".join(f"{one.median(batch):10.2f}" for batch in batches)
        found = one.agreement
        print(f"  {one.name:26}{times}{found['error']:8.4f}{found['cosine']:8.4f}{one.build_s:9.1f}")
    for label, reason in field.left:
        print(f"  {label:26}  {reason}")


def _result(name: str, goal: str, field: Field, batches: Sequence[int], label: str, *, size_x: float | None) -> Result:
    """Ratios for one goal: within rounds where both are best at the same batch size."""

    def best_batch(one: Contestant) -> int:
        return min(batches, key=lambda batch: one.median(batch) / batch)

    def over(slow: Contestant, fast: Contestant) -> float:
        theirs, own = best_batch(slow), best_batch(fast)
        if theirs == own:
            return ratio(slow, fast, own)
        return (slow.median(theirs) / theirs) / (fast.median(own) / own)

    eager = field.entered[0]
    recipes = [one for one in field.entered if not one.name.startswith("chosen")]
    best = max(recipes, key=lambda one: over(eager, one))
    ours = next((one for one in field.entered if one.name == label), best)
    found = Result(name, goal, over(eager, ours), over(best, ours), best.name, size_x)
    print(f"  goal {goal}: {found.over_eager:.2f}x eager; against {best.name}: {found.over_recipe:.3f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; leaves with a message when a search finds nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(subjects.NAMES), help="encoder, or any classifier of torchvision")
    parser.add_argument("--goals", default="latency,throughput", help="latency (batch 1), throughput, or both")
    parser.add_argument("--batches", default="1,8", help="batch sizes for throughput")
    parser.add_argument("--recipes", default="", help="only these hand-written recipes")
    parser.add_argument("--no-search", action="store_true", help="time the hand-written recipes alone")
    parser.add_argument("--no-contest", action="store_true", help="search alone, to fill the cache")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="a contestant's share of a round")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to build one recipe")
    parser.add_argument("--budget", type=float, default=900, help="seconds for one search")
    options = parser.parse_args(arguments)
    options.batches = [int(part) for part in options.batches.split(",")]
    options.recipes = [part for part in options.recipes.split(",") if part]
    if os.getloadavg()[0] > options.threads / 2:
        print(f"warning: load is {os.getloadavg()[0]:.1f}: torch's threads spin, and suffer most when cores are shared")
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="torchship-recipes-") as place:
        for name in options.models.split(","):
            print(name, flush=True)
            goals = [] if options.no_search else options.goals.split(",")
            artifacts = {goal: search(name, goal, folder=Path(place), options=options) for goal in goals}
            if not options.no_contest:
                results += contest(name, artifacts, folder=Path(place), options=options)
    print(_last_line(results))
    return 0


def _last_line(results: Sequence[Result]) -> str:
    pairs = [f"{result.model}_x={result.over_eager:.2f}" for result in results if result.goal == "latency"]
    sizes = [result.size_x for result in results if result.size_x]
    pairs += [f"size_x={min(sizes):.2f}"] if sizes else []
    pairs += [f"worst_vs_recipe={min(result.over_recipe for result in results):.3f}"] if results else []
    return " ".join(pairs)


if __name__ == "__main__":
    sys.exit(main())
