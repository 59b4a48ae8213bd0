"""Many kinds of models through the search: each ends with a valid artifact or a precise diagnosis, none with a lie.

    python -m benchmarks.zoo                                  all, small inputs
    python -m benchmarks.zoo --models resnet18,lstm --budget 60
    python -m benchmarks.zoo --budget 5                       again: what earlier runs tried comes out of the cache

For each model the published artifact is opened and asked again here, on data that the search has not seen, and its
answers are compared with eager's under the limits of its own recipe. `wrong` counts artifacts beyond three times
their limits. A model that has no artifact counts as diagnosed when every trial that failed says why.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """How one model ended: `state` is optimized, diagnosed or wrong."""

    name: str
    state: str
    speedup: float
    words: str
    seconds: float


def visit(name: str, *, options: argparse.Namespace, folder: Path) -> Row:
    """Search, then ask the artifact again here."""
    import torchship
    from benchmarks import zoo_models
    from torchship.errors import TorchshipError
    from torchship.optimize.capture import capture
    from torchship.optimize.measure import Effort
    from torchship.optimize.search import optimize

    started = time.monotonic()
    try:
        module, specs, unseen = zoo_models.subject(name)
        report = optimize(
            module,
            [torchship.TensorSpec.parse(text) for text in specs],
            calibration=zoo_models.calibration(name),
            backends=options.backends.split(",") if options.backends else None,
            budget=options.budget,
            trial_timeout=max(120.0, options.budget),
            threads=options.threads,
            effort=Effort(seconds=0.3, calls=40, max_batch=4),
            store=folder / "store",
            name=name.replace("_", "-"),
        )
    except TorchshipError as fault:
        return Row(name, "diagnosed", 0.0, fault.line, time.monotonic() - started)
    except Exception as fault:  # a traceback is no diagnosis
        return Row(name, "wrong", 0.0, f"{type(fault).__name__}: {fault}", time.monotonic() - started)
    if report.winner is None or report.artifact is None:
        silent = [trial.recipe.label for trial in report.trials if not (trial.failure or trial.verdict)]
        words = f"no words from {silent}" if silent else report.facts.choice.reason
        return Row(name, "wrong" if silent else "diagnosed", 0.0, words, time.monotonic() - started)
    flat = capture(module, [torchship.TensorSpec.parse(text) for text in specs]).module  # rows first in every output
    fault_found = disagreement(report, flat, unseen, threads=options.threads)
    state = "wrong" if fault_found else "optimized"
    words = fault_found or report.winner.recipe.label
    return Row(name, state, report.speedup, words, time.monotonic() - started)


def disagreement(report: Any, module: Any, unseen: Sequence[Any], *, threads: int) -> str:
    """How the artifact's answers on unseen data differ from eager's, beyond three times its limits; empty if not."""
    import torch

    from torchship import difference
    from torchship.optimize.guard import DRIFT, precision_of
    from torchship.optimize.judge import fault_of

    stage = report.artifact.open(threads=threads, trust=True)
    signature = stage.signature
    with torch.inference_mode():
        eager = module(*unseen)
    given = {spec.name: tensor.numpy() for spec, tensor in zip(signature.inputs, unseen, strict=True)}
    answer = stage(given)
    stage.close()
    expected = {spec.name: tensor.numpy() for spec, tensor in zip(signature.outputs, eager, strict=True)}
    if any(expected[name].size == 0 for name in expected):
        same = all(answer[name].shape == expected[name].shape for name in expected)
        return "" if same else "other shapes than eager on unseen data"
    label, limit = report.winner.recipe.label, 3 * DRIFT[precision_of(report.winner.recipe)]
    if fault := fault_of(expected, answer, signature=signature):
        return f"{label}: {fault} on unseen data"
    error = max(difference.relative_error(expected[name], answer[name]) for name in expected)
    return f"{label}: error {error:.3g} on unseen data" if error > limit else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 1 when a model ended wrong."""
    from benchmarks import zoo_models

    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="all", help=f"names, or all: {', '.join(zoo_models.NAMES)}")
    parser.add_argument("--backends", default="", help="only these, besides eager")
    parser.add_argument("--budget", type=float, default=150, help="seconds for each model's search")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    names = zoo_models.NAMES if options.models == "all" else options.models.split(",")
    rows: list[Row] = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="torchship-zoo-") as place:
            rows.append(visit(name, options=options, folder=Path(place)))
        row = rows[-1]
        print(f"{row.name:40} {row.state:10} {row.speedup:6.2f}x {row.seconds:5.0f} s  {row.words[:160]}", flush=True)
    counts = {state: sum(row.state == state for row in rows) for state in ("optimized", "diagnosed", "wrong")}
    speedups = [row.speedup for row in rows if row.state == "optimized"]
    pairs = [f"models={len(rows)}", *(f"{state}={count}" for state, count in counts.items())]
    print(" ".join([*pairs, f"median_x={statistics.median(speedups) if speedups else 0:.2f}"]))
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
