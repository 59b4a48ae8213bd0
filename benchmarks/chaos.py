"""kill -9 of a worker every second under load: no request may be lost, and none may get another's answer.

    python -m benchmarks.chaos [--seconds 60] [--callers 16] [--receivers 2]

A pipeline of two stages with two workers each is served by a process of its own. Receivers, where there are some, are
killed too: then their connections are cut, and no others.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time

import click
import psutil
import uvloop

from benchmarks.callers import Running, Tally, caller, pipeline, serving


async def killer(host: psutil.Process, *, every: float, until: float) -> int:
    """kill -9 of one child after the other; how many."""
    kills = 0
    while time.monotonic() < until - every:
        await asyncio.sleep(every)
        workers = host.children()
        if workers:
            os.kill(random.choice(workers).pid, signal.SIGKILL)
            kills += 1
    return kills


async def storm(server: Running, *, seconds: float, callers: int, every: float) -> tuple[Tally, int]:
    """Load and kills together."""
    tally = Tally()
    until = time.monotonic() + seconds
    work = [caller(number, port=server.port, model="chaos", until=until, tally=tally) for number in range(callers)]
    killing = asyncio.ensure_future(killer(server.host, every=every, until=until))
    await asyncio.gather(killing, *work)
    return tally, killing.result()


@click.command()
@click.option("--seconds", default=60.0, help="How long.")
@click.option("--callers", default=16, help="Connections.")
@click.option("--every", default=1.0, help="Seconds between two kills.")
@click.option("--receivers", default=0, help="Processes that run the connections.")
def main(*, seconds: float, callers: int, every: float, receivers: int) -> None:
    """Run the storm, print what was seen, and the line for machines; exit code 1 when anything was lost."""
    with serving(f"[http]\nreceivers = {receivers}\n" + pipeline("chaos", copies=2)) as server:
        tally, kills = uvloop.run(storm(server, seconds=seconds, callers=callers, every=every))
    print(f"refused with 503: {tally.refused}; other answers: {dict(tally.others) or 'none'}")
    counts = f"sent={tally.sent} answered={tally.answered} lost={tally.lost} crossed={tally.crossed}"
    print(f"{counts} cut={tally.cut} kills={kills}")
    sys.exit(bool(tally.lost or tally.crossed or (tally.cut and not receivers)))


if __name__ == "__main__":
    main()
