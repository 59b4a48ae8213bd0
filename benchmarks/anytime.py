"""How good the artifact is after half a minute, one, two and five: the best valid trial so far against the final one.

    python -m benchmarks.anytime                              six models, 300 s each, each from an empty cache
    python -m benchmarks.anytime --models resnet18 --budget 120
    python -m benchmarks.anytime --warm                       what won is learned first, from a search of another net

A row shows the winner's p50 at batch 1 over that of the best valid trial that was finished by then: 1 is as good as
the end, 0 that nothing was valid yet. The time counts from the call of `optimize`. Last line: the worst model and the
median one at 60 seconds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import subjects

_MODELS = (*subjects.NAMES, "vit_b_16", "efficientnet_b0")
_MOMENTS = (30, 60, 120, 300)
_TEACHERS = {"encoder": "vit_b_32", "vit_b_16": "encoder"}  # and resnet34 for what is convolutional


def search(name: str, *, cache: Path, options: argparse.Namespace) -> list[float]:
    """The share of the final speed at each moment."""
    import torchship
    from torchship.optimize.choose import is_valid
    from torchship.optimize.search import optimize

    told: list[tuple[float, str, float]] = []  # seconds, recipe, ms at batch 1 (infinite: not valid, or no more)
    module, inputs = subjects.module(name), [torchship.TensorSpec.parse(subjects.signature(name))]
    calibration = subjects.calibration(name)
    started = time.monotonic()

    def on_trial(trial: Any, done: int, total: int) -> None:
        seconds = time.monotonic() - started
        told.append((seconds, trial.recipe.key, trial.timing.curve[0].p50_ms if is_valid(trial) else math.inf))
        print(f"  {seconds:5.0f} s  {trial.status:8} {trial.recipe.label}", flush=True)

    report = optimize(
        module,
        inputs,
        calibration=calibration,
        threads=options.threads,
        budget=options.budget,
        publish=False,
        cache=cache,
        name=name,
        on_trial=on_trial,
    )
    if report.winner is None or report.winner.timing is None:
        return [0.0] * len(_MOMENTS)
    # close ones were measured again in turns: those figures count, not what they were at first
    final = {trial.recipe.key: trial.timing.curve[0].p50_ms for trial in report.trials if trial.timing}
    best = report.winner.timing.curve[0].p50_ms
    print(f"  won by {report.winner.recipe.label}: {best:.2f} ms", flush=True)
    shares = list[float]()
    for moment in _MOMENTS:
        known = {key: cost for seconds, key, cost in told if seconds <= moment}
        leader = min((key for key, cost in known.items() if cost < math.inf), key=known.__getitem__, default=None)
        shares.append(min(1.0, best / final[leader]) if leader else 0.0)
    return shares


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.anytime", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default=",".join(_MODELS))
    parser.add_argument("--budget", type=float, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="search another net of the kind first, in the same cache")
    options = parser.parse_args(arguments)
    rows: dict[str, list[float]] = {}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory(prefix="torchship-anytime-") as place:
            if options.warm:
                search(_TEACHERS.get(name, "resnet34"), cache=Path(place), options=options)
            print(name, flush=True)
            rows[name] = search(name, cache=Path(place), options=options)
    print(f"{'share of the final speed after':32}" + "".join(f"{moment:6} s" for moment in _MOMENTS))
    for name, shares in rows.items():
        print(f"{name:32}" + "".join(f"{share:8.2f}" for share in shares))
    after = [shares[_MOMENTS.index(60)] for shares in rows.values()]
    print(f"at60_worst={min(after):.2f} at60_median={statistics.median(after):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
