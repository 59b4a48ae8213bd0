"""Pictures a second through the served face pipeline, against the same stages run straight in one process.

`python -m benchmarks.faces`. Four figures from one run, on as many cores as there are:
the stages one after another in this process (straight, one thread a model); the same in a process a core at once, which
is what the cores can do together; the sum of the stages, which is what they could do if they shared nothing; and the
served pipeline at concurrency 16 over HTTP. Then 23 faces from 8
pictures, to show that rows of several requests meet in one batch of the embedder.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
from apps.faces.tests import face_kit

from torchship.pipeline import plan
from torchship.pipeline.composed import run_node, take
from torchship.pipeline.config import convert
from torchship.pipeline.opening import open_stage
from torchship.serve import config
from torchship.serve.host import Server
from torchship_faces import recipes
from torchship_faces.routes import configuration

CONCURRENCY = 16


def straight(gallery: str, pictures: list[bytes], seconds: float) -> tuple[float, dict[str, float]]:
    """Pictures a second in this process, and milliseconds of each stage."""
    store = face_kit.store()
    checked = plan(convert(recipes.identify(gallery)), store)
    stages = [open_stage(node.config, store) for node in checked.nodes]
    spent = dict.fromkeys((node.name for node in checked.nodes), 0.0)

    def one(picture: bytes) -> None:
        slots: dict[str, Any] = {checked.inputs[0]: np.array([picture], np.object_)}
        for node, stage in zip(checked.nodes, stages, strict=True):
            began = time.perf_counter()
            take(node, slots)
            outputs = run_node(node, stage, slots, {})
            slots.update(zip(node.gives, [outputs[spec.name] for spec in node.signature.outputs], strict=True))
            spent[node.name] += time.perf_counter() - began

    for picture in pictures:
        one(picture)
    spent.update(dict.fromkeys(spent, 0.0))
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        one(pictures[done % len(pictures)])
        done += 1
    rate = done / (time.perf_counter() - began)
    for stage in stages:
        stage.close()
    return rate, {name: total / done * 1e3 for name, total in spent.items()}


def together(gallery: str, pictures: list[bytes], seconds: float) -> float:
    """Pictures a second of as many straight processes as there are cores, all at once."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(straight, gallery, pictures, seconds) for _ in range(cores)]
        return sum(run.result()[0] for run in runs)


async def served(gallery: str, pictures: list[bytes], seconds: float) -> tuple[float, np.ndarray[Any, Any], str]:
    """Pictures a second at concurrency 16, milliseconds of each request, and the batch sizes of the embedder."""
    data = configuration(gallery=gallery, store=str(face_kit.store().root), http_port=0, copies=1)
    server = await Server(config.convert(data)).open()
    times: list[float] = []
    try:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def caller(number: int, until: float) -> None:
                while time.perf_counter() < until:
                    picture = pictures[(number + len(times)) % len(pictures)]
                    began = time.perf_counter()
                    answer = await client.post(
                        "/v1/faces/identify", content=picture, headers={"content-type": "image/jpeg"}
                    )
                    answer.raise_for_status()
                    times.append((time.perf_counter() - began) * 1e3)

            for length in (min(3.0, seconds), seconds):
                times.clear()
                began = time.perf_counter()
                await asyncio.gather(*(caller(number, began + length) for number in range(CONCURRENCY)))
                rate = len(times) / (time.perf_counter() - began)
            batches = "\n".join(
                line for line in server.service.metrics().splitlines() if "batch" in line and "embed" in line
            )
    finally:
        await server.close(patience=5.0)
    return rate, np.array(times), batches


@click.command(help=__doc__)
@click.option("--seconds", default=15.0, show_default=True, help="How long each of the measurements takes.")
def main(*, seconds: float) -> None:
    """Print the table and the line for machines."""
    pictures = [face_kit.picture(name) for name in ("obama", "obama2", "obama3", "biden")]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; JPEGs of {[len(p) // 1000 for p in pictures]} kB")
    with tempfile.TemporaryDirectory(prefix="torchship-faces-") as scratch:
        gallery = str(Path(scratch) / "gallery")
        before, stages = straight(gallery, pictures, seconds)
        rate, times, batches = asyncio.run(served(gallery, pictures, seconds))
        after, again = straight(gallery, pictures, seconds)
        both = together(gallery, pictures, seconds)
    alone = (before + after) / 2
    print(f"\n{'stage':12} {'ms':>8}   (the second measurement, after serving)")
    for name, spent in stages.items():
        print(f"{name:12} {spent:8.2f}   {again[name]:8.2f}")
    total = (sum(stages.values()) + sum(again.values())) / 2
    cores = len(os.sched_getaffinity(0))
    print(f"\nstraight, one process         {alone:8.1f} pictures/s  ({before:.1f} before, {after:.1f} after)")
    print(f"straight, a process a core    {both:8.1f} pictures/s")
    print(f"sum of the stages, {cores} cores    {1e3 * cores / total:8.1f} pictures/s")
    p50, p99 = np.percentile(times, [50, 99])
    print(f"served, concurrency {CONCURRENCY}        {rate:8.1f} pictures/s  (p50 {p50:.0f} ms, p99 {p99:.0f} ms)")
    if batches:
        print(f"\nthe embedder's batches:\n{batches}")
    facts = {
        "served_vs_straight_x": rate / alone,
        "served_vs_cores": rate / both,
        "served_vs_parts": rate * total / 1e3 / cores,
    }
    print(" ".join(f"{key}={value:.3f}" for key, value in facts.items()))


if __name__ == "__main__":
    main()
