"""Requests a second and latency of our server and its peers, on loopback, in one run.

    python -m benchmarks.serve [--seconds 2] [--rounds 3] [--only ours,triton]

The load comes from h2load, a C program, so that it is not the bottleneck. Each server serves the same numpy MLP
16-256-256-10 as JSON, as JSON with binary tensors, and by gRPC, one after the other in several rounds; ours also
resnet18 with JPEG in, held against the same decoding and model run straight, one process a core. Peers that cannot be
had here are skipped with a note.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.peers import CACHE, Missing, Peer
from torchship.stage import stage
from torchship.tensors import Array

CONCURRENCY = (1, 8, 64)
ROW = [round(0.1 * (i + 1), 1) for i in range(16)]
ROOT = Path(__file__).parents[1]


@stage("x:FP32[-1,16] -> y:FP32[-1,10]", batched=True, max_batch=64)
class Mlp:
    """Ours: the same numbers as the peers run."""

    def __init__(self) -> None:
        space: dict[str, Any] = {}
        exec(peers.MLP, space)
        self._mlp = space["mlp"]

    def __call__(self, x: Array) -> Array:
        found: Array = self._mlp(x)
        return found


@dataclass(frozen=True)
class Run:
    """One measurement: requests a second, milliseconds, CPU microseconds a request, MiB of the server's processes."""

    server: str
    wire: str
    concurrency: int
    rate: float
    p50: float
    p99: float
    cpu: float
    memory: float
    failed: int


def ours(port: int, folder: Path) -> Peer:
    """This repository's server."""
    config = folder / "serve.toml"
    config.write_text('[[model]]\nname = "mlp"\nrun = "benchmarks.serve:Mlp"\n')
    words = [sys.executable, "-m", "torchship", "serve", str(config), "--http-port", str(port)]
    words += ["--log-level", "warning"]
    return Peer("torchship", words, folder=ROOT, binary=True, grpc_port=port)


def payloads(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """By wire: the file that is sent, and h2load's options."""
    raw = struct.pack("<16f", *ROW)
    given = {"name": "x", "shape": [1, 16], "datatype": "FP32"}
    plain = msgspec.json.encode({"inputs": [{**given, "data": ROW}]})
    head = msgspec.json.encode(
        {"inputs": [{**given, "parameters": {"binary_data_size": 64}}], "parameters": {"binary_data_output": True}}
    )
    from tritonclient.grpc import service_pb2

    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 16])
    message = service_pb2.ModelInferRequest(model_name="mlp", inputs=[tensor], raw_input_contents=[raw])
    call = message.SerializeToString()
    files = {"json": plain, "binary": head + raw, "grpc": b"\0" + len(call).to_bytes(4, "big") + call}
    options = {
        "json": ["--h1", "-H", "content-type: application/json"],
        "binary": ["--h1", "-H", f"inference-header-content-length: {len(head)}"],
        "grpc": ["-H", "content-type: application/grpc", "-H", "te: trailers"],
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: (folder / name, options[name]) for name in files}


def free_port() -> int:
    """A port nobody listens on, nor on the next one."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def running(peer: Peer, port: int) -> Iterator[psutil.Process]:
    """The server, ready, and its end."""
    log = CACHE / f"server-{port}.log"
    with log.open("wb") as out:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | peer.env
        child = subprocess.Popen(peer.command, cwd=peer.folder, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2):
                    break
            except OSError:
                if time.monotonic() > deadline or child.poll() is not None:
                    raise Missing(f"{peer.name} did not start: {log.read_text(errors='replace')[-400:]}") from None
                time.sleep(0.1)
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        try:
            child.wait(15)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()


def usage(process: psutil.Process) -> tuple[float, float]:
    """Seconds of CPU and MiB of a process and its children."""
    seconds = memory = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        seconds += times.user + times.system
        memory += one.memory_info().rss / 2**20
    return seconds, memory


def load(url: str, body: Path, options: list[str], *, concurrency: int, seconds: float, tool: list[str]) -> Any:
    """Rate, p50 and p99 in ms, number of answers, and of failures; from h2load's log of every request.

    The rate is counted from the first answer to the last: what is under way at both ends would count as time only.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        words = [*tool, "-t1", f"-c{concurrency}", "-m1", f"-D{max(1, round(seconds))}", "-d", str(body), *options]
        subprocess.run([*words, f"--log-file={log}", url], check=True, capture_output=True, timeout=seconds + 60)
        rows = [line.split("\t") for line in log.read_text().splitlines()]
    times = sorted(int(row[2]) for row in rows)
    if len(times) < 10:
        raise Missing(f"{url}: only {len(times)} answers")
    failed = sum(row[1] != "200" for row in rows)
    ends = [int(row[0]) + int(row[2]) for row in rows]
    span = (max(ends) - min(ends)) / 1e6
    return (
        (len(times) - 1) / span,
        times[len(times) // 2] / 1e3,
        times[int(len(times) * 0.99)] / 1e3,
        len(times),
        failed,
    )


@dataclass(frozen=True)
class Server:
    """A peer that runs."""

    peer: Peer
    port: int
    process: psutil.Process

    def tell(self, number: signal.Signals) -> None:
        """Stop all its processes, or let them go on."""
        os.killpg(self.process.pid, number)

    def url(self, wire: str) -> str:
        """Where requests of a wire go; empty when it does not speak it."""
        if (wire == "binary" and not self.peer.binary) or (wire == "grpc" and not self.peer.grpc_port):
            return ""
        if wire == "grpc":
            return f"http://127.0.0.1:{self.peer.grpc_port}/inference.GRPCInferenceService/ModelInfer"
        return f"http://127.0.0.1:{self.port}/v2/models/mlp/infer"


def measure(servers: list[Server], files: Any, *, rounds: int, seconds: float, tool: list[str]) -> list[Run]:
    """Every wire at every concurrency, the servers in turns and all of it several times: a machine that others share
    has slow seconds, and they must not fall on one server alone. All but the measured one are stopped: some poll."""
    found = []
    for server in servers:
        server.tell(signal.SIGSTOP)
    try:
        for _, (wire, (body, options)), server in product(range(rounds), files.items(), servers):
            if url := server.url(wire):
                server.tell(signal.SIGCONT)
                load(url, body, options, concurrency=8, seconds=1, tool=tool)
                for concurrency in CONCURRENCY:
                    found.append(measured(server, url, wire, body, options, concurrency, seconds, tool))
                server.tell(signal.SIGSTOP)
    finally:  # a stopped process would not hear that it is to end
        for server in servers:
            server.tell(signal.SIGCONT)
    return found


def measured(
    server: Server,
    url: str,
    wire: str,
    body: Path,
    options: list[str],
    concurrency: int,
    seconds: float,
    tool: list[str],
) -> Run:
    """One server under one load, once."""
    before, _ = usage(server.process)
    rate, p50, p99, count, failed = load(url, body, options, concurrency=concurrency, seconds=seconds, tool=tool)
    after, memory = usage(server.process)
    return Run(server.peer.name, wire, concurrency, rate, p50, p99, (after - before) / count * 1e6, memory, failed)


def medians(runs: list[Run]) -> list[Run]:
    """One run for each server, wire and concurrency: the median of each figure, and all failures."""
    groups: dict[tuple[str, str, int], list[Run]] = {}
    order = list(dict.fromkeys(run.server for run in runs))
    for run in sorted(runs, key=lambda run: order.index(run.server)):
        groups.setdefault((run.server, run.wire, run.concurrency), []).append(run)
    found = []
    for key, group in groups.items():
        figures = {
            name: statistics.median(getattr(run, name) for run in group)
            for name in ("rate", "p50", "p99", "cpu", "memory")
        }
        found.append(Run(*key, **figures, failed=sum(run.failed for run in group)))
    return found


def show(runs: list[Run]) -> None:
    """The table."""
    table = Table("server", "wire", "c", "requests/s", "p50 ms", "p99 ms", "CPU µs/request", "MiB", "failed")
    for run in runs:
        table.add_row(
            run.server, run.wire, str(run.concurrency), f"{run.rate:,.0f}", f"{run.p50:.2f}", f"{run.p99:.2f}",
            f"{run.cpu:.0f}", f"{run.memory:.0f}", str(run.failed),
        )  # fmt: skip
    Console(width=110).print(table)


def ratio(runs: list[Run], wire: str, peer: str, *, concurrency: int = 64, latency: bool = False) -> float:
    """Ours against a peer's: bigger is better for us; NaN where one of them is missing."""

    def of(server: str) -> float:
        for run in runs:
            if run.server.startswith(server) and (run.wire, run.concurrency) == (wire, concurrency):
                return run.p50 if latency else run.rate
        return float("nan")

    return of(peer) / of("torchship") if latency else of("torchship") / of(peer)


@click.command()
@click.option("--seconds", default=2.0, show_default=True, help="How long each measurement takes.")
@click.option("--rounds", default=3, show_default=True, help="How often each is made; medians are shown.")
@click.option("--only", default="", help="Servers to run, of ours, fastapi, litserve, triton.")
@click.option("--pictures/--no-pictures", default=True, help="Also resnet18 with JPEG in.")
def main(*, seconds: float, rounds: int, only: str, pictures: bool) -> None:
    """Measure, print the table, and the line for machines."""
    CACHE.mkdir(parents=True, exist_ok=True)
    makers = {"ours": None, "triton": peers.triton, "fastapi": peers.fastapi, "litserve": peers.litserve}
    wanted = only.split(",") if only else list(makers)
    tool = list(peers.h2load())
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        for key in wanted:
            port = free_port()
            make = makers[key]
            try:
                peer = make(port) if make else ours(port, Path(name))
                servers.append(Server(peer, port, stack.enter_context(running(peer, port))))
            except Missing as fault:
                print(f"skipped: {fault}", file=sys.stderr)
        runs = medians(measure(servers, payloads(Path(name)), rounds=rounds, seconds=seconds, tool=tool))
    show(runs)
    parts = float("nan")
    if pictures:
        from benchmarks.jpeg import against_parts

        parts = against_parts(tool=tool, seconds=2 * seconds)
    facts = {
        "binary_c64_vs_triton_x": ratio(runs, "binary", "Triton"),
        "json_c64_vs_triton_x": ratio(runs, "json", "Triton"),
        "grpc_c64_vs_triton_x": ratio(runs, "grpc", "Triton"),
        "p50_c1_vs_triton_x": ratio(runs, "binary", "Triton", concurrency=1, latency=True),
        "json_c64_vs_litserve_x": ratio(runs, "json", "LitServe"),
        "json_c64_vs_fastapi_x": ratio(runs, "json", "FastAPI"),
        "jpeg_vs_parts": parts,
    }
    print(" ".join(f"{key}={value:.2f}" for key, value in facts.items()))


if __name__ == "__main__":
    main()
