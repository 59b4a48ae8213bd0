"""What int8 costs in accuracy: two classifiers trained here, judged on all test pictures, and a case made to fail.

    python -m benchmarks.accuracy                                trains once for some minutes, then from the cache
    python -m benchmarks.accuracy --train                        train only; what was broken off goes on
    python -m benchmarks.accuracy --epochs 1 --rows 2000 --test 500 --models resnet --no-hard

The search judges on 5,000 held-back training pictures; the test pictures only report. The hard case calibrates on
noise with one scale a tensor: the guard must refuse it, and leaving the worst layers in float must rescue it.
Drops are in percentage points of top-1; `guard_refused` is 1 when the guard refused the plain hard candidate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fashion

_SPEC = "image:FP32[-1,1,28,28]"
_EPOCHS = {"resnet": 5, "mobilenet_v3": 6}


def top1(stage: Any, x: Any, y: Any) -> float:
    """Share of right answers of a Stage, in batches of 250."""
    (given,), (taken, *_) = stage.signature.inputs, stage.signature.outputs
    hits = 0
    for start in range(0, len(x), 250):
        answer = stage({given.name: x[start : start + 250]})[taken.name]
        hits += int((answer.argmax(-1) == y[start : start + 250]).sum())
    return hits / len(x)


def eager_top1(module: Any, x: Any, y: Any) -> float:
    """Share of right answers of the fp32 module."""
    import torch

    with torch.inference_mode():
        parts = [module(torch.from_numpy(x[start : start + 250])).argmax(1).numpy() for start in range(0, len(x), 250)]
    return float((np.concatenate(parts) == y).mean())


def search(
    module: Any, name: str, *, calibration: Sequence[Any], evaluate: Callable[[Any], float], **given: Any
) -> Any:
    """One search over int8 recipes for the smallest file whose accuracy holds."""
    import torchship

    options = given.pop("options")
    return torchship.optimize(
        module,
        [torchship.TensorSpec.parse(_SPEC)],
        calibration=calibration,
        evaluate=evaluate,
        max_drop=0.003,
        goal="size",
        threads=options.threads,
        budget=options.budget,
        name=name,
        on_trial=lambda trial, done, total: print(f"  {_told(trial)}", flush=True),
        **given,
    )


def _told(trial: Any) -> str:
    verdict = trial.verdict
    if verdict is None:
        return f"{trial.status:8} {trial.recipe.label[:100]} {getattr(trial, 'failure', '')}"
    metric = "" if verdict.metric is None else f" top-1 {verdict.metric:.4f}"
    return f"{trial.status:8} {trial.recipe.label[:100]}{metric} error {verdict.error:.3f} {verdict.reason}"


def drop_of(report: Any, module: Any, x: Any, y: Any) -> float:
    """Percentage points that the published artifact loses on the test pictures."""
    before, after = eager_top1(module, x, y), top1(report.artifact.open(threads=2, trust=True), x, y)
    label = report.winner.recipe.label
    print(f"  fp32 {before:.4f}, {label[:100]}: {after:.4f} on {len(x)} test pictures", flush=True)
    return 100 * (before - after)


def easy(name: str, *, options: argparse.Namespace, store: Path) -> float:
    """The drop of a network that is quantized as it should be: real pictures, scales by channel."""
    from torchship.recipe import Recipe

    module, data, judged, test = _prepared(name, options)
    print(f"{name}: int8, calibrated on {sum(map(len, data))} training pictures", flush=True)
    recipes = [Recipe(backend, {"precision": "int8"}) for backend in ("onnxruntime", "openvino")]
    report = search(
        module,
        f"{name}-easy".replace("_", "-"),
        calibration=data,
        evaluate=lambda stage: top1(stage, *judged),
        recipes=recipes,
        store=store,
        options=options,
    )
    return drop_of(report, module, *test)


def hard(name: str, *, options: argparse.Namespace, store: Path) -> tuple[int, float]:
    """Whether the guard refused what was made to fail, and the drop after layers were left out of int8."""
    from torchship.recipe import Recipe

    module, _, judged, test = _prepared(name, options)
    noise = np.random.default_rng(0).standard_normal((128, 1, 28, 28)).astype(np.float32)
    plain = Recipe("onnxruntime", {"precision": "int8", "per_channel": False, "range": "minmax"})
    print(f"{name}: the hard case, calibrated on noise with one scale a tensor", flush=True)
    report = search(
        module,
        f"{name}-hard".replace("_", "-"),
        calibration=[noise[start : start + 32] for start in range(0, 128, 32)],
        evaluate=lambda stage: top1(stage, *judged),
        recipes=[plain],
        store=store,
        options=options,
    )
    refused = int(next(trial for trial in report.trials if trial.recipe == plain).status == "refused")
    left_out = report.winner.recipe.options.get("exclude") if report.winner else None
    if not left_out:
        raise SystemExit(f"{name}: no candidate with layers left out was valid: {report.facts.choice.reason}")
    print(f"  left in float: {', '.join(map(str, left_out))}")
    return refused, drop_of(report, module, *test)


def _prepared(name: str, options: argparse.Namespace) -> tuple[Any, list[Any], tuple[Any, Any], tuple[Any, Any]]:
    """The trained module, calibration batches, what the search judges on, and the test pictures."""
    module = _trained(name, options)
    x, y = fashion.pictures("train")
    held = slice(60000 - fashion.HELD_BACK, 60000 - fashion.HELD_BACK + options.judge)
    test_x, test_y = fashion.pictures("t10k")
    data = [x[start : start + 32] for start in range(0, 512, 32)]
    return module, data, (x[held], y[held]), (test_x[: options.test], test_y[: options.test])


def _trained(name: str, options: argparse.Namespace) -> Any:
    return fashion.trained(name, epochs=options.epochs or _EPOCHS[name], rows=options.rows, say=_say)


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="resnet,mobilenet_v3", help="resnet, mobilenet_v3 or both")
    parser.add_argument("--train", action="store_true", help="train only")
    parser.add_argument("--no-hard", action="store_true", help="leave the hard case out")
    parser.add_argument("--epochs", type=int, default=0, help="training epochs [default: 5 and 6]")
    parser.add_argument("--rows", type=int, default=55000, help="training pictures")
    parser.add_argument("--judge", type=int, default=5000, help="held-back pictures that the search judges on")
    parser.add_argument("--test", type=int, default=10000, help="test pictures that are reported")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=900, help="seconds for one search")
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    started, pairs = time.monotonic(), []
    if options.train:
        for name in options.models.split(","):
            _trained(name, options)
        return 0
    with tempfile.TemporaryDirectory(prefix="torchship-accuracy-") as place:
        for name in options.models.split(","):
            pairs.append(f"{name}_drop={easy(name, options=options, store=Path(place) / 'store'):.3f}")
        if not options.no_hard:
            refused, rescued = hard(options.models.split(",")[-1], options=options, store=Path(place) / "store")
            pairs += [f"guard_refused={refused}", f"rescued_drop={rescued:.3f}"]
    print(f"after {time.monotonic() - started:.0f} s")
    print(" ".join(pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
