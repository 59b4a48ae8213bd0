"""The artifact that the search chose, against eager and each hand-written best recipe, timed in turns in one run.

    python -m benchmarks.recipes                               resnet18 and mobilenet_v3_large, goal latency
    python -m benchmarks.recipes --models all --goals latency,throughput

`worst_vs_recipe` is the best valid hand-written recipe's time over the chosen artifact's, at its worst: 1 is equal,
bigger is better for us. A recipe is valid when it passes the guard that the search holds its own candidates to.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import subjects
from benchmarks.contest import Contestant, Failed, race, ratio, ready, start
from benchmarks.hand_written import Runner, applicable

_SCREEN_SECONDS = 0.5
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


def chosen(argument: dict[str, Any]) -> Runner:
    """The published artifact, opened as it is served."""
    from torchship.artifact import open_stage

    stage = open_stage(Path(argument["artifact"]), threads=argument["threads"], trust=True)
    (given,), (taken, *_) = stage.signature.inputs, stage.signature.outputs
    files = (path for path in (Path(argument["artifact"]) / "backend").rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    return Runner(lambda array: stage({given.name: array})[taken.name], size=size)


def search(name: str, goal: str, *, folder: Path, threads: int, budget: float) -> Path:
    """Run the search, and say which recipe won. Returns the published artifact's folder."""
    import torchship

    started = time.monotonic()
    report = torchship.optimize(
        subjects.module(name),
        [torchship.TensorSpec.parse(subjects.signature(name))],
        calibration=subjects.calibration(name),
        goal=goal,
        threads=threads,
        budget=budget,
        store=folder / "store",
        name=f"{name}-{goal}".replace("_", "-"),
        on_trial=lambda trial, done, total: print(f"  trial {done}/{total}: {trial.recipe.label}", flush=True),
    )
    if report.winner is None or report.artifact is None:
        raise SystemExit(f"{name}: the search found no valid recipe")
    print(f"  search: {report.winner.recipe.label} after {time.monotonic() - started:.0f} s", flush=True)
    return Path(report.artifact.path)


def contest(name: str, goal: str, *, artifact: Path | None, folder: Path, options: argparse.Namespace) -> Result:
    """Build all contestants, drop the hopeless, time the rest in turns."""
    batches = [1] if goal == "latency" else options.batches
    entered: list[Contestant] = []
    rows: list[tuple[str, str]] = []
    argument = {"model": name, "folder": str(folder), "threads": options.threads}
    entries = [
        (recipe.__name__, "benchmarks.hand_written:build", {"recipe": recipe.__name__}) for recipe in applicable(name)
    ]
    if artifact:
        entries.insert(1, ("chosen", "benchmarks.recipes:chosen", {"artifact": str(artifact)}))
    if options.recipes:
        entries = [entry for entry in entries if entry[0] in ("eager", "chosen", *options.recipes)]
    try:
        for label, target, extra in entries:
            fresh = start(label, target=target, argument=argument | extra, threads=options.threads)
            try:
                ready(fresh, timeout=options.timeout)
                refused = "" if label in ("eager", "chosen") else _refused(fresh)
                if refused:
                    raise Failed(refused)
                race([fresh], batch=batches[-1], rounds=1, seconds=_SCREEN_SECONDS)
            except Failed as fault:
                rows.append((label, str(fault)))
                fresh.close()
                continue
            entered.append(fresh)
            entered = _drop_hopeless(entered, batches[-1], rows)
        for batch in batches:
            race(entered, batch=batch, rounds=options.rounds, seconds=options.seconds)
        size_x = _size_x(artifact, folder / f"{name}.onnx")
        return _result(name, goal, entered=entered, rows=rows, batches=batches, size_x=size_x)
    finally:
        for contestant in entered:
            contestant.close()


def _size_x(artifact: Path | None, onnx: Path) -> float | None:
    """How many times smaller an int8 artifact's model files are than the fp32 ONNX file; None for other precisions."""
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
    from torchship.artifact.manifest import Verdict
    from torchship.optimize.guard import Guard, judge
    from torchship.recipe import Recipe

    found = Verdict(passed=True, **contestant.agreement)
    return judge(found, guard=Guard(), recipe=Recipe(contestant.name)).reason


def _drop_hopeless(entered: list[Contestant], batch: int, rows: list[tuple[str, str]]) -> list[Contestant]:
    best = min(contestant.median(batch) for contestant in entered)
    kept = []
    for contestant in entered:
        if contestant.name in ("eager", "chosen") or contestant.median(batch) <= best * _HOPELESS:
            kept.append(contestant)
        else:
            rows.append((contestant.name, f"{contestant.median(batch):.2f} ms at the first look: out of the race"))
            contestant.close()
    return kept


def _result(
    name: str,
    goal: str,
    *,
    entered: Sequence[Contestant],
    rows: Sequence[tuple[str, str]],
    batches: Sequence[int],
    size_x: float | None,
) -> Result:
    eager = entered[0]

    def speed(contestant: Contestant) -> float:
        """Speedup over eager at its best batch: rows per second over rows per second."""
        best_eager = min(batches, key=lambda batch: eager.median(batch) / batch)
        best_own = min(batches, key=lambda batch: contestant.median(batch) / batch)
        if best_eager == best_own:
            return ratio(eager, contestant, best_own)
        return (eager.median(best_eager) / best_eager) / (contestant.median(best_own) / best_own)

    print(
        f"  {'recipe':26}{'x eager':>9}  " + "".join(f"{f'b{b} ms':>10}" for b in batches) + "   error  cosine  build s"
    )
    for contestant in sorted(entered, key=speed, reverse=True):
        found = contestant.agreement
        times = "".join(f"{contestant.median(batch):10.2f}" for batch in batches)
        print(
            f"  {contestant.name:26}{speed(contestant):9.2f}  {times}"
            f"{found['error']:8.4f}{found['cosine']:8.4f}{contestant.build_s:9.1f}"
        )
    for label, reason in rows:
        print(f"  {label:26}        -  {reason}")
    recipes = [contestant for contestant in entered if contestant.name not in ("chosen",)]
    best = max(recipes, key=speed)
    ours = next((contestant for contestant in entered if contestant.name == "chosen"), best)
    over = ratio(best, ours, batches[0]) if len(batches) == 1 else speed(ours) / speed(best)
    return Result(name, goal, speed(ours), over, best.name, size_x)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when a contest could not be held."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--models", default="resnet18,mobilenet_v3_large", help=f"names, or all: {','.join(subjects.NAMES)}"
    )
    parser.add_argument("--goals", default="latency", help="latency (batch 1), throughput (best of --batches), or both")
    parser.add_argument("--batches", default="1,8", help="batch sizes for throughput")
    parser.add_argument("--recipes", default="", help="only these hand-written recipes")
    parser.add_argument("--no-search", action="store_true", help="time the hand-written recipes alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.7, help="a contestant's share of a round")
    parser.add_argument("--timeout", type=float, default=300, help="seconds to build one recipe")
    parser.add_argument("--budget", type=float, default=900, help="seconds for one search")
    options = parser.parse_args(arguments)
    options.batches = [int(part) for part in options.batches.split(",")]
    options.recipes = [part for part in options.recipes.split(",") if part]
    names = subjects.NAMES if options.models == "all" else options.models.split(",")
    if os.getloadavg()[0] > options.threads / 2:
        print(f"warning: load is {os.getloadavg()[0]:.1f}: torch's threads spin, and suffer most when cores are shared")
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="torchship-recipes-") as place:
        for name in names:
            for goal in options.goals.split(","):
                print(f"{name}, goal {goal}", flush=True)
                artifact = None
                if not options.no_search:
                    artifact = search(name, goal, folder=Path(place), threads=options.threads, budget=options.budget)
                results.append(contest(name, goal, artifact=artifact, folder=Path(place), options=options))
                print(f"  chosen against {results[-1].best}: {results[-1].over_recipe:.3f}\n", flush=True)
    print(_last_line(results))
    return 0


def _last_line(results: Sequence[Result]) -> str:
    pairs = [f"{result.model}_x={result.over_eager:.2f}" for result in results if result.goal == "latency"]
    sizes = [result.size_x for result in results if result.size_x]
    pairs += [f"size_x={min(sizes):.2f}"] if sizes else []
    return " ".join([*pairs, f"worst_vs_recipe={min(result.over_recipe for result in results):.3f}"])


if __name__ == "__main__":
    sys.exit(main())
