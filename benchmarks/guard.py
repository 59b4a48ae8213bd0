"""Whether the guard's label-free estimate holds: against the true loss of accuracy, on pictures with labels.

    python -m benchmarks.guard                     three small classifiers, about a hundred candidates, some minutes
    python -m benchmarks.guard --judge 256         fewer rows without labels

Each candidate is a classifier of Fashion-MNIST with rounded weights and activations, or spoiled on purpose. The guard
sees its scores on `--judge` pictures and no label; the true drop is taken on all pictures that no training has seen.
A scatter plot of drop and bound is written beside the weights. Last line: `covered` is the share whose true drop lies
under the bound, `false_accept` the share of proved candidates that lose more than one point, `false_refuse` the share
refused of those that lose less, `proved_good` the share proved of them, `rank_corr` Spearman's correlation of estimate
and true drop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fashion

_TRAINED = 15_000
_POINT = 0.01
_WEIGHT_BITS = (8, 6, 5, 4, 3)
_INPUT_BITS = (0, 8, 6, 5, 4)
_NETS = ("mlp", "cnn", "deep")


@dataclass(frozen=True)
class Row:
    """One candidate: the true drop, the guard's estimate, bound and verdict."""

    name: str
    true: float
    cost: float
    bound: float
    state: str


def net_of(name: str) -> Any:
    """A classifier of one-channel 28x28 pictures, untrained, from a fixed seed."""
    import torch
    from torch import nn

    torch.manual_seed(len(name))
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    widths = (1, 16, 32) if name == "cnn" else (1, 16, 32, 32, 64)
    layers: list[Any] = []
    for index, (before, after) in enumerate(pairwise(widths)):
        stride = 2 if index < 2 else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(widths[-1] * 16, 10))


def trained(name: str, *, epochs: int) -> Any:
    """The classifier in eval mode, trained once on 15,000 pictures and then from the cache."""
    import torch

    net, path = net_of(name), fashion.cache() / f"guard-{name}-{epochs}.pt"
    if not path.exists():
        pixels, labels = fashion.pictures("train")
        x, y = torch.from_numpy(pixels[:_TRAINED]), torch.from_numpy(labels[:_TRAINED])
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        for epoch in range(epochs):
            for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(128):
                loss = torch.nn.functional.cross_entropy(net(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            print(f"{name}: epoch {epoch + 1}, loss {float(loss.detach()):.3f}", flush=True)
        torch.save(net.state_dict(), path)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def candidates(net: Any) -> Iterator[tuple[str, Any]]:
    """Copies of the net with rounded weights and layer inputs, and some that are spoiled on purpose."""
    import torch

    for bits in _WEIGHT_BITS:
        for inputs in _INPUT_BITS:
            yield f"w{bits}a{inputs}", rounded(net, bits, inputs, per_channel=True)
        yield f"w{bits}a8-tensor", rounded(net, bits, 8, per_channel=False)
    half = rounded(net, 0, 0, per_channel=True)
    yield "bf16", _changed(half, lambda weight: weight.to(torch.bfloat16).to(torch.float32))
    for share in (0.02, 0.1, 0.3):
        yield f"noise{share}", _noisy(net, share)
    yield "dead-channel", _last(net, lambda layer: layer.weight[3].zero_())
    yield "dead-class", _last(net, lambda layer: (layer.weight[6].zero_(), layer.bias[6].sub_(20)))
    yield "two-classes-swapped", _last(net, lambda layer: layer.weight.copy_(layer.weight[[1, 0, *range(2, 10)]]))
    yield "class-4-favoured", _last(net, lambda layer: layer.bias[4].add_(0.3))
    yield "class-4-much-favoured", _last(net, lambda layer: layer.bias[4].add_(1.0))
    yield "smaller-scores", _last(net, lambda layer: (layer.weight.mul_(0.9), layer.bias.mul_(0.9)))


def _noisy(net: Any, share: float) -> Any:
    import torch

    return _changed(net, lambda weight: weight + share * weight.std() * torch.randn_like(weight))


def _last(net: Any, change: Callable[[Any], object]) -> Any:
    import copy

    import torch

    made = copy.deepcopy(net)
    with torch.no_grad():
        change(made[-1])
    return made


def _changed(net: Any, change: Callable[..., Any]) -> Any:
    import copy

    import torch

    torch.manual_seed(0)
    made = copy.deepcopy(net)
    with torch.no_grad():
        for part in made:
            if hasattr(part, "weight") and part.weight.dim() > 1:
                part.weight.copy_(change(part.weight))
    return made


def rounded(net: Any, bits: int, inputs: int, *, per_channel: bool) -> Any:
    """The net with weights of `bits` bits, and inputs of its layers of `inputs` bits (0: as they are)."""

    def weight(value: Any) -> Any:
        if not bits:
            return value
        peak = value.abs().amax(tuple(range(1, value.dim())), keepdim=True) if per_channel else value.abs().max()
        scale = peak.clamp(min=1e-12) / (2 ** (bits - 1) - 1)
        return (value / scale).round() * scale

    def activation(layer: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        low, high = given[0].min().clamp(max=0), given[0].max()
        scale = ((high - low) / (2**inputs - 1)).clamp(min=1e-12)
        return ((((given[0] - low) / scale).round() * scale) + low,)

    made = _changed(net, weight)
    for part in made if inputs else ():
        if hasattr(part, "weight") and part.weight.dim() > 1:
            part.register_forward_pre_hook(activation)
    return made


def answers(net: Any, pixels: Any) -> Any:
    """Scores FP32 [rows, 10], in batches of 1,000."""
    import torch

    with torch.inference_mode():
        return np.concatenate(
            [net(torch.from_numpy(pixels[i : i + 1000])).numpy() for i in range(0, len(pixels), 1000)]
        )


def judged(name: str, *, options: argparse.Namespace) -> list[Row]:
    """All candidates of one net."""
    from torchship.optimize.guard import Guard, judge
    from torchship.optimize.judge import compare
    from torchship.optimize.yardstick import study
    from torchship.recipe import Recipe
    from torchship.tensors import Signature

    (train, train_labels), (test, test_labels) = fashion.pictures("train"), fashion.pictures("t10k")
    blind = train[_TRAINED : _TRAINED + options.judge]
    rest = slice(_TRAINED + options.judge, _TRAINED + options.judge + options.labelled)
    pixels, labels = np.concatenate([test, train[rest]]), np.concatenate([test_labels, train_labels[rest]])
    net = trained(name, epochs=options.epochs)
    signature = Signature.parse("x:FP32[-1,1,28,28] -> y:FP32[-1,10]")
    reference, right = answers(net, blind), answers(net, pixels).argmax(1) == labels
    yards = study([{"y": reference}], signature=signature)
    print(f"{name}: accuracy {right.mean():.4f} on {len(labels)} pictures; judged on {len(blind)}", flush=True)
    found = []
    for label, candidate in candidates(net):
        verdict = compare([{"y": reference}], [{"y": answers(candidate, blind)}], signature=signature, yards=yards)
        verdict = judge(verdict, guard=Guard(), recipe=Recipe(label, {"precision": "int8"}))
        true = float(right.mean() - (answers(candidate, pixels).argmax(1) == labels).mean())
        seen: Any = verdict.evidence
        found.append(Row(f"{name} {label}", true, seen.cost, seen.bound, seen.state))
        points = "".join(f"{100 * value:9.2f}" for value in (true, seen.cost, seen.bound))
        print(f"  {found[-1].name:28}{points}  {seen.state}", flush=True)
    return found


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bound against true drop in points, both not below a hundredth of one; hollow: refused."""
    from torchship.optimize import plots

    def points(value: float) -> float:
        return max(100 * value, 0.01)

    marks = [
        plots.Mark(
            row.name,
            [(points(row.true), points(row.bound))],
            1 + _NETS.index(row.name.split()[0]),
            hollow=row.state == "refused",
        )
        for row in rows
    ]
    style = (Path(plots.__file__).parent / "templates" / "report.css").read_text()
    svg = str(plots.plot(marks, x_title="true drop, points", y_title="bound without labels, points"))
    head, _, body = svg.partition(">")
    path.write_text(f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{body}')


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--judge", type=int, default=512, help="pictures that the guard sees, without labels")
    parser.add_argument("--labelled", type=int, default=5_000, help="pictures beside the test's for the true drop")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--nets", default=",".join(_NETS))
    options = parser.parse_args(arguments)
    rows = [row for name in options.nets.split(",") for row in judged(name, options=options)]
    path = fashion.cache() / "guard.svg"
    plot(rows, path)
    print(f"plot: {path}")
    proved = [row for row in rows if row.state == "proved"]
    good = [row for row in rows if row.true <= _POINT]
    ranks = [
        np.argsort(np.argsort(values)).astype(float) for values in ([r.true for r in rows], [r.cost for r in rows])
    ]
    print(
        f"candidates={len(rows)} covered={np.mean([row.true <= row.bound for row in rows]):.3f} "
        f"false_accept={np.mean([row.true > _POINT for row in proved]) if proved else 0:.3f} "
        f"false_refuse={np.mean([row.state == 'refused' for row in good]) if good else 0:.3f} "
        f"proved_good={np.mean([row.state == 'proved' for row in good]) if good else 0:.3f} "
        f"rank_corr={np.corrcoef(ranks[0], ranks[1])[0, 1]:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
