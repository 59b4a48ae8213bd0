"""`torchship bench URL|ARTIFACT`: how much it serves, and how fast."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import uvloop

from torchship import process
from torchship.cli import _shown
from torchship.client import Client, load
from torchship.client.address import caller_context, parse
from torchship.client.load import CallOutcome, Target
from torchship.client.report import render
from torchship.errors import BadConfig, Unavailable


@click.command(
    epilog="""\b
Examples:
  torchship bench http://127.0.0.1:8000/resnet18 --concurrency 1,8,64
  torchship bench grpc://127.0.0.1:8000/classify --input cat.jpg
  torchship bench resnet18 --rate 50,100 --seconds 20
  torchship bench http://127.0.0.1:8000/resnet18 --sweep p99=50ms --html load.html

\b
With --concurrency every caller waits for its answer before it asks again. With --rate requests come
at random moments whatever the server does, and a latency counts from the moment a request was due.
"""
)
@click.argument("target", metavar="URL|ARTIFACT")
@click.option("--concurrency", default="1,8,64", show_default=True, metavar="N,N,...", help="Numbers of callers.")
@click.option("--rate", default="", metavar="R,R,...", help="Requests a second that arrive at random, instead.")
@click.option("--sweep", default="", metavar="pNN=TIME", help="Find the load at which this target breaks, as p99=50ms.")
@click.option("--seconds", default=5.0, show_default=True, type=click.FloatRange(0.05), help="Length of each run.")
@click.option("--warm-up", default=0.5, show_default=True, type=click.FloatRange(0), help="Seconds before it counts.")
@click.option(
    "--encoding", default="binary", show_default=True, type=click.Choice(["binary", "json"]), help="Over HTTP."
)
@click.option("--input", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="What a BYTES input holds, such as a picture.")  # fmt: skip
@click.option("--rows", default=1, show_default=True, type=click.IntRange(1), help="Rows of a request.")
@click.option("--free-axis", default=1, show_default=True, type=click.IntRange(1), help="Length of other free axes.")
@click.option("--token", default="", envvar="TORCHSHIP_TOKEN", help="Access token.  [env: TORCHSHIP_TOKEN]")
@click.option("--authority", default="", metavar="PEM", help="Whose certificates to believe, for https and grpcs.")
@click.option("--certificate", default="", metavar="PEM", help="The caller's own, where the server asks for one.")
@click.option("--key", default="", metavar="PEM", help="Its private key.")
@click.option("--store", default="", metavar="DIR", help="Where artifacts are found by name.")
@click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON to stdout.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with a plot.")
def command(*, target: str, store: str, as_json: bool, html: Path | None, **options: Any) -> int:
    """Load a served model (a URL) or an artifact (served for the time of the test), and tell rate and latencies."""
    if options["sweep"]:  # before a server is started for it
        _goal(options["sweep"])
    else:
        _numbers(options["rate"] or options["concurrency"])
    with _served(target, store=store) as url:
        rows = uvloop.run(_measure(url, quiet=as_json, **options))
    plain = [row.plain() for row in rows]
    if as_json:
        _shown.print_json({"target": target, "runs": plain})
    if html is not None:
        html.write_text(render(plain, title=f"torchship bench {target}"))
    return 0 if all(row.latencies for row in rows) else 1


async def _measure(url: str, *, quiet: bool, **options: Any) -> list[CallOutcome]:
    address = parse(url)
    if not address.model:
        raise BadConfig(f"{url} names no model", hint="as in http://127.0.0.1:8000/resnet18")
    encoding = "grpc" if address.grpc else options["encoding"]
    papers = {name: options[name] for name in ("authority", "certificate", "key")}
    tls = caller_context(**papers) if address.secure else None
    target = load.Target(address, address.model, encoding, options["token"], tls)
    file = options["file"].read_bytes() if options["file"] else None
    tensors = await load.example(target, rows=options["rows"], file=file, free=options["free_axis"])
    rows: list[CallOutcome] = []
    if not quiet:
        click.echo(f"{'load':>14} {'answers/s':>10} {'p50 ms':>9} {'p90 ms':>9} {'p99 ms':>9} {'p99.9 ms':>9}  faults")
    async for row in _runs(target, target.payload(tensors), **options):
        rows.append(row)
        if not quiet:
            click.echo(_line(row))
    if options["sweep"] and not quiet:
        percent, limit = _goal(options["sweep"])
        good = [row.rate for row in rows if row.kind == "open" and row.meets(percent=percent, limit=limit)]
        click.echo(f"within {options['sweep']}: {max(good, default=0.0):.0f} requests/s")
    return rows


async def _runs(target: Target, payload: bytes, **options: Any) -> AsyncIterator[CallOutcome]:
    times = {"seconds": options["seconds"], "warm_up": options["warm_up"]}
    if options["sweep"]:
        percent, limit = _goal(options["sweep"])
        async for run in load.sweep(target, payload, percent=percent, limit=limit, **times):
            yield run
    elif options["rate"]:
        for rate in _numbers(options["rate"]):
            yield await load.open_loop(target, payload, rate=rate, seconds=options["seconds"], lanes=128)
    else:
        for callers in _numbers(options["concurrency"]):
            yield await load.closed_loop(target, payload, concurrency=int(callers), **times)


def _line(run: CallOutcome) -> str:
    times = " ".join(f"{run.percentile(percent) * 1e3:9.3f}" for percent in (50, 90, 99, 99.9))
    faults = ", ".join(f"{count} {kind}" for kind, count in run.faults.items())
    late = f"{run.late} unanswered" if run.late else ""
    return f"{run.load:>14} {run.rate:10.1f} {times}  {', '.join(filter(None, (faults, late))) or 'none'}"


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(not 0 < number < 1e7 for number in found):
        raise click.UsageError(f"{text!r} is not a list of numbers above 0, as in 1,8,64")
    return found


def _goal(text: str) -> tuple[float, float]:
    """`p99=50ms` as a percentile and seconds."""
    found = re.fullmatch(r"p(\d{1,2}(?:\.\d+)?)=(\d+(?:\.\d+)?)(us|ms|s)", text)
    if not found:
        raise click.UsageError(f"{text!r} is not a latency target, as in p99=50ms")
    return float(found[1]), float(found[2]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[3]]


@contextmanager
def _served(target: str, *, store: str) -> Iterator[str]:
    """The URL itself, or that of a server that is started for an artifact and stopped afterwards."""
    if "://" in target:
        yield target
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "torchship", "serve", target, "--http-port", str(port), "--log-level", "warning"]
    words += ["--store", store] if store else []
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(words, stderr=log, stdout=log, start_new_session=True)
        try:
            yield f"http://127.0.0.1:{port}/{_await_model(port, server, log)}"
        finally:
            process.stop(server, grace=30)


def _await_model(port: int, server: Any, log: Any) -> str:
    """The name of the model, once the server is ready. Raises Unavailable with its last words where it ends."""
    with Client(f"http://127.0.0.1:{port}") as client:
        end = time.monotonic() + 180
        while time.monotonic() < end and server.poll() is None:
            if client.ready():
                return str(client.statistics()["model_stats"][0]["name"])
            time.sleep(0.1)
    log.seek(0)
    words = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line.partition(": ")[2] for line in words if line.startswith(("error: ", "hint: "))] or words[-1:]
    raise Unavailable(f"the server did not start: {said[0] if said else 'no words'}", hint="; ".join(said[1:]))
