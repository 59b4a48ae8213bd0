"""Peak memory of serving MobileNetV3-Large at batch 1 and 8: ours with its HTTP server, beside engines without any.

    python -m benchmarks.memory [--rounds 20]

Each row is a fresh process (or server with all its processes) under load, sampled every 30 ms from its start. `MB` is
what it holds as if nothing else ran: pages shared with strangers count in full, which PSS on a busy machine divides
(`PSS` stands beside it). Peers get float32 tensors in a loop in their own process; ours and FastAPI get them over HTTP.
The last line takes ours as it is meant for small machines: ncnn with weights in half, in one process, a row at a time.
"""

from __future__ import annotations

import http.client
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks import peers
from benchmarks.peers import Missing
from torchship import process

CACHE = peers.CACHE / "memory"
ROWS = (1, 8)
SHAPE = (3, 224, 224)
_ROW = 4 * SHAPE[0] * SHAPE[1] * SHAPE[2]  # bytes

MAKE = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
import torchvision
from torchship.artifact.manifest import Provenance
from torchship.optimize.capture import capture
from torchship.optimize.trial import packed
from torchship.recipe import Recipe

out = Path(sys.argv[1])
torch.manual_seed(0)
module = torchvision.models.mobilenet_v3_large(weights=None).eval()
torch.jit.freeze(torch.jit.trace(module, torch.zeros(1, 3, 224, 224))).save(str(out / "model.pt"))
model = capture(module, torch.randn(2, 3, 224, 224), name="mobilenet")
rows = np.random.default_rng(0)
data = tuple({"x": rows.standard_normal((8, 3, 224, 224), np.float32)} for _ in range(8))
made = Provenance("", "", "benchmarks.memory", "")
for precision in ("fp32", "int8"):
    options = {"precision": precision, "arena": False}
    wish = replace(model, calibration=data) if precision == "int8" else model
    packed(wish, out / precision, recipe=Recipe("onnxruntime", options), name="mobilenet", provenance=made)
half = Recipe("ncnn", {"precision": "fp16"})
packed(model, out / "ncnn", recipe=half, name="mobilenet", provenance=made)
"""
ONNX = """
import sys
import numpy as np
import onnxruntime as ort
settings = ort.SessionOptions()
settings.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], settings, providers=["CPUExecutionProvider"])
x = np.zeros((int(sys.argv[2]), 3, 224, 224), np.float32)
for _ in range(int(sys.argv[3])):
    session.run(None, {"x": x})
"""
NCNN = """
import sys
import numpy as np
import ncnn
net = ncnn.Net()
net.opt.num_threads = 1
net.load_param(sys.argv[1] + ".param")
net.load_model(sys.argv[1] + ".bin")
x = np.zeros((int(sys.argv[2]), 3, 224, 224), np.float32)
for _ in range(int(sys.argv[3])):
    for row in x:  # ncnn has no batch
        run = net.create_extractor()
        run.input("in0", ncnn.Mat(row).clone())
        run.extract("out0")
"""
TORCHSCRIPT = """
import sys
import torch
torch.set_num_threads(1)
model = torch.jit.load(sys.argv[1])
x = torch.zeros(int(sys.argv[2]), 3, 224, 224)
with torch.inference_mode():
    for _ in range(int(sys.argv[3])):
        model(x)
"""
FASTAPI = """
import sys
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
torch.set_num_threads(1)
model, app = torch.jit.load(sys.argv[1]), FastAPI()

@app.post("/v2/models/m/infer")
async def infer(request: Request):
    x = np.frombuffer(bytearray(await request.body()), np.float32).reshape(-1, 3, 224, 224)
    with torch.inference_mode():
        return Response(model(torch.from_numpy(x)).numpy().tobytes())

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""
OURS = """
one_process = {one}
[http]
port = {port}
[[model]]
name = "m"
artifact = "{artifact}"
threads = 1
max_batch = {most}
"""


class Peak(NamedTuple):
    """The most that was seen, in MB: as if nothing else ran, and as PSS, which others' processes lower."""

    held: float
    pss: float


@contextmanager
def watched(words: Sequence[str], **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], list[Peak]]]:
    """A process under observation; the list has its peak once it has ended."""
    with tempfile.TemporaryFile() as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        child = subprocess.Popen(words, env=env, stdout=log, stderr=log)
        found: list[Peak] = []
        done = threading.Event()

        def look() -> None:
            peak = Peak(0, 0)
            while not done.wait(0.03):
                peak = Peak(max(peak.held, process.held(child.pid) / 1e6), max(peak.pss, _pss(child.pid)))
            found.append(peak)

        looking = threading.Thread(target=look)
        looking.start()
        try:
            yield child, found
        finally:
            done.set()
            looking.join()
            child.terminate()
            child.wait(60)
            log.seek(0)
            if child.returncode not in (0, -15):
                print(log.read().decode(errors="replace")[-2000:], file=sys.stderr)


def _pss(pid: int) -> float:
    import psutil

    total = 0
    try:
        for one in (top := psutil.Process(pid), *top.children(recursive=True)):
            rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    except (psutil.Error, OSError, StopIteration):
        return 0.0
    return total * 1024 / 1e6


def looped(words: Sequence[str]) -> Peak:
    """The peak of a process that runs to its end. Raises Missing when it fails."""
    with watched(words) as (child, found):
        code = child.wait(300)
    if code:
        raise Missing(f"exit code {code}")
    return found[0]


def asked(words: Sequence[str], port: int, body: bytes, rounds: int, **headers: str) -> Peak:
    """The peak of a server that answers `rounds` requests, one after the other. Raises Missing when it does not."""
    with watched(words) as (child, found):
        deadline = time.monotonic() + 120
        while True:
            try:
                caller = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                caller.request("POST", "/v2/models/m/infer", body, headers)
                if (answer := caller.getresponse()).read() and answer.status == 200:
                    break
            except OSError:
                pass
            if time.monotonic() > deadline or child.poll() is not None:
                raise Missing(f"does not answer, exit code {child.poll()}")
            time.sleep(0.2)
        for _ in range(rounds):
            caller = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            caller.request("POST", "/v2/models/m/infer", body, headers)
            answer = caller.getresponse()
            if answer.status != 200 or not answer.read():
                raise Missing(f"status {answer.status}")
    return found[0]


def ours(folder: Path, precision: str, rows: int, rounds: int, *, one: bool, most: int) -> Peak:
    """Our server over HTTP, tensors as bytes."""
    port = free_port()
    file = folder / "serve.toml"
    file.write_text(OURS.format(one=str(one).lower(), port=port, artifact=folder / precision, most=most))
    given = {"name": "x", "datatype": "FP32", "shape": [rows, *SHAPE], "parameters": {"binary_data_size": rows * _ROW}}
    head = json.dumps({"inputs": [given], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    words = [sys.executable, "-m", "torchship", "serve", str(file), "--log-level", "warning"]
    return asked(words, port, head + bytes(rows * _ROW), rounds, **headers)


def fastapi(folder: Path, rows: int, rounds: int) -> Peak:
    """FastAPI on uvicorn, torch in the same process, out of an environment of its own."""
    python, port = peers.environment("fastapi", "fastapi", "uvicorn[standard]", "numpy"), free_port()
    site = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
    words = ["env", f"PYTHONPATH={site}", str(python), "-c", FASTAPI, str(folder / "model.pt"), str(port)]
    return asked(words, port, bytes(rows * _ROW), rounds)


def ncnn_files(folder: Path) -> str:
    """The model as ncnn takes it, made once by pnnx. Raises Missing."""
    if not (folder / "model.ncnn.bin").exists():
        words = [sys.executable, "-c", "import pnnx; print(pnnx.EXEC_PATH)"]
        try:
            tool = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
            shape = "inputshape=[1,3,224,224]"
            subprocess.run(
                [tool, "model.pt", shape, "fp16=0"], cwd=folder, check=True, capture_output=True, timeout=300
            )
        except (OSError, subprocess.SubprocessError) as fault:
            raise Missing(f"pip install ncnn pnnx: {fault}"[:100]) from None
    return str(folder / "model.ncnn")


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def files() -> Path:
    """The models, made once."""
    if not (CACHE / "ncnn" / "manifest.json").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for name in ("fp32", "int8", "ncnn"):
            subprocess.run(["rm", "-rf", str(CACHE / name)], check=True)
        subprocess.run([sys.executable, "-c", MAKE, str(CACHE)], check=True, stdout=subprocess.DEVNULL)
    return CACHE


@click.command(help="Measure the peak memory of serving MobileNetV3-Large at batch 1 and 8.")
@click.option("--rounds", type=int, default=20, show_default=True, help="Calls of each.")
def main(rounds: int) -> None:
    folder, python = files(), sys.executable
    onnx = {name: str(folder / name / "backend" / "model.onnx") for name in ("fp32", "int8")}
    contestants: dict[str, Callable[[int], Peak]] = {
        "torchship HTTP, one process, ncnn fp16, a row at a time": lambda rows: ours(
            folder, "ncnn", rows, rounds, one=True, most=1
        ),
        "torchship HTTP, one process, int8, a row at a time": lambda rows: ours(
            folder, "int8", rows, rounds, one=True, most=1
        ),
        "torchship HTTP, one process, fp32, a row at a time": lambda rows: ours(
            folder, "fp32", rows, rounds, one=True, most=1
        ),
        "torchship HTTP, two processes, int8, batches of 8": lambda rows: ours(
            folder, "int8", rows, rounds, one=False, most=8
        ),
        "torchship HTTP, two processes, fp32, batches of 8": lambda rows: ours(
            folder, "fp32", rows, rounds, one=False, most=8
        ),
        "ONNX Runtime alone, fp32": lambda rows: looped([python, "-c", ONNX, onnx["fp32"], str(rows), str(rounds)]),
        "ONNX Runtime alone, int8": lambda rows: looped([python, "-c", ONNX, onnx["int8"], str(rows), str(rounds)]),
        "ncnn alone, fp32": lambda rows: looped([python, "-c", NCNN, ncnn_files(folder), str(rows), str(rounds)]),
        "TorchScript alone, fp32": lambda rows: looped(
            [python, "-c", TORCHSCRIPT, str(folder / "model.pt"), str(rows), str(rounds)]
        ),
        "FastAPI + torch, fp32": lambda rows: fastapi(folder, rows, rounds),
    }
    print(f"MobileNetV3-Large, 224x224, one thread, {platform.machine()}; MB of all processes together")
    print(f"{'':56} {'b1 MB':>8} {'b8 MB':>8} {'b1 PSS':>8} {'b8 PSS':>8}")
    table: dict[str, list[Peak]] = {}
    for name, measure in contestants.items():
        try:
            table[name] = found = [measure(rows) for rows in ROWS]
        except Missing as fault:
            print(f"{name:56} {fault}", flush=True)
            continue
        print(f"{name:56} " + " ".join(f"{one.held:8.1f}" for one in found), end=" ")
        print(" ".join(f"{one.pss:8.1f}" for one in found), flush=True)
    first = next(iter(contestants))
    best = {"b1_mb": (first, 0), "b8_mb": (first, 1), "bare_ort_b1_mb": ("ONNX Runtime alone, fp32", 0)}
    best["fastapi_torch_mb"] = ("FastAPI + torch, fp32", 0)
    shown = {key: f"{table[name][at].held:.1f}" if name in table else "-" for key, (name, at) in best.items()}
    print(" ".join(f"{key}={value}" for key, value in shown.items()))


if __name__ == "__main__":
    main()
