"""Hours of four cameras in minutes: `torchship watch` under kill -9, its memory, descriptors and rings looked at.

    python -m benchmarks.watch [--minutes 10] [--rate 4]

Four cameras play a clip for ever at `rate` frames a second, into a sink on disk; every ten seconds one of the
command's processes is killed, each in its turn: decoders, workers of detector and tracker, the sink. Another camera
comes and goes by the API in between. Flat means: between the second and the last fifth of the time memory grows by at
most 2 % or 8 MB, descriptors and rings in /dev/shm not at all; and that every camera is live in the end. The detector
is the one that `torchship watch prepare` made.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil

from benchmarks import memory as engines
from benchmarks import video
from torchship import process
from torchship_video import ring

CAMERAS = 4
CONFIG = """
http_port = {port}
[[sink]]
kind = "jsonl"
options = {{ path = "{folder}/seen.jsonl" }}
"""
CAMERA = """
[[camera]]
name = "camera{number}"
source = "{clip}"
loop = true
realtime = true
"""


class Sample(NamedTuple):
    """All processes at one moment: memory as if nothing else ran in MB, descriptors of the host, files of rings."""

    memory: float
    descriptors: int
    rings: int


def clip(folder: Path, *, rate: int) -> Path:
    """The scene of `benchmarks.video` at another rate, a quarter of its size."""
    import av

    path = folder / "clip.mp4"
    with av.open(str(path), "w") as out, av.open(str(video.clip(Path(tempfile.gettempdir())))) as scene:
        stream = out.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for number, frame in enumerate(scene.decode(video=0)):
            made = frame.reformat(640, 360, "yuv420p")
            made.pts, made.time_base = number, Fraction(1, rate)
            for packet in stream.encode(made):
                out.mux(packet)
        for packet in stream.encode(None):
            out.mux(packet)
    return path


def asked(url: str, method: str = "GET", body: Any = None) -> Any:
    """What the API answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read() or b"null")


def ready(url: str, log: Path, child: subprocess.Popen[bytes]) -> None:
    """Return once the API answers. Raises RuntimeError when the command ends instead."""
    while child.poll() is None:
        with suppress(OSError):
            asked(f"{url}/v1/cameras")
            return
        time.sleep(0.2)
    raise RuntimeError(log.read_text()[-1000:])


def sampled(host: psutil.Process) -> Sample:
    """The state now."""
    rings = [file for file in os.listdir(ring.FOLDER) if file.startswith("torchship")]
    return Sample(process.held(host.pid) / 1e6, host.num_fds(), len(rings))


def soak(url: str, host: psutil.Process, *, source: Path, seconds: float) -> tuple[list[Sample], int, int]:
    """The samples, how many processes were killed, and how often a camera came and went."""
    samples, killed, came = list[Sample](), 0, 0
    until, struck = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < until:
        time.sleep(1)
        samples.append(sampled(host))
        if time.monotonic() < struck + 10 or time.monotonic() > until - 30:
            continue
        struck = time.monotonic()
        with suppress(psutil.Error, IndexError):
            oldest = sorted(host.children(), key=lambda one: one.create_time())
            os.kill(oldest[0].pid, signal.SIGKILL)  # who was killed is the youngest then: all get their turn
            killed += 1
        if killed % 3 == 0:
            asked(f"{url}/v1/cameras", "POST", {"name": "guest", "source": str(source), "loop": True, "realtime": True})
            time.sleep(3)
            asked(f"{url}/v1/cameras/guest", "DELETE")
            came += 1
    return samples, killed, came


@click.command(help="Soak `torchship watch`; exit code 1 when anything grew or a camera is gone.")
@click.option("--minutes", default=10.0, show_default=True, help="How long.")
@click.option("--rate", default=4, show_default=True, help="Frames a second of each camera.")
def main(*, minutes: float, rate: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        port = engines.free_port()
        url = f"http://127.0.0.1:{port}"
        source, log, config = clip(folder, rate=rate), folder / "log", folder / "cameras.toml"
        cameras = "".join(CAMERA.format(number=number, clip=source) for number in range(CAMERAS))
        config.write_text(CONFIG.format(folder=folder, port=port) + cameras)
        words = [sys.executable, "-m", "torchship", "watch", str(config)]
        with log.open("wb") as out:
            child = subprocess.Popen(words, stdout=out, stderr=out)
        try:
            ready(url, log, child)
            host = psutil.Process(child.pid)
            samples, killed, came = soak(url, host, source=source, seconds=60 * minutes)
            found = asked(f"{url}/v1/cameras")["cameras"]
            live = sum(camera["state"] == "live" for camera in found)
        finally:
            child.send_signal(signal.SIGINT)
            child.wait(60)
        left = [file for file in os.listdir(ring.FOLDER) if file.startswith("torchship")]
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    memory = [statistics.median(one.memory for one in part) for part in (early, late)]
    descriptors = [round(statistics.median(one.descriptors for one in part)) for part in (early, late)]
    rings = [round(statistics.median(one.rings for one in part)) for part in (early, late)]
    print(f"killed: {killed}; cameras that came and went: {came}; rings that are left at the end: {len(left)}")
    shown = {"minutes": f"{minutes:g}", "live": live, "of": len(found)}
    shown |= {"memory_first_mb": f"{memory[0]:.1f}", "memory_last_mb": f"{memory[1]:.1f}"}
    shown |= {"fds_first": descriptors[0], "fds_last": descriptors[1], "rings_first": rings[0], "rings_last": rings[1]}
    print(" ".join(f"{name}={value}" for name, value in shown.items()))
    grew = memory[1] > max(memory[0] * 1.02, memory[0] + 8) or descriptors[1] > descriptors[0] or rings[1] > rings[0]
    sys.exit(bool(grew or left or live < CAMERAS))


if __name__ == "__main__":
    main()
