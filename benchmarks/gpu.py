"""On a CUDA card: what torchship ships, against eager and the best written by hand, on the card and served.

    python -m benchmarks.gpu                       everything, in under 8 minutes on an H200
    python -m benchmarks.gpu --models resnet50,lstm --no-served

Every model has a process of its own. First all compile at once, into inductor's cache; then they are measured one
after the other, while nothing compiles. Times on the card are medians by its own clock; `numpy` is a call with arrays
of the host and the answer back on the host, for the hand-written code by one page-locked buffer. `worst_vs_hand` is the
best time by hand over ours, at its worst: 1 is equal, bigger is better for us.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = (1, 8, 64, 256)
MODELS = ("resnet50", "mobilenet_v3_large", "vit_b_16", "bert", "lstm", "fasterrcnn")
RESULTS = Path(__file__).parent / "results" / "gpu.json"
_SETTLED = 23  # runs of one figure, of which the first three do not count
_BUILD_LIMIT_S = 200.0
_MEASURE_LIMIT_S = 150.0
_LENGTH = 128  # tokens of a sentence, frames of a sound


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


def build(name: str, folder: Path, *, model: Any = None) -> float:
    """Pack our artifact into `folder`; the seconds that it took."""
    from torchship import plugins
    from torchship.artifact import package
    from torchship.artifact.manifest import Provenance

    model = model or captured(name)
    begun = time.perf_counter()
    (folder / "backend").mkdir(parents=True)
    wanted = recipe(name)
    plugins.load("backends", name=wanted.backend).build(model, options=wanted.options, out=folder / "backend")
    seconds = time.perf_counter() - begun
    origin = Provenance(torchship="benchmark", created="", source=name, model_hash="", packages={})
    facts: dict[str, Any] = {"signature": model.signature, "recipe": wanted, "provenance": origin}
    package.pack(folder, name=name, inputs=model.examples[0], max_batch=model.signature.max_rows, **facts)
    return seconds


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


def by_hand(name: str, rows: int, *, only_compile: bool = False) -> dict[str, float]:
    """Milliseconds of what an expert writes: eager fp32, half compiled with CUDA graphs, half in a CUDA graph."""
    import torch
    import torch._inductor.config

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch._inductor.config.freezing = True
    fp32 = module(name).cuda()
    x = torch.from_numpy(inputs(name, rows)).cuda()
    found: dict[str, float] = {}
    if name == "fasterrcnn":
        with torch.inference_mode():
            found["eager"] = on_card(lambda: fp32([x[0]]))
            with torch.autocast("cuda", dtype=torch.float16):
                found["autocast"] = on_card(lambda: fp32([x[0]]))
        return found
    picture = x.dim() == 4
    layout = torch.channels_last if picture else torch.contiguous_format
    half = module(name).cuda().half().to(memory_format=layout)
    given = x.half().contiguous(memory_format=layout) if x.is_floating_point() else x
    with torch.no_grad():
        if name != "lstm":  # torch leaves LSTMs to cuDNN
            compiled = torch.compile(half, mode="reduce-overhead")
            for _ in range(4):
                compiled(given)
            if only_compile:
                return {}
            found["compiled"] = on_card(lambda: compiled(given))
        aside: Any = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            half(given), half(given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = half(given)
        found["graph"] = on_card(graph.replay)
        found["eager"] = on_card(lambda: fp32(x))
        pinned, host = torch.from_numpy(inputs(name, rows)).pin_memory(), inputs(name, rows)
        source = torch.from_numpy(host)

        def around() -> Any:
            given.copy_(pinned.copy_(source), non_blocking=True)
            if found.get("compiled", 1e9) < found["graph"]:
                return compiled(given).float().cpu()
            graph.replay()
            return answer.float().cpu()

        found["numpy"] = on_host(around)
    torch._dynamo.reset()
    return found


def measure(name: str) -> dict[str, Any]:
    """All figures of one model."""
    import torch

    from torchship.artifact import open_artifact

    rows_of: dict[int, dict[str, Any]] = {rows: by_hand(name, rows) for rows in batches(name)}
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / name
        model = captured(name)
        found: dict[str, Any] = {"build_s": build(name, folder, model=model), "signature": str(model.signature)}
        plan = folder / "backend" / "kernels.json"
        found["kinds"] = json.loads(plan.read_text())["sizes"] if plan.is_file() else {}
        begun = time.perf_counter()
        code = "from torchship.artifact import open_artifact as o; import sys; a = o(sys.argv[1]); a.open(trust=True)"
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
        found["reopen_s"] = time.perf_counter() - begun
        stage: Any = open_artifact(folder).open(trust=True)
        reference = module(name)
        for rows, row in rows_of.items():
            array = inputs(name, rows)
            given = {spec.name: array[0] if name == "fasterrcnn" else array for spec in stage.signature.inputs}
            answer = next(iter(stage(given).values()))
            if name == "fasterrcnn":
                row["ours"] = row["ours_numpy"] = on_host(lambda given=given: stage(given))  # type: ignore[misc]
            else:
                with torch.no_grad():
                    expected = reference(torch.from_numpy(array[:8])).numpy()
                row["error"] = float(np.linalg.norm(answer[:8] - expected) / np.linalg.norm(expected))
                row["ours_numpy"] = on_host(lambda given=given: stage(given))  # type: ignore[misc]
                sizes = {shapes[0][0]: kept.graph for shapes, kept in stage._captured.items()}
                row["size"] = min(size for size in sizes if size >= rows)
                row["ours"] = on_card(sizes[row["size"]].replay)
            hand = min(value for key, value in row.items() if key in ("compiled", "graph", "autocast", "eager"))
            row["vs_hand"] = hand / row["ours"]
        found["stall_ms"] = 0.0 if name == "fasterrcnn" else stall(stage, name)
        stage.close()
    return found | {"batches": rows_of}


def stall(stage: Any, name: str) -> float:
    """The longest call of one with each number of rows up to 64, none of which was seen before, in milliseconds."""
    (spec,) = stage.signature.inputs
    longest = 0.0
    for rows in range(1, 65):
        array = inputs(name, rows)
        begun = time.perf_counter()
        stage({spec.name: array})
        longest = max(longest, (time.perf_counter() - begun) * 1e3)
    return longest


def served() -> dict[str, Any]:
    """resnet50 that takes UINT8 pictures and normalizes them on the card, behind REST and gRPC."""
    import torch

    from torchship.artifact import open_artifact
    from torchship.optimize.capture import capture
    from torchship.tensors import Free

    class Normalized(torch.nn.Module):
        """Pictures as bytes."""

        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            """`image` UINT8 [n, 3, h, w]."""
            answer: torch.Tensor = self.inner((image.float() - 118.0) / 58.0)
            return answer

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        example = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
        free = {"image": {0: Free(1, 64, "n")}}
        model = capture(Normalized(module("resnet50")), (example,), free=free, name="pictures")
        build("resnet50", folder, model=model)
        stage: Any = open_artifact(folder).open(trust=True)
        full = np.zeros((64, 3, 224, 224), np.uint8)
        loop = on_host(lambda: stage({"image": full}))
        stage.close()
        torch.cuda.empty_cache()
        found: dict[str, Any] = {"loop_per_s": 64e3 / loop}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "torchship", "serve", str(folder), "--trust", "--http-port", str(port)]
        server = subprocess.Popen([*command, "--log-level", "warning"])
        try:
            _wait(port, server)
            for door, rows, callers in (("http", 1, "1,64"), ("grpc", 1, "64"), ("http", 64, "4")):
                url = f"{door}://127.0.0.1:{port}/resnet50"
                asked = [sys.executable, "-m", "torchship", "bench", url, "--concurrency", callers, "--rows", str(rows)]
                told = subprocess.run([*asked, "--seconds", "4", "--json"], check=True, capture_output=True, text=True)
                found[f"{door}_{rows}"] = json.loads(told.stdout)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    return found


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    import urllib.request

    end = time.monotonic() + 90
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not become ready")


def child(name: str, *, phase: str) -> subprocess.Popen[str]:
    """This program for one model and one phase; its last line is JSON."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--one", name, "--phase", phase]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str], limit: float) -> dict[str, Any]:
    """What a child found; its last words where it failed."""
    try:
        out, words = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"fault": f"not finished after {limit:.0f} s"}
    if process.returncode:
        return {"fault": " / ".join(words.strip().splitlines()[-3:]) or f"exit code {process.returncode}"}
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def one(name: str, phase: str) -> dict[str, Any]:
    """The work of a child."""
    if phase == "measure":
        return served() if name == "served" else measure(name)
    if name not in ("served", "fasterrcnn"):
        with tempfile.TemporaryDirectory() as place:
            build(name, Path(place) / name)
        for rows in batches(name):
            by_hand(name, rows, only_compile=True)
    return {}


def told(results: dict[str, dict[str, Any]]) -> str:
    """The table, and the line for machines."""
    heads = ("eager", "compiled", "graph", "ours", "vs hand", "numpy", "ours", "error")
    lines = [f"{'model':20}{'batch':>6}" + "".join(f"{head:>9}" for head in heads)]
    worst: list[float] = []
    for name, found in results.items():
        if "fault" in found:
            lines.append(f"{name:20} {found['fault']}")
        for rows, row in found.get("batches", {}).items():
            cells = [
                row.get(key)
                for key in ("eager", "compiled", "graph", "ours", "vs_hand", "numpy", "ours_numpy", "error")
            ]
            text = "".join(f"{'-' if cell is None else format(cell, '.4g'):>9}" for cell in cells)
            lines.append(f"{name:20}{rows:>6}{text}")
            worst.append(row["vs_hand"])
        if "build_s" in found:
            opened = f"build {found['build_s']:.0f} s, opens in {found['reopen_s']:.1f} s"
            lines.append(f"{'':20} {opened}, longest first call {found['stall_ms']:.1f} ms, {found['kinds']}")
    resnet = results.get("resnet50", {}).get("batches", {})
    door = results.get("served", {})
    last = {
        "worst_vs_hand": f"{min(worst, default=0):.2f}",
        "resnet50_b256_vs_hand": f"{resnet.get('256', resnet.get(256, {})).get('vs_hand', 0):.2f}",
        "resnet50_b1_ms": f"{resnet.get('1', resnet.get(1, {})).get('ours', 0):.3f}",
        "reopen_s": f"{results.get('resnet50', {}).get('reopen_s', 0):.1f}",
        "stall_p99_ms": f"{max((found.get('stall_ms', 0) for found in results.values()), default=0):.1f}",
        "fp16_vs_fp32_x": f"{_gain(resnet):.2f}",
        "loop_per_s": f"{door.get('loop_per_s', 0):.0f}",
    }
    for key in ("http_1", "grpc_1", "http_64"):
        for run in door.get(key, {}).get("runs", []):
            lines.append(f"served {key}: {json.dumps(run)[:300]}")
    return "\n".join([*lines, " ".join(f"{key}={value}" for key, value in last.items())])


def _gain(resnet: dict[Any, Any]) -> float:
    row = resnet.get("64", resnet.get(64, {}))
    return float(row["eager"] / row["ours"]) if row.get("ours") else 0.0


def main() -> None:
    """Compile, measure, tell, and write the file of results."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--models", default=",".join(MODELS), help="which of them")
    asked.add_argument("--served", action=argparse.BooleanOptionalAction, default=True, help="also behind a server")
    asked.add_argument("--out", type=Path, default=RESULTS, help="the file of results")
    asked.add_argument("--one", help=argparse.SUPPRESS)
    asked.add_argument("--phase", help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.phase)))
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs an NVIDIA card and a CUDA build of torch")
    names = given.models.split(",")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="torchship-gpu-"))
    begun = time.monotonic()
    compiling = {name: child(name, phase="compile") for name in names}
    for name, process in compiling.items():
        outcome = finished(process, max(1.0, _BUILD_LIMIT_S - (time.monotonic() - begun)))
        print(f"compiled {name} after {time.monotonic() - begun:.0f} s {outcome.get('fault', '')}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    for name in [*names, *(["served"] if given.served else [])]:
        results[name] = finished(child(name, phase="measure"), _MEASURE_LIMIT_S)
        print(f"measured {name} after {time.monotonic() - begun:.0f} s {results[name].get('fault', '')}", flush=True)
        facts = {
            "card": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"), "results": results,
        }  # fmt: skip
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(json.dumps(facts, indent=1))
    print(told(results))


if __name__ == "__main__":
    main()
