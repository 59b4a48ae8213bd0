"""The main job, start to end: optimize a real model, pack it, serve it, ask it about a real picture."""

from __future__ import annotations

import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from examples.classify.model import photos

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "runs" / "demo"
STORE = RUNS / "store"
REPORT = RUNS / "report"
NAME = "efficientnet_lite0"
TORCHSHIP = [sys.executable, "-m", "torchship"]
SERVER_START_S = 60


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def command(*words: str) -> list[str]:
    """Show a command as a user would type it, and return it as it is run here."""
    print(f"$ torchship {shlex.join(words)}", flush=True)
    return [*TORCHSHIP, *words]


def optimize() -> None:
    say("1. Search: every backend and precision that runs here, and only what is proved on real photos")
    words = command(
        "optimize", "examples.classify.model:efficientnet_lite0",
        "--input", "image:FP32[-1,3,224,224]",
        "--data", "examples.classify.model:calibration",
        "--labels", "examples.classify.model:labels",
        "--backends", "onnxruntime,openvino",
        "--strict", "--budget", "3m",
        "--name", NAME,
        "--store", str(STORE.relative_to(ROOT)),
        "--report", str(REPORT.relative_to(ROOT)),
    )  # fmt: skip
    if code := subprocess.run(words, check=False, cwd=ROOT).returncode:
        sys.exit(code)  # it has said why


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_ready(url: str, *, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + SERVER_START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.05)
    raise SystemExit("the server did not become ready")


def ask(url: str, *, picture: Path) -> None:
    """Send the picture's bytes and print the five best names."""
    request = urllib.request.Request(
        f"{url}/v2/models/classify/infer", data=picture.read_bytes(), headers={"Content-Type": "image/png"}
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)
    milliseconds = (time.perf_counter() - started) * 1000
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    print(f"\n{picture.name}, answered in {milliseconds:.1f} ms:")
    for name, score in zip(outputs["labels"], outputs["scores"], strict=True):
        print(f"  {score:6.1%}  {name}")


def main() -> None:
    RUNS.mkdir(parents=True, exist_ok=True)
    optimize()
    say("2. Serve: decode, model and labels as separate processes, by REST")
    port = free_port()
    config = str((Path(__file__).parent / "serve.toml").relative_to(ROOT))
    words = command("serve", config, "--http-port", str(port), "--log-level", "warning")
    server = subprocess.Popen(words, cwd=ROOT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server=server)
        say("3. Ask: the bytes of a photo go in, names come out")
        for picture in photos()[:2]:
            ask(url, picture=picture)
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=30)
    print(f"\nserver stopped with exit code {code}")
    say("Go on:")
    print(f"  report    {REPORT.relative_to(ROOT)}/report.html")
    print(f"  inspect   .venv/bin/torchship inspect {NAME} --store {STORE.relative_to(ROOT)}")
    print(f"  serve     .venv/bin/torchship serve {config} --http-port 8000")
    print(f"  ask       curl --data-binary @{photos()[0]} -H 'Content-Type: image/png' \\")
    print("              http://127.0.0.1:8000/v2/models/classify/infer")


if __name__ == "__main__":
    main()
