"""The live table of a terminal, and the lines that stand for it where there is none."""

from __future__ import annotations

import asyncio
import io
from contextlib import suppress

from rich.console import Console

from torchship_video.messages import CameraStatus
from torchship_video.sinks.runner import SinkStatus
from torchship_video.terminal import show, whole

LIVE = CameraStatus("door", "live", fps=24.96, age_p50_ms=31.4, age_p99_ms=80, frames=1234, drops=5, tracks=3)
DEAD = CameraStatus("[bold]yard", "reconnecting", words="refused; again in 8 s")
SINK = SinkStatus("hook", "webhook", "restarting", "nobody there", written=3, dropped=2, facts={"spooled": 7})


def shown(statuses: list[CameraStatus], *, terminal: bool, width: int = 120) -> str:
    """What is written in a moment, with the state of the first camera changing on the way."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)

    async def work() -> None:
        task = asyncio.ensure_future(
            show(lambda: statuses, sinks=lambda: [SINK], note="see http://a/watch", every=0.01, console=console)
        )
        await asyncio.sleep(0.1)
        statuses[0] = CameraStatus("door", "ended")
        await asyncio.sleep(0.1)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(work())
    return out.getvalue()


def test_the_table_has_a_row_a_camera_and_what_is_wrong_with_sinks() -> None:
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(whole([LIVE, DEAD], [SINK], note="see http://a/watch"))
    rows = [line.split() for line in console.export_text().splitlines()]
    assert rows[0] == ["camera", "state", "fps", "age", "p50", "p99", "ms", "frames", "drops", "tracks"]
    assert rows[1] == ["door", "live", "25.0", "31", "80", "1234", "5", "3"]
    assert rows[2][:2] == ["[bold]yard", "reconnecting"]
    assert " ".join(rows[3]) == "hook restarting, 3 written, 2 dropped, 7 spooled: nobody there"
    assert " ".join(rows[4]) == "see http://a/watch"


def test_without_a_terminal_a_line_comes_when_a_state_changes() -> None:
    lines = shown([LIVE, DEAD], terminal=False).splitlines()
    last = ["door", "[bold]yard", "hook"]  # how it ended
    assert lines[0] == "see http://a/watch"
    assert [line.split()[0] for line in lines[1:]] == ["door", "[bold]yard", "hook", "door", *last]
    assert lines[2].startswith("[bold]yard reconnecting: refused; again in 8 s, 0.0 fps")
    assert "\x1b" not in "".join(lines)


def test_in_a_terminal_the_table_is_drawn_again_and_stays_in_the_end() -> None:
    out = shown([LIVE, DEAD], terminal=True)
    assert out.count("see http://a/watch") > 2
    assert "ended" in out.rpartition("camera")[2]


def test_a_narrow_terminal_keeps_the_figures() -> None:
    assert "1234" in shown([LIVE], terminal=True, width=60)
