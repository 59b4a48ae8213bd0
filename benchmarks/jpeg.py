"""resnet18 with JPEG in: our server against the same decoding and model run straight, one process a core."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.peers import CACHE, Peer
from torchship import process
from torchship.artifact import open_artifact
from torchship.pipeline.config import StageConfig
from torchship.pipeline.opening import open_stage

DECODE = {"run": "torchship.stages.images:Classify", "options": {"size": 224}}


def artifact() -> Path:
    """resnet18 with random weights on ONNX Runtime fp32, made once."""
    home = CACHE / "resnet18"
    done = home / "artifact"
    if not (done / "manifest.json").exists():
        import torch
        import torchvision

        import torchship
        from torchship.recipe import Recipe

        torch.manual_seed(0)
        report = torchship.optimize(
            torchvision.models.resnet18().eval(),
            torch.randn(2, 3, 224, 224),
            name="resnet18",
            recipes=[Recipe("onnxruntime", {"precision": "fp32"})],
            backends=["onnxruntime"],
            store=home / "store",
            cache=home / "cache",
        )
        assert report.artifact is not None
        done.symlink_to(report.artifact.path)
    return done


def picture() -> bytes:
    """A photo of 640 by 480 as JPEG."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((640, 480), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def straight(argument: Any) -> float:
    """Pictures a second of one process and one thread: decode, then model, again and again."""
    path, seconds = argument
    decode = open_stage(msgspec.convert(DECODE, StageConfig))
    model = open_artifact(path).open(threads=1)
    (name,) = [spec.name for spec in model.signature.inputs]
    given = np.empty(1, object)
    given[0] = picture()
    count, began = 0, time.monotonic()
    while time.monotonic() < began + seconds:
        pixels = next(iter(decode({decode.signature.inputs[0].name: given}).values()))
        model({name: pixels})
        count += 1
    return count / (time.monotonic() - began)


def parts(path: Path, seconds: float) -> float:
    """What all cores can do without a server: one such process on each."""
    import concurrent.futures as futures

    cores = len(os.sched_getaffinity(0))
    with futures.ThreadPoolExecutor(cores) as pool:
        asked = [
            pool.submit(
                process.run,
                "benchmarks.jpeg:straight",
                argument=[str(path), seconds],
                timeout=seconds + 60,
                threads=1,
            )
            for _ in range(cores)
        ]
        outcomes = [found.result() for found in asked]
    faults = [outcome.fault for outcome in outcomes if outcome.fault]
    if faults:
        raise RuntimeError(faults[0])
    return float(sum(outcome.value for outcome in outcomes))


def against_parts(*, tool: list[str], seconds: float) -> float:
    """Served over straight, the smaller of concurrency 8 and 64."""
    from benchmarks.serve import ROOT, free_port, load, running

    path = artifact()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        body = folder / "picture.jpg"
        body.write_bytes(picture())
        config = folder / "serve.toml"
        stages = f'{{run = "{DECODE["run"]}", options = {{size = 224}}, copies = {cores}}}'
        model = f'{{artifact = "{path}", threads = 1, copies = {cores}}}'
        config.write_text(f'[[model]]\nname = "resnet18"\nstages = [{stages}, {model}]\n')
        port = free_port()
        words = [sys.executable, "-m", "torchship", "serve", str(config), "--http-port", str(port)]
        peer = Peer("torchship", [*words, "--log-level", "warning"], folder=ROOT)
        options = ["--h1", "-H", "content-type: image/jpeg"]
        url = f"http://127.0.0.1:{port}/v2/models/resnet18/infer"
        rates = {}
        before = parts(path, seconds * 2)
        with running(peer, port):
            load(url, body, options, concurrency=8, seconds=2, tool=tool)
            for concurrency in (8, 64):
                rate, p50, p99, _, failed = load(
                    url, body, options, concurrency=concurrency, seconds=seconds * 2, tool=tool
                )
                rates[concurrency] = rate
                print(f"resnet18 JPEG c={concurrency}: {rate:.1f}/s p50 {p50:.0f} ms p99 {p99:.0f} ms failed {failed}")
        after = parts(path, seconds * 2)
    print(f"its parts, straight, one process a core: {before:.1f}/s before, {after:.1f}/s after")
    return float(min(rates.values()) / ((before + after) / 2))
