"""A reload every second under load: every request must be answered, and rightly.

    python -m benchmarks.reload [--seconds 60] [--callers 8]

Each reload opens the whole pipeline in fresh processes, turns to it, and drains the old one.
"""

from __future__ import annotations

import asyncio
import sys
import time

import click
import uvloop

from benchmarks.callers import Tally, caller, pipeline, post, serving

CONFIG = f"[control]\nrepository = true\n{pipeline('turned', copies=1)}"


async def reloader(port: int, *, every: float, until: float) -> int:
    """Load the model again and again, a second after the last time or when that is done; how often."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reloads = 0
    while time.monotonic() < until - every:
        due = time.monotonic() + every
        status, body = await post(reader, writer, "/v2/repository/models/turned/load", b"{}")
        assert status == 200, body
        reloads += 1
        await asyncio.sleep(max(0.0, due - time.monotonic()))
    writer.close()
    return reloads


async def turn(port: int, *, seconds: float, callers: int, every: float) -> tuple[Tally, int]:
    """Load and reloads together."""
    tally = Tally()
    until = time.monotonic() + seconds
    work = [caller(number, port=port, model="turned", until=until, tally=tally) for number in range(callers)]
    reloading = asyncio.ensure_future(reloader(port, every=every, until=until))
    await asyncio.gather(reloading, *work)
    return tally, reloading.result()


@click.command()
@click.option("--seconds", default=60.0, help="How long.")
@click.option("--callers", default=8, help="Connections.")
@click.option("--every", default=1.0, help="Seconds between the beginnings of two reloads.")
def main(*, seconds: float, callers: int, every: float) -> None:
    """Reload, print what was seen, and the line for machines; exit code 1 for any error."""
    with serving(CONFIG) as server:
        tally, reloads = uvloop.run(turn(server.port, seconds=seconds, callers=callers, every=every))
    errors = tally.lost + tally.refused
    print(f"refused with 503: {tally.refused}; other answers: {dict(tally.others) or 'none'}")
    print(f"sent={tally.sent} answered={tally.answered} errors={errors} crossed={tally.crossed} reloads={reloads}")
    sys.exit(bool(errors or tally.crossed))


if __name__ == "__main__":
    main()
