"""On a CUDA card: what torchship ships, against eager and the best written by hand, on the card and served.

    python -m benchmarks.gpu                       everything, in under 8 minutes on an H200
    python -m benchmarks.gpu --models resnet50,lstm --no-served

Every model has a process of its own. First all compile at once; then they are measured one after the other, while
nothing compiles. Times on the card are medians by its own clock; `numpy` is a call with arrays
of the host and the answer back on the host, for the hand-written code by one page-locked buffer. `worst_vs_hand` is the
best time by hand over ours, at its worst: 1 is equal, bigger is better for us.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.gpu_models import MODELS, ByHand, batches, captured, inputs, module, note, on_card, on_host, recipe

RESULTS = Path(__file__).parent / "results" / "gpu.json"
_COMPILE_LIMIT_S = 240.0
_MEASURE_LIMIT_S = 120.0
_REOPEN_LIMIT_S = 30.0
_MODEL_BYTES = 500 << 20
_LOADS = (  # model, protocol, rows of a request, callers
    ("pictures", "http", 1, 1),
    ("pictures", "http", 1, 64),
    ("pictures", "grpc", 1, 64),
    ("pictures", "http", 64, 4),
    ("pictures", "grpc", 64, 4),
    ("resnet50", "http", 1, 1),
    ("resnet50", "http", 1, 64),
    ("resnet50", "http", 64, 4),
    ("resnet50", "grpc", 64, 4),
)


def build(name: str, folder: Path, *, model: Any, title: str = "") -> float:
    """Pack our artifact into `folder`; the seconds that it took."""
    from torchship import plugins
    from torchship.artifact import package
    from torchship.artifact.manifest import Provenance

    begun = time.perf_counter()
    note("build")
    (folder / "backend").mkdir(parents=True)
    wanted = recipe(name)
    plugins.load("backends", name=wanted.backend).build(model, options=wanted.options, out=folder / "backend")
    seconds = time.perf_counter() - begun
    origin = Provenance(torchship="benchmark", created="", source=name, model_hash="", packages={})
    facts: dict[str, Any] = {"signature": model.signature, "recipe": wanted, "provenance": origin}
    package.pack(folder, name=title or name, inputs=model.examples[0], max_batch=model.signature.max_rows, **facts)
    return seconds


def precompile(model: Any, recipe: Any) -> None:
    """Fill inductor's cache with what `build` will compile."""
    import torch

    from torchship.backends import kernels
    from torchship.lowering import cuda, program, torch_stage

    torch_stage.prepare(device="cuda", threads=0, tf32=False, tune=True)
    exported = program.export(torch_stage.shaped(torch_stage.folded(model), recipe.options), device="cuda")
    (given,) = model.torch_inputs(model.examples[0], device="cuda")
    for size in cuda.batch_sizes(model.signature.max_rows):
        note(f"kernels for {size} rows")
        rows = torch.arange(size, device="cuda") % given.shape[0]
        kernels.compiled(exported, [given[rows]], "from_example_inputs")


def measure(name: str, folder: Path, turn: Callable[[], None]) -> dict[str, Any]:
    """All figures of one model; `turn` is called when all is compiled, and returns when the card is ours alone."""
    import torch

    from torchship.artifact import open_artifact

    note("capture")
    model = captured(name)
    hand = ByHand(name)
    turn()
    rows_of: dict[int, dict[str, Any]] = {rows: hand.timed(rows) for rows in batches(name)}
    del hand
    torch.cuda.empty_cache()
    found: dict[str, Any] = {"build_s": build(name, folder, model=model), "signature": str(model.signature)}
    plan = folder / "backend" / "kernels.json"
    found["kinds"] = json.loads(plan.read_text())["sizes"] if plan.is_file() else {}
    note("open")
    begun = time.perf_counter()
    code = "from torchship.artifact import open_artifact as o; import sys; a = o(sys.argv[1]); a.open(trust=True)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    found["reopen_s"] = time.perf_counter() - begun
    stage: Any = open_artifact(folder).open(trust=True)
    if name != "fasterrcnn":
        stage.settle()
    reference = module(name)
    for rows, row in rows_of.items():
        array = inputs(name, rows)
        given = {spec.name: array[0] if name == "fasterrcnn" else array for spec in stage.signature.inputs}
        answer = next(iter(stage(given).values()))
        row["ours_numpy"] = on_host(lambda given=given: stage(given))  # type: ignore[misc]
        if name == "fasterrcnn":
            row["ours"] = row["ours_numpy"]
        else:
            with torch.no_grad():
                expected = reference(torch.from_numpy(array[:8])).numpy()
            row["error"] = float(np.linalg.norm(answer[:8] - expected) / np.linalg.norm(expected))
            sizes = {shapes[0][0]: kept.graph for shapes, kept in stage._captured.items()}
            row["size"] = min(size for size in sizes if size >= rows)
            row["ours"] = on_card(sizes[row["size"]].replay)
        best = min(value for key, value in row.items() if key in ("compiled", "graph", "autocast", "eager"))
        row["vs_hand"] = best / row["ours"]
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


def pictures() -> Any:
    """resnet50 that takes UINT8 pictures and normalizes them on the card, as the search sees it."""
    import torch

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

    example = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    free = {"image": {0: Free(1, 64, "n")}}
    return capture(Normalized(module("resnet50")), (example,), free=free, name="pictures")


def served(place: Path, turn: Callable[[], None]) -> dict[str, Any]:
    """resnet50 behind REST and gRPC: with UINT8 pictures that are normalized on the card, and with plain tensors."""
    import torch

    from torchship.artifact import open_artifact

    model = pictures()
    turn()
    folder = place / "pictures"
    build("resnet50", folder, model=model, title="pictures")
    stage: Any = open_artifact(folder).open(trust=True)
    full = np.zeros((64, 3, 224, 224), np.uint8)
    found: dict[str, Any] = {"loop_per_s": 64e3 / on_host(lambda: stage({"image": full}))}
    stage.close()
    torch.cuda.empty_cache()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    models = [str(folder), *([str(place / "resnet50")] if (place / "resnet50").is_dir() else [])]
    command = [sys.executable, "-m", "torchship", "serve", *models, "--trust", "--http-port", str(port)]
    server = subprocess.Popen([*command, "--log-level", "warning", *os.environ.get("GPU_SERVE", "").split()])
    try:
        _wait(port, server)
        _wait_for_spares(port, len(models))
        for name, door, rows, callers in _LOADS:
            if not (place / name).is_dir():
                continue
            url = f"{door}://127.0.0.1:{port}/{name}"
            found[f"{name} {door} {rows} x {callers}"] = _loaded(url, rows=rows, callers=callers)
        _wait_for_spares(port, len(models))
        found["takeover_s"] = _answers_again(port, kill=_workers(server.pid)[:1])
        found["restart_s"] = _answers_again(port, kill=_workers(server.pid))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    return found


def _loaded(url: str, *, rows: int, callers: int) -> dict[str, float]:
    """Rows a second and latencies under so many callers, who are dealt out to four processes."""
    processes = min(4, callers)
    asked = [sys.executable, "-m", "torchship", "bench", url, "--concurrency", str(callers // processes)]
    asked += ["--rows", str(rows), "--seconds", "3", "--json"]
    running = [
        subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    replies = [process.communicate() for process in running]
    runs = [json.loads(out)["runs"][0] for out, _ in replies if out]
    if len(runs) < processes:
        raise SystemExit(f"the load generator failed: {replies[0][1][-300:]}")
    return {
        "rows_per_s": sum(run["rate"] for run in runs) * rows,
        "p50_ms": float(np.median([run["p50_ms"] for run in runs])),
        "p99_ms": max(run["p99_ms"] for run in runs),
        "faults": sum(run["faults"] for run in runs),
    }


def _workers(server: int) -> list[psutil.Process]:
    """The processes that hold a model, the busiest first: receivers have no torch, and are a tenth of their size."""
    found = [child for child in psutil.Process(server).children() if child.memory_info().rss > _MODEL_BYTES]
    return sorted(found, key=lambda child: -sum(child.cpu_times()[:2]))


def _answers_again(port: int, *, kill: Sequence[psutil.Process]) -> float:
    """Seconds from kill -9 of these until the next picture is answered."""
    for process in kill:
        process.kill()
    begun = time.perf_counter()
    asked = json.dumps({"inputs": [{"name": "image", "shape": [1, 3, 224, 224], "datatype": "UINT8",
                                    "data": [0] * (3 * 224 * 224)}]}).encode()  # fmt: skip
    url = f"http://127.0.0.1:{port}/v2/models/pictures/infer"
    while time.perf_counter() - begun < _REOPEN_LIMIT_S:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, asked), timeout=_REOPEN_LIMIT_S):
                return time.perf_counter() - begun
        except OSError:
            time.sleep(0.02)
    return _REOPEN_LIMIT_S


def _wait_for_spares(port: int, models: int, seconds: float = 60.0) -> None:
    """Until the processes that wait to take over have opened, or are not going to: they open beside the first load."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        if sum(line.startswith("torchship_workers_spare{") and line.endswith(" 1") for line in lines) >= models:
            return
        time.sleep(0.5)


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not become ready")


class Child:
    """This program for one model: it compiles beside the others, says so, and measures when it is told."""

    def __init__(self, name: str, place: Path, phase: str) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", name, "--place", str(place), "--phase", phase]
        self.words = (place / f"{name}-{phase}.log").open("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True
        )
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def line(self, limit: float) -> dict[str, Any]:
        """What it says next; why it says nothing."""
        try:
            line = self.lines.get(timeout=max(limit, 0.1))
        except queue.Empty:
            self.process.kill()
            return {"fault": f"out of time: {self.last_words()}"}
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        return {"fault": self.last_words() or "it ended without a word"}

    def last_words(self) -> str:
        """The end of what it said beside its results."""
        self.words.seek(0)
        return " / ".join(self.words.read().strip().splitlines()[-3:])

    def go(self) -> None:
        """It is its turn."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("go\n")
            self.process.stdin.flush()


def one(name: str, place: Path, phase: str) -> None:
    """The work of a child."""
    import torch

    torch.set_num_threads(2)  # others compile beside it; another number later would make dynamo compile again

    def turn() -> None:
        print(json.dumps({"ready": name}), flush=True)
        sys.stdin.readline()
        note("its turn")

    if phase == "warm":
        precompile(pictures() if name == "served" else captured(name), recipe("resnet50" if name == "served" else name))
        found: dict[str, Any] = {}
    else:
        found = served(place, turn) if name == "served" else measure(name, place / name, turn)
    print(json.dumps(found), flush=True)


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
            text = "".join(f"{'-' if cell is None else format(cell, '.3g'):>9}" for cell in cells)
            lines.append(f"{name:20}{rows:>6}{text}")
            worst.append(row["vs_hand"])
        if "build_s" in found:
            opened = f"build {found['build_s']:.0f} s, opens in {found['reopen_s']:.1f} s"
            lines.append(f"{'':20} {opened}, longest first call {found['stall_ms']:.1f} ms, {found['kinds']}")
    resnet = results.get("resnet50", {}).get("batches", {})
    door = results.get("served", {})
    loads = {key: row for key, row in door.items() if isinstance(row, dict)}
    for key, row in loads.items():
        times = f"p50 {row['p50_ms']:.2f} ms  p99 {row['p99_ms']:.2f} ms  faults {row['faults']}"
        lines.append(f"served {key:24} {row['rows_per_s']:>8.0f} rows/s  {times}")
    if "restart_s" in door:
        times = f"{door['takeover_s']:.2f} s by the spare worker, {door['restart_s']:.1f} s where that is killed, too"
        lines.append(f"after kill -9 of a worker the next answer comes after {times}")
    one, many, full = (loads.get(f"pictures http {load}", {}) for load in ("1 x 1", "1 x 64", "64 x 4"))
    loop = door.get("loop_per_s", 0)
    last = {
        "worst_vs_hand": f"{min(worst, default=0):.2f}",
        "resnet50_b256_vs_hand": f"{resnet.get('256', resnet.get(256, {})).get('vs_hand', 0):.2f}",
        "resnet50_b1_ms": f"{resnet.get('1', resnet.get(1, {})).get('ours', 0):.3f}",
        "served_b1_p50_ms": f"{one.get('p50_ms', 0):.2f}",
        "served_c64_per_s": f"{many.get('rows_per_s', 0):.0f}",
        "served_vs_loop": f"{full.get('rows_per_s', 0) / (loop or 1):.2f}",
        "takeover_s": f"{door.get('takeover_s', 0):.2f}",
        "reopen_s": f"{door.get('restart_s', 0):.1f}",
        "stall_p99_ms": f"{max((found.get('stall_ms', 0) for found in results.values()), default=0):.1f}",
        "fp16_vs_fp32_x": f"{_gain(resnet):.2f}",
        "loop_per_s": f"{loop:.0f}",
    }
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
    asked.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    asked.add_argument("--phase", help=argparse.SUPPRESS)
    given = asked.parse_args()
    if given.one:
        one(given.one, given.place, given.phase)
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs an NVIDIA card and a CUDA build of torch")
    names = given.models.split(",")
    if given.served:  # it serves what the first one built
        names.insert(1, "served")
    with tempfile.TemporaryDirectory(prefix="torchship-gpu-") as place:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{place}/inductor")
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ.setdefault("PYTHONPYCACHEPREFIX", f"{place}/pycache")  # where torch's own folder is read-only
        os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "2"}
        results = run(names, Path(place), given.out)
    print(told(results))


def run(names: Sequence[str], place: Path, out: Path) -> dict[str, dict[str, Any]]:
    """All compile beside one another; then one after the other measures."""
    import torch

    begun = time.monotonic()
    warming = {name: Child(name, place, "warm") for name in names if name not in ("lstm", "fasterrcnn")}
    children = {name: Child(name, place, "measure") for name in names}
    results: dict[str, dict[str, Any]] = {}
    try:
        for name, process in children.items():
            ready = process.line(_COMPILE_LIMIT_S - (time.monotonic() - begun))
            print(f"compiled {name} after {time.monotonic() - begun:.0f} s {ready.get('fault', '')}", flush=True)
            if "fault" in ready:
                results[name] = ready
        for name, process in warming.items():
            ready = process.line(_COMPILE_LIMIT_S - (time.monotonic() - begun))
            print(f"warmed {name} after {time.monotonic() - begun:.0f} s {ready.get('fault', '')}", flush=True)
        for name, process in children.items():
            if name not in results:
                process.go()
                results[name] = process.line(_MEASURE_LIMIT_S)
            told_so = results[name].get("fault", "")
            print(f"measured {name} after {time.monotonic() - begun:.0f} s {told_so}", flush=True)
            facts = {
                "card": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version(),
                "date": time.strftime("%Y-%m-%d"), "seconds": round(time.monotonic() - begun), "results": results,
            }  # fmt: skip
            out.parent.mkdir(exist_ok=True)
            out.write_text(json.dumps(facts, indent=1))
    finally:
        for process in (*children.values(), *warming.values()):
            process.process.kill()
    return results


if __name__ == "__main__":
    main()
