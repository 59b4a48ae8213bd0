"""Search in galleries of 10^5 and 10^6 random 512-d vectors: `python -m benchmarks.gallery`.

Queries are noisy copies of enrolled vectors (cosine 0.6, as two pictures of one face have; 0.4 is a hard pair), and
random vectors, which nobody asks for but which are the hardest case: their nearest neighbour is hardly nearer than
the rest. Recall@1 is counted against a comparison with every row. Needs 3 GB of disk
and of memory for 10^6. `--keep` leaves the galleries in DIR, and takes them from there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from torchship.process import run
from torchship_faces.gallery import Enrolment, Gallery
from torchship_faces.gallery.gallery import noisy_copies

WIDTH = 512
QUERIES = 200
BATCH = 4000


def vectors(number: int, count: int) -> NDArray[np.float32]:
    """Batch `number` of the enrolled vectors."""
    return np.random.default_rng(number).standard_normal((count, WIDTH), dtype=np.float32)


def opened(root: Path) -> Gallery:
    return Gallery(root, model="benchmark", width=WIDTH)


def fill(gallery: Gallery, size: int) -> float:
    """Enrol `size` people; seconds."""
    spent = 0.0
    for number, start in enumerate(range(0, size, BATCH)):
        rows = vectors(number, min(BATCH, size - start))
        people = [Enrolment(person=f"p{start + n}", vectors=row[None]) for n, row in enumerate(rows)]
        began = time.perf_counter()
        gallery.enrol(people)
        spent += time.perf_counter() - began
    return spent


def copies(size: int, similarity: float) -> NDArray[np.float32]:
    """Queries near enrolled vectors out of all batches."""
    random = np.random.default_rng(7)
    picked = random.integers(0, size, QUERIES)
    rows = np.stack(
        [vectors(int(n) // BATCH, min(BATCH, size - int(n) // BATCH * BATCH))[int(n) % BATCH] for n in picked]
    )
    return noisy_copies(rows, similarity=similarity, random=random)


def timed(
    gallery: Gallery, queries: NDArray[np.float32], *, effort: int = 256
) -> tuple[list[str], NDArray[np.float64]]:
    """One query after another: who was found, and milliseconds."""
    for query in queries[:20]:
        gallery.nearest(query[None], effort=effort)
    found, times = [], []
    for query in queries:
        began = time.perf_counter()
        hit = gallery.nearest(query[None], effort=effort)[0][0]
        times.append((time.perf_counter() - began) * 1e3)
        found.append(hit.person)
    return found, np.array(times)


def restart(argument: str) -> dict[str, float]:
    """In a fresh process: seconds until the first answer, and resident memory in MB afterwards."""
    began = time.perf_counter()
    gallery = opened(Path(argument))
    opening = time.perf_counter() - began
    gallery.nearest(vectors(0, 1))
    first = time.perf_counter() - began
    for query in vectors(10**6, 50):
        gallery.nearest(query[None])
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    anonymous, resident = (int(fields[name].split()[0]) / 1e3 for name in ("Anonymous", "Rss"))
    return {"open": opening, "first": first, "rss": resident, "anonymous": anonymous}


def enrol_while_searching(gallery: Gallery, queries: NDArray[np.float32]) -> tuple[float, float, NDArray[np.float64]]:
    """One person at a time, each on disk before the next, for five seconds: a second alone, and while searching."""
    rows = vectors(10**7, 20_000)
    counts = [0]

    def enrol(seconds: float) -> float:
        began, start = time.perf_counter(), counts[0]
        while time.perf_counter() - began < seconds:
            row = rows[counts[0] % len(rows)]
            gallery.enrol([Enrolment(person=f"late{counts[0]}", vectors=row[None])])
            counts[0] += 1
        return (counts[0] - start) / (time.perf_counter() - began)

    alone = enrol(2.0)
    rates: list[float] = []
    thread = threading.Thread(target=lambda: rates.append(enrol(5.0)))
    thread.start()
    times: list[float] = []
    while thread.is_alive():
        began = time.perf_counter()
        gallery.nearest(queries[len(times) % len(queries)][None])
        times.append((time.perf_counter() - began) * 1e3)
    thread.join()
    return alone, rates[0], np.array(times)


def measure(root: Path, size: int) -> tuple[float, float]:
    """Everything for one size; p50 and recall of the queries at cosine 0.6."""
    print(f"\n{size:,} vectors of {WIDTH} numbers")
    gallery = opened(root)
    if not gallery.count()[1]:
        seconds = fill(gallery, size)
        print(f"  enrolled {BATCH} at a time: {size / seconds:,.0f} vectors/s, {seconds:.0f} s with all snapshots")
        began = time.perf_counter()
        gallery.compact()
        print(f"  compaction: {time.perf_counter() - began:.1f} s", flush=True)
    disk = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    found = run("benchmarks.gallery:restart", argument=str(root), timeout=600)
    if found.fault:
        raise SystemExit(found.fault)
    at = found.value
    print(f"  restart: open {at['open']:.2f} s, first answer {at['first']:.2f} s; disk {disk / 1e6:,.0f} MB")
    print(f"  memory: {at['anonymous']:,.0f} MB of its own, {at['rss']:,.0f} MB with the mapped vectors that were read")
    result = (0.0, 0.0)
    print(f"  {'queries':28} {'effort':>6} {'p50 ms':>8} {'p99 ms':>8} {'recall@1':>9}")
    for kind, queries in (
        ("copies at cosine 0.6", copies(size, 0.6)),
        ("copies at cosine 0.4", copies(size, 0.4)),
        ("random", vectors(10**6 + 1, QUERIES)),
    ):
        exact = [hits[0].person for hits in gallery.nearest(queries, exact=True)]
        for effort in (256,) if kind != "random" else (256, 2000, 10_000):
            people, times = timed(gallery, queries, effort=effort)
            recall = sum(a == b for a, b in zip(people, exact, strict=True)) / len(queries)
            p50, p99 = np.percentile(times, [50, 99])
            print(f"  {kind:28} {effort:6} {p50:8.2f} {p99:8.2f} {recall:9.3f}", flush=True)
            if kind.endswith("0.6"):
                result = (float(p50), recall)
    batch = copies(size, 0.6)[:64]
    began = time.perf_counter()
    gallery.nearest(batch)
    print(f"  a batch of 64: {(time.perf_counter() - began) / 64 * 1e3:.2f} ms a query")
    alone, together, times = enrol_while_searching(gallery, copies(size, 0.6))
    print(
        f"  one by one, each synced: {alone:,.0f} enrolments/s alone, {together:,.0f} while searching "
        f"(search p50 {np.median(times):.2f} ms, p99 {np.percentile(times, 99):.2f} ms meanwhile)"
    )
    gallery.close()
    return result


@click.command(help=f"{__doc__}")
@click.argument("sizes", nargs=-1, metavar="[SIZE]...", type=float)
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Leave the galleries there."
)
def main(*, sizes: tuple[float, ...], keep: Path | None) -> None:
    """Measure each size; the line for machines is of the last."""
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    p50 = recall = size = 0.0
    for size in sizes or (1e5, 1e6):
        root = keep / str(int(size)) if keep else Path(tempfile.mkdtemp(prefix="torchship-gallery-"))
        try:
            p50, recall = measure(root, int(size))
        finally:
            if not keep:
                shutil.rmtree(root, ignore_errors=True)
    print(f"vectors={int(size)} p50_ms={p50:.3f} recall={recall:.4f}")


if __name__ == "__main__":
    main()
