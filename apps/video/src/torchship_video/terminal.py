"""The live view in a terminal: a table of the cameras, drawn again and again; plain lines where there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torchship_video.messages import CameraStatus
from torchship_video.sinks.runner import SinkStatus

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_COLORS = {"live": "green", "ended": "dim", "paused": "cyan", "failed": "red", "running": "green"}
_SELDOM = 10.0  # seconds between two lines of a camera whose state stays as it is


async def show(
    status: Callable[[], Sequence[CameraStatus]],
    *,
    sinks: Callable[[], Sequence[SinkStatus]] = list,
    note: str = "",
    every: float = 0.5,
    console: Console | None = None,
) -> None:
    """Show the cameras until cancelled; `note` stands below them, such as the address of the page.

    Without a terminal a line is written for a camera when its state changes, and every ten seconds.
    """
    from rich.console import Console
    from rich.live import Live

    console = console or Console(stderr=True)
    if not console.is_terminal:
        await _show_lines(status, sinks, console, note=note, every=every)
        return
    with Live(console=console, auto_refresh=False) as live:
        try:
            while True:
                live.update(whole(status(), sinks(), note=note), refresh=True)
                await asyncio.sleep(every)
        finally:
            live.update(whole(status(), sinks(), note=note), refresh=True)


def whole(cameras: Sequence[CameraStatus], sinks: Sequence[SinkStatus] = (), *, note: str = "") -> RenderableType:
    """The table of the cameras, what is wrong with sinks, and a note."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("camera", overflow="fold")
    table.add_column("state")
    for name in ("fps", "age p50", "p99 ms", "frames", "drops", "tracks"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    for camera in cameras:
        table.add_row(
            Text(camera.camera),
            Text(camera.state, style=_COLORS.get(camera.state, "yellow")),
            f"{camera.fps:.1f}",
            f"{camera.age_p50_ms:.0f}",
            f"{camera.age_p99_ms:.0f}",
            str(camera.frames),
            str(camera.drops),
            str(camera.tracks),
            Text(camera.words),
        )
    below = [Text(sink_line(sink), style="yellow" if sink.state != "running" else "dim") for sink in sinks]
    return Group(table, *below, *([Text(note, style="bold")] if note else []))


def camera_line(camera: CameraStatus) -> str:
    """A camera in one line, for logs and pipes."""
    words = f": {camera.words}" if camera.words else ""
    return (
        f"{camera.camera} {camera.state}{words}, {camera.fps:.1f} fps, age {camera.age_p50_ms:.0f}/"
        f"{camera.age_p99_ms:.0f} ms, {camera.frames} frames, {camera.drops} dropped, {camera.tracks} tracks"
    )


def sink_line(sink: SinkStatus) -> str:
    """A sink in one line."""
    missed = {"dropped": sink.dropped, "stale": sink.stale, "lost": sink.lost, "restarts": sink.restarts}
    parts = [f"{sink.name} {sink.state}", f"{sink.written} written"]
    parts += [f"{number} {what}" for what, number in (missed | sink.facts).items() if number]
    return ", ".join(parts) + (f": {sink.words}" if sink.words else "")


async def _show_lines(
    status: Callable[[], Sequence[CameraStatus]],
    sinks: Callable[[], Sequence[SinkStatus]],
    console: Console,
    *,
    note: str,
    every: float,
) -> None:
    if note:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    told: dict[str, tuple[str, float]] = {}
    clock = asyncio.get_running_loop().time

    def tell(seldom: float) -> None:
        for name, state, line in [
            *((f"camera {found.camera}", f"{found.state}{found.words}", camera_line(found)) for found in status()),
            *((f"sink {found.name}", f"{found.state}{found.words}", sink_line(found)) for found in sinks()),
        ]:
            before, at = told.get(name, ("", 0.0))
            if state != before or clock() - at >= seldom:
                told[name] = (state, clock())
                console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        while True:
            tell(_SELDOM)
            await asyncio.sleep(every)
    finally:
        tell(0.0)  # how it ended
