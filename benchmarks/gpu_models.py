"""The models of benchmarks.gpu, and what an expert writes for them by hand."""

from __future__ import annotations

import copy
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BATCHES = (1, 8, 64, 256)
MODELS = ("resnet50", "mobilenet_v3_large", "vit_b_16", "bert", "lstm", "fasterrcnn")
_LENGTH = 128  # tokens of a sentence, frames of a sound
_SETTLED = 23  # runs of one figure, of which the first three do not count


@functools.cache
def module(name: str) -> Any:
    """The eager module with random weights, batch norms settled on noise, so that half precision is realistic."""
    import torch

    torch.manual_seed(0)
    if name == "bert":
        import transformers

        config = transformers.BertConfig(
            num_hidden_layers=6, hidden_size=384, num_attention_heads=6, intermediate_size=1536
        )
        return _FirstOutput(transformers.BertModel(config)).eval()
    if name == "lstm":
        return _FirstOutput(torch.nn.LSTM(64, 128, num_layers=2, batch_first=True)).eval()
    import torchvision

    if name == "fasterrcnn":
        return torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    made = torchvision.models.get_model(name, weights=None)
    if hasattr(made, "heads"):
        torch.nn.init.normal_(made.heads.head.weight, std=0.02)  # zeros otherwise, and then all answers are alike
    made.train()
    with torch.no_grad():
        for _ in range(2):
            made(torch.randn(8, 3, 224, 224))
    return made.eval()


def _first_output() -> Any:
    import torch

    class FirstOutput(torch.nn.Module):
        """Of several outputs the first."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """What the inner module gives first."""
            answer: torch.Tensor = self.inner(x)[0]
            return answer

    return FirstOutput


def _FirstOutput(inner: Any) -> Any:  # noqa: N802  # reads as the class that it makes
    return _first_output()(inner)


def inputs(name: str, rows: int, *, seed: int = 1) -> np.ndarray[Any, Any]:
    """`rows` inputs of a model: token numbers, or noise."""
    draw = np.random.default_rng(seed)
    if name == "bert":
        return draw.integers(0, 30_000, (rows, _LENGTH))
    shape = {"lstm": (rows, _LENGTH, 64), "fasterrcnn": (rows, 3, 480, 640)}.get(name, (rows, 3, 224, 224))
    if name == "fasterrcnn":
        return draw.random(shape, dtype=np.float32)
    return draw.standard_normal(shape, dtype=np.float32)


def batches(name: str) -> Sequence[int]:
    """The batch sizes that apply."""
    return (1,) if name == "fasterrcnn" else BATCHES


def captured(name: str) -> Any:
    """The model as the search sees it."""
    import torch

    from torchship.optimize.capture import capture
    from torchship.tensors import Free

    if name == "fasterrcnn":
        return capture(module(name), ([torch.from_numpy(inputs(name, 1)[0])],), batched=False, name=name)
    argument = {"mobilenet_v3_large": "x", "resnet50": "x", "vit_b_16": "x"}.get(name, "x")
    free = {argument: {0: Free(1, max(batches(name)), "n")}}
    return capture(module(name), (torch.from_numpy(inputs(name, 2)),), free=free, name=name)


def recipe(name: str) -> Any:
    """What torchship proposes first for this model on a card."""
    from torchship.recipe import Recipe

    if name == "fasterrcnn":
        return Recipe("hybrid", {"device": "cuda", "precision": "fp16"})
    layout = {"channels_last": True} if name in ("resnet50", "mobilenet_v3_large", "vit_b_16") else {}
    return Recipe("kernels", {"device": "cuda", "precision": "fp16", **layout})


def note(text: str) -> None:
    """One line of progress, for who looks why it takes long."""
    print(f"{time.strftime('%X')} {text}", file=sys.stderr, flush=True)


def on_card(run: Callable[[], Any]) -> float:
    """The median milliseconds of `run` by the card's own clock."""
    import torch

    event: Any = torch.cuda.Event
    found = []
    for _ in range(_SETTLED):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return float(np.median(found[3:]))


def on_host(run: Callable[[], Any]) -> float:
    """The median milliseconds of `run` by the host's clock."""
    found = []
    for _ in range(_SETTLED):
        begun = time.perf_counter()
        run()
        found.append((time.perf_counter() - begun) * 1e3)
    return float(np.median(found[3:]))


class ByHand:
    """What an expert writes: eager fp32, half compiled with CUDA graphs and frozen, half in a CUDA graph."""

    def __init__(self, name: str) -> None:
        """Compiles and captures; nothing is timed."""
        import torch
        import torch._inductor.config

        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch._inductor.config.freezing = True
        self.name = name
        self.fp32 = copy.deepcopy(module(name)).cuda()
        self.runs: dict[int, dict[str, Callable[[], Any]]] = {}
        self.sources: dict[int, tuple[Any, Any, Callable[[], Any]]] = {}
        for rows in batches(name):
            note(f"by hand, {rows} rows")
            self.runs[rows] = self._detector() if name == "fasterrcnn" else self._prepared(rows)

    def _detector(self) -> dict[str, Callable[[], Any]]:
        import torch

        x = torch.from_numpy(inputs(self.name, 1)).cuda()

        def eager() -> Any:
            with torch.inference_mode():
                return self.fp32([x[0]])

        def autocast() -> Any:
            with torch.inference_mode(), torch.autocast("cuda", dtype=torch.float16):
                return self.fp32([x[0]])

        return {"eager": eager, "autocast": autocast}

    def _prepared(self, rows: int) -> dict[str, Callable[[], Any]]:
        import torch

        x = torch.from_numpy(inputs(self.name, rows)).cuda()
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        half = copy.deepcopy(module(self.name)).cuda().half().to(memory_format=layout)
        given = x.half().contiguous(memory_format=layout) if x.is_floating_point() else x

        def eager() -> Any:
            with torch.no_grad():
                return self.fp32(x)

        found: dict[str, Callable[[], Any]] = {"eager": eager}
        with torch.no_grad():
            if self.name != "lstm":  # torch leaves LSTMs to cuDNN
                compiled = torch.compile(_alone(half, rows), mode="reduce-overhead", dynamic=False)
                for _ in range(4):
                    compiled(given)

                def run() -> Any:
                    with torch.no_grad():
                        return compiled(given)

                found["compiled"] = run
            aside: Any = torch.cuda.Stream()
            with torch.cuda.stream(aside):
                half(given), half(given)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = half(given)
            found["graph"] = graph.replay
        self.sources[rows] = (given, torch.from_numpy(inputs(self.name, rows)), lambda: answer)
        return found

    def timed(self, rows: int) -> dict[str, float]:
        """Milliseconds on the card, and numpy to numpy for the fastest of them."""
        found = {kind: on_card(run) for kind, run in self.runs[rows].items()}
        if self.name == "fasterrcnn":
            return found
        given, source, answer = self.sources[rows]
        pinned = source.clone().pin_memory()
        best = min(("compiled", "graph"), key=lambda kind: found.get(kind, 1e9))

        def around() -> Any:
            given.copy_(pinned.copy_(source), non_blocking=True)
            replied = self.runs[rows][best]()
            return (answer() if replied is None else replied).float().cpu()

        return found | {"numpy": on_host(around)}


def _alone(half: Any, rows: int) -> Any:
    """A function of its own for each batch size: dynamo would try the sizes of one after the other at every call."""

    def call(given: Any) -> Any:
        return half(given)

    call.__code__ = call.__code__.replace(co_name=f"rows_{rows}")
    return call
