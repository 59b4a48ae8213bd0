"""What a front door costs: ours against granian (RSGI), uvicorn (ASGI) and grpc.aio, with the same codec and service.

    python -m benchmarks.doors [--seconds 3]

Every server decodes a v2 request of 16 floats, hands it to a service that answers at once, and encodes the answer:
what is left is the door itself. The peers are installed into ~/.cache/torchship/bench/doors on the first run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import uvloop
from rich.console import Console
from rich.table import Table

from torchship.client.address import parse
from torchship.client.load import CallOutcome, Target, closed_loop
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.service import Answer
from torchship.tensors import Signature
from torchship.wire.messages import Request, Response
from torchship.wire.oip_grpc import InferCodec
from torchship.wire.oip_json import decode_request, encode_response

PEERS = Path.home() / ".cache" / "torchship" / "bench" / "doors"
ECHO = Signature.parse("x:FP32[-1,16] -> y:FP32[-1,16]")
PATH = "/v2/models/echo/infer"


class Echo:
    """A service that answers at once."""

    live = ready = True

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def submit(self, request: Request) -> asyncio.Future[Response]:
        future: asyncio.Future[Response] = self._loop.create_future()
        future.set_result(self._answer(request))
        return future

    def start(self, request: Request, answer: Answer, whom: Any) -> asyncio.Future[Response] | None:
        answer(whom, request, self._answer(request))
        return None

    @staticmethod
    def _answer(request: Request) -> Response:
        ECHO.check(request.inputs)
        return Response("echo", "1", {"y": request.inputs["x"]}, request.id)


async def serve_ours(port: int) -> None:
    """Our HTTP and gRPC on one port."""
    await rest.listen(Front(cast(Any, Echo())), port=port)  # what is not asked needs no answer
    await asyncio.Event().wait()


async def serve_grpc_aio(port: int) -> None:
    """grpc.aio with our codec."""
    import grpc as grpcio

    service, codec = Echo(), InferCodec()

    async def infer(data: bytes, context: Any) -> bytes:
        request = codec.decode(data)
        return codec.encode(await service.submit(request), request)

    handler = grpcio.unary_unary_rpc_method_handler(infer)
    server = grpcio.aio.server()
    name = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers((grpcio.method_handlers_generic_handler(name, {"ModelInfer": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    """The same for an ASGI server."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        event = await receive()
        body, more = body + event.get("body", b""), event.get("more_body", False)
    request = decode_request(body, model="echo")
    answer = encode_response(await Echo().submit(request), request).data
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": answer})


async def rsgi(scope: Any, protocol: Any) -> None:
    """The same for granian's own interface."""
    request = decode_request(await protocol(), model="echo")
    answer = encode_response(await Echo().submit(request), request).data
    head = [("content-type", "application/json"), ("content-length", str(len(answer)))]
    protocol.response_bytes(200, head, answer)


COMMANDS = {
    "ours": [sys.executable, "-m", "benchmarks.doors", "serve-ours", "{port}"],
    "granian RSGI": [
        sys.executable, "-m", "granian", "--interface", "rsgi", "--loop", "uvloop", "--no-access-log",
        "--port", "{port}", "benchmarks.doors:rsgi",
    ],
    "uvicorn ASGI": [
        sys.executable, "-m", "uvicorn", "--loop", "uvloop", "--http", "httptools", "--no-access-log",
        "--log-level", "warning", "--port", "{port}", "benchmarks.doors:asgi",
    ],
    "grpc.aio": [sys.executable, "-m", "benchmarks.doors", "serve-grpc-aio", "{port}"],
}  # fmt: skip


@contextmanager
def running(name: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [word.format(port=port) for word in COMMANDS[name]]
    paths = os.pathsep.join([str(Path.cwd()), str(PEERS)])
    child = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port, psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(20)


def spent(process: psutil.Process) -> float:
    """CPU seconds of a process and its children."""
    every = [process, *process.children(recursive=True)]
    return float(sum(one.cpu_times().user + one.cpu_times().system for one in every))


async def load(target: Target, callers: int, seconds: float) -> CallOutcome:
    """A closed loop of right answers."""
    payload = target.payload({"x": np.arange(16, dtype=np.float32).reshape(1, 16)})
    return await closed_loop(target, payload, concurrency=callers, seconds=seconds, warm_up=0.0)


def main() -> None:
    """Measure all doors side by side, twice, and keep each one's better round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0)
    seconds = parser.parse_args().seconds
    if not (PEERS / "granian").is_dir():
        words = ["uv", "pip", "install", "-q", "--target", str(PEERS), "granian", "uvicorn"]
        subprocess.run([str(Path(sys.executable).with_name("uv")), *words[1:]], check=True)
    table = Table("door", "protocol", "callers", "requests/s", "p50 ms", "p99 ms", "server CPU, µs a request")
    rates: dict[tuple[str, str, int], float] = {}
    costs: dict[tuple[str, str, int], float] = {}
    rows: dict[tuple[str, str, int], tuple[str, ...]] = {}
    peers = [("granian RSGI", "json", "granian"), ("uvicorn ASGI", "json", "uvicorn"), ("grpc.aio", "grpc", "grpcaio")]
    doors = [("ours", "json"), ("ours", "grpc"), *((peer, encoding) for peer, encoding, _ in peers)]
    for _ in range(2):
        for name, encoding in doors:
            with running(name) as (port, process):
                scheme = "grpc" if encoding == "grpc" else "http"
                target = Target(parse(f"{scheme}://127.0.0.1:{port}"), "echo", encoding)
                for callers in (1, 64):
                    before = spent(process)
                    outcome = uvloop.run(load(target, callers, seconds))
                    cost = (spent(process) - before) / max(1, len(outcome.latencies))
                    key = name, encoding, callers
                    costs[key] = min(cost, costs.get(key, cost))
                    if outcome.rate > rates.get(key, 0.0):
                        rates[key] = outcome.rate
                        numbers = [outcome.percentile(percent) * 1e3 for percent in (50, 99)]
                        cells = [f"{outcome.rate:,.0f}", *(f"{number:.3f}" for number in numbers)]
                        rows[key] = (name, encoding, str(callers), *cells)
                    if outcome.faults:
                        raise SystemExit(f"{name}: {dict(outcome.faults)}")
    for key, row in rows.items():
        table.add_row(*row, f"{costs[key] * 1e6:.1f}")
    Console().print(table)
    words = []
    for peer, encoding, short in peers:
        ours, theirs = ("ours", encoding, 64), (peer, encoding, 64)
        words.append(f"{encoding}_vs_{short}_x={rates[ours] / rates[theirs]:.2f}")
        words.append(f"{encoding}_cpu_vs_{short}_x={costs[theirs] / costs[ours]:.2f}")
    print(" ".join(words))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve-ours"]:
        uvloop.run(serve_ours(int(sys.argv[2])))
    elif sys.argv[1:2] == ["serve-grpc-aio"]:
        uvloop.run(serve_grpc_aio(int(sys.argv[2])))
    else:
        main()
