"""Pruning against a narrower network: MobileNetV3-Large on Fashion-MNIST, three seeds, the same training budget.

    python -m benchmarks.prune                         train, then measure; on two cores some hours
    python -m benchmarks.prune --quick                 few pictures and epochs: shows that it runs, and nothing else
    python -m benchmarks.prune --device cuda --train-only --out FOLDER        on a card: some minutes
    python -m benchmarks.prune --out FOLDER            measure here what was trained there

The stem is torchvision's for one channel without its stride, since pictures have 28x28 pixels. The original trains
first; it is the teacher of both others. *pruned* loses channels of the original in rounds, with training after each;
*narrow* is the same network with so much smaller a width that it takes no fewer multiplications, trained from scratch
for as many epochs, by the same teacher. Accuracies are those of the 10,000 test pictures after the last epoch: nothing
is chosen by them. Latency is ONNX Runtime's at batch 1. What was trained is kept, and used again.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fashion

CUT = 0.58
RIVALS = ("original", "narrow", "pruned")
_ROWS = 512
_RATE = 0.4
_DECAY = 2e-5
_PEAK = 0.2  # of the steps the rate rises for
_SOFT = 2.0
_TOLD = Path(__file__).parent / "results" / "prune.json"


def network(width: float = 1.0) -> Any:
    """MobileNetV3-Large for pictures of 28x28 in one channel; random weights."""
    import torch
    from torchvision.models.mobilenetv3 import MobileNetV3, _mobilenet_v3_conf

    settings, last = _mobilenet_v3_conf("mobilenet_v3_large", width_mult=width)
    net: Any = MobileNetV3(settings, last, num_classes=10, dropout=0.2)
    stem = net.features[0][0]
    net.features[0][0] = torch.nn.Conv2d(1, stem.out_channels, 3, padding=1, bias=False)
    return net


def narrower(flops: float) -> float:
    """The largest width, in steps of 0.01, that takes at most so many multiplications."""
    import torch

    from torchship.optimize.pruning import flops_of

    one = torch.zeros(1, 1, 28, 28)
    return next(w / 100 for w in range(100, 5, -1) if flops_of(network(w / 100).eval(), (one,)) <= flops)


class Trainer:
    """SGD with one cycle of the rate on mirrored and shifted pictures; on a card each step is one CUDA graph."""

    def __init__(self, *, device: str, rows: int) -> None:
        import torch

        self.device = device
        pixels, labels = fashion.pictures("train")
        self.x = torch.from_numpy(pixels[:rows]).to(device)
        self.y = torch.from_numpy(labels[:rows]).to(device)
        test, right = fashion.pictures("t10k")
        self.test, self.right = torch.from_numpy(test).to(device), torch.from_numpy(right).to(device)

    def train(self, net: Any, *, epochs: int, teacher: Any = None, peak: float = _RATE) -> None:
        """Train `net` in place, by the labels and, where there is a teacher, half by its softened answers."""
        import torch

        net.train().to(self.device, memory_format=torch.channels_last)
        for part in net.modules():  # fresh leaves: those that had gradients are bound to the stream of that time
            for name, weight in part.named_parameters(recurse=False):
                setattr(part, name, torch.nn.Parameter(weight.detach().clone()))
        rows = min(_ROWS, len(self.x))
        steps = len(self.x) // rows
        weights = [p for p in net.parameters() if p.requires_grad]
        speeds = [torch.zeros_like(p) for p in weights]
        rate = torch.zeros((), device=self.device)
        which = torch.zeros(rows, dtype=torch.long, device=self.device)

        def step() -> None:
            given = _varied(self.x[which]).contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda", cache_enabled=False):
                answer = net(given)
                loss = torch.nn.functional.cross_entropy(answer.float(), self.y[which], label_smoothing=0.05)
                if teacher is not None:
                    with torch.no_grad():
                        soft = torch.softmax(teacher(given).float() / _SOFT, -1)
                    log = torch.log_softmax(answer.float() / _SOFT, -1)
                    loss = 0.5 * loss + 0.5 * _SOFT**2 * torch.nn.functional.kl_div(log, soft, reduction="batchmean")
            slopes = torch.autograd.grad(loss, weights)
            with torch.no_grad():  # Nesterov's momentum
                slopes = torch._foreach_add(slopes, weights, alpha=_DECAY)
                torch._foreach_mul_(speeds, 0.9)
                torch._foreach_add_(speeds, slopes)
                moves = torch._foreach_add(slopes, speeds, alpha=0.9)
                torch._foreach_mul_(moves, rate)
                torch._foreach_sub_(weights, moves)

        run = _graph(step) if self.device == "cuda" else step
        for epoch in range(epochs):
            order = torch.randperm(len(self.x), device=self.device)
            for number in range(steps):
                done = (epoch + number / steps) / epochs
                rate.fill_(peak * min(done / _PEAK, 0.5 + 0.5 * np.cos(np.pi * max(0.0, done - _PEAK) / (1 - _PEAK))))
                which.copy_(order[number * rows : (number + 1) * rows])
                run()
        net.eval()

    def accuracy(self, net: Any) -> float:
        """Per cent of the test pictures, in fp32."""
        import torch

        net.eval()
        with torch.inference_mode():
            found = torch.cat([net(self.test[i : i + 1000]).argmax(1) for i in range(0, len(self.test), 1000)])
        return float((found == self.right).float().mean()) * 100

    def loss(self, net: Any) -> Any:
        """Of a few thousand training pictures, for the importance of channels."""
        import torch

        rows = torch.arange(min(2048, len(self.x)), device=self.device)
        return torch.nn.functional.cross_entropy(net(self.x[rows]), self.y[rows])


def _graph(step: Callable[[], None]) -> Callable[[], None]:
    import torch

    aside: Any = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # with a rate of zero: weights stay, statistics of norms see a few batches more
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _varied(x: Any) -> Any:
    """Each picture mirrored with even odds and shifted by up to two pixels."""
    import torch

    rows = len(x)
    flip = torch.rand(rows, device=x.device) < 0.5
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    down, across = (torch.randint(-2, 3, (rows, 1), device=x.device) for _ in range(2))
    at = torch.arange(28, device=x.device)[None]
    y_at, x_at = (at - down) % 28, (at - across) % 28
    picked = x[torch.arange(rows, device=x.device)[:, None, None], 0, y_at[:, :, None], x_at[:, None, :]]
    return picked[:, None]


def train(seed: int, *, out: Path, epochs: int, rounds: int, between: int, trainer: Trainer) -> None:
    """All rivals of one seed into `out`; what is there stays."""
    import msgspec
    import torch
    from safetensors.torch import load_file, save_file

    from torchship.optimize import pruning
    from torchship.optimize.channels import ChannelMap, Prune

    def made(name: str, net: Any, work: Callable[[Any], None]) -> Any:
        place = out / f"{name}-{seed}"
        if not place.with_suffix(".json").is_file():
            began = time.monotonic()
            work(net)
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, place.with_suffix(".safetensors"))
            told = {"accuracy": trainer.accuracy(net), "seconds": time.monotonic() - began}
            place.with_suffix(".json").write_text(json.dumps(told))
            print(f"seed {seed} {name:10} {told['accuracy']:.2f} % after {told['seconds']:.0f} s", flush=True)
        channels = out / f"{name}-{seed}.channels"
        if channels.is_file():
            fresh = network()
            net = pruning.narrow(fresh, msgspec.json.decode(channels.read_bytes(), type=ChannelMap))
        net.load_state_dict(load_file(place.with_suffix(".safetensors")))
        return net.eval().to(trainer.device)

    torch.manual_seed(seed)
    teacher = made("original", network(), lambda net: trainer.train(net, epochs=epochs))
    for weight in teacher.parameters():
        weight.requires_grad_(False)
    one = torch.zeros(1, 1, 28, 28, device=trainer.device)
    whole = pruning.flops_of(teacher, (one,))
    wish = Prune(CUT, rounds=rounds, importance="taylor")
    budget = rounds * between + epochs

    def prune(net: Any) -> None:
        found: ChannelMap = {}
        for left in pruning.ends(whole, wish=wish):
            found = pruning.prune(net, (one,), flops=left, wish=wish, loss=trainer.loss, known=found)
            trainer.train(net, epochs=between, teacher=teacher, peak=_RATE / 4)
        (out / f"pruned-{seed}.channels").write_bytes(msgspec.json.encode(found))
        trainer.train(net, epochs=epochs, teacher=teacher, peak=_RATE / 2)

    made("pruned", copy.deepcopy(teacher), prune)
    torch.manual_seed(seed + 100)
    width = narrower(whole * (1 - CUT))
    narrow = network(width).to(trainer.device)
    made("narrow", narrow, lambda net: trainer.train(net, epochs=budget, teacher=teacher))


def opened(name: str, seed: int, out: Path) -> Any:
    """A rival as it was trained, in eval mode, from its state dict and, where it was pruned, its channel map."""
    import msgspec
    import torch
    from safetensors.torch import load_file

    from torchship.optimize import pruning
    from torchship.optimize.channels import ChannelMap

    weights = load_file(out / f"{name}-{seed}.safetensors")
    net = network()
    if name == "narrow":
        one = torch.zeros(1, 1, 28, 28)
        net = network(narrower(pruning.flops_of(net.eval(), (one,)) * (1 - CUT)))
    elif name == "pruned":
        data = (out / f"pruned-{seed}.channels").read_bytes()
        pruning.narrow(net, msgspec.json.decode(data, type=ChannelMap))
    net.load_state_dict(weights)
    return net.eval()


def artifacts(name: str, seed: int, out: Path, place: Path) -> dict[str, Any]:
    """The rival as fp32 and int8 artifacts of ONNX Runtime, calibrated on training pictures."""
    from dataclasses import replace

    import torch

    from torchship import plugins
    from torchship.artifact import open_artifact, package
    from torchship.artifact.manifest import Provenance
    from torchship.optimize.capture import capture
    from torchship.recipe import Recipe

    x, _ = fashion.pictures("train")
    model = capture(opened(name, seed, out), torch.from_numpy(x[:2]), name=name)
    (spec,) = model.signature.inputs
    model = replace(model, calibration=[{spec.name: x[start : start + 32]} for start in range(0, 1024, 32)])
    recipes = {
        "fp32": Recipe("onnxruntime", {"precision": "fp32"}),
        "int8": Recipe("onnxruntime", {"precision": "int8", "range": "mse", "bias_correction": True}),
    }
    found = {}
    for word, recipe in recipes.items():
        folder = place / f"{name}-{seed}-{word}"
        (folder / "backend").mkdir(parents=True)
        plugins.load("backends", name=recipe.backend).build(model, options=recipe.options, out=folder / "backend")
        origin = Provenance(torchship="benchmark", created="", source=name, model_hash="", packages={})
        facts: dict[str, Any] = {"signature": model.signature, "recipe": recipe, "provenance": origin}
        package.pack(folder, name=name, inputs=model.examples[0], max_batch=model.signature.max_rows, **facts)
        found[word] = open_artifact(folder)
    return found


def measure(seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """One row for each seed, rival and precision: accuracy of the artifact, multiplications, size, latency in turns."""
    import torch

    from torchship.optimize import pruning

    test, right = fashion.pictures("t10k")
    one = torch.zeros(1, 1, 28, 28)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="torchship-prune-") as place:
        for seed in seeds:
            stages: dict[tuple[str, str], Any] = {}
            for name in RIVALS:
                flops = pruning.flops_of(opened(name, seed, out), (one,))
                for word, artifact in artifacts(name, seed, out, Path(place)).items():
                    stage = artifact.open(threads=2)
                    stages[name, word] = stage
                    given, answers = (spec[0].name for spec in (stage.signature.inputs, stage.signature.outputs))
                    parts = (stage({given: test[i : i + 64]})[answers].argmax(1) for i in range(0, len(test), 64))
                    accuracy = float((np.concatenate(list(parts)) == right).mean()) * 100
                    size = sum(file.stat().st_size for file in (artifact.path / "backend").rglob("*") if file.is_file())
                    rows.append({"seed": seed, "rival": name, "precision": word, "accuracy": accuracy,
                                 "mflops": flops / 1e6, "mb": size / 1e6})  # fmt: skip
            for row, ms in zip(rows[-len(stages) :], _in_turns(list(stages.values()), test[:1]), strict=True):
                row["ms"] = ms
            for stage in stages.values():
                stage.close()
    return rows


def _in_turns(stages: Sequence[Any], picture: Any) -> list[float]:
    """The median milliseconds of each at batch 1, over rounds in which every one has its turn."""
    given = {stages[0].signature.inputs[0].name: picture}
    times: list[list[float]] = [[] for _ in stages]
    for number in range(30):
        for stage, kept in zip(stages, times, strict=True):
            for _ in range(5):
                stage(given)
            began = time.perf_counter()
            for _ in range(20):
                stage(given)
            if number:
                kept.append((time.perf_counter() - began) * 50)
    return [float(np.median(kept)) for kept in times]


def told(rows: Sequence[dict[str, Any]]) -> str:
    """The table and the line for machines: means over the seeds."""

    def mean(rival: str, precision: str, key: str) -> float:
        return float(np.mean([row[key] for row in rows if (row["rival"], row["precision"]) == (rival, precision)]))

    lines = [f"{'rival':10}{'':6}{'accuracy':>9}{'MFLOPs':>8}{'ms':>8}{'MB':>7}   seeds"]
    for rival in RIVALS:
        for word in ("fp32", "int8"):
            each = [f"{row['accuracy']:.2f}" for row in rows if (row["rival"], row["precision"]) == (rival, word)]
            a, f, ms, mb = (mean(rival, word, key) for key in ("accuracy", "mflops", "ms", "mb"))
            lines.append(f"{rival:10}{word:6}{a:9.2f}{f:8.2f}{ms:8.3f}{mb:7.2f}   {' '.join(each)}")
    original, pruned = (mean(rival, "fp32", "accuracy") for rival in ("original", "pruned"))
    last = {
        "flops_cut": 1 - mean("pruned", "fp32", "mflops") / mean("original", "fp32", "mflops"),
        "accuracy_drop": original - pruned,
        "latency_x": mean("original", "fp32", "ms") / mean("pruned", "fp32", "ms"),
        "vs_narrow_points": pruned - mean("narrow", "fp32", "accuracy"),
        "int8_accuracy_drop": pruned - mean("pruned", "int8", "accuracy"),
    }
    return "\n".join([*lines, " ".join(f"{key}={value:.3f}" for key, value in last.items())])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="which")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to train")
    parser.add_argument("--epochs", type=int, default=20, help="of the original, and of the last training")
    parser.add_argument("--rounds", type=int, default=4, help="of pruning")
    parser.add_argument("--between", type=int, default=4, help="epochs after each round")
    parser.add_argument("--rows", type=int, default=60000, help="training pictures")
    parser.add_argument("--out", type=Path, default=None, help="the folder of what is trained")
    parser.add_argument("--train-only", action="store_true", help="leave the measuring to another machine")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, few pictures: no result")
    options = parser.parse_args(arguments)
    import torch

    if options.quick:
        options.seeds, options.epochs, options.rounds, options.between, options.rows = "0", 1, 2, 1, 2048
    out = options.out or fashion.cache() / ("prune-quick" if options.quick else "prune")
    out.mkdir(parents=True, exist_ok=True)
    seeds = [int(word) for word in options.seeds.split(",")]
    if len(seeds) > 1 and options.device == "cuda":  # one card has room for all
        shared = [
            f"--{key}={getattr(options, key)}" for key in ("epochs", "rounds", "between", "rows", "out", "device")
        ]
        asked = [sys.executable, "-m", "benchmarks.prune", *shared, "--train-only"]
        running = [subprocess.Popen([*asked, "--seeds", str(seed)]) for seed in seeds]
        if any(list(map(subprocess.Popen.wait, running))):  # all are waited for
            raise SystemExit("training failed")
    else:
        torch.set_num_threads(2)
        trainer = Trainer(device=options.device, rows=options.rows)
        for seed in seeds:
            train(seed, out=out, epochs=options.epochs, rounds=options.rounds, between=options.between, trainer=trainer)
        del trainer
    if options.train_only:
        return 0
    rows = measure(seeds, out)
    if not options.quick:
        _TOLD.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=1))
    print(told(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
