"""What a worker prints: line by line, never more than its share, and counted where it is too much."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from torchship.serve.ipc.output import WorkerOutput


def printed(
    data: list[bytes], *, wait: Callable[[list[str]], bool] = lambda lines: False
) -> tuple[list[str], list[str]]:
    """The lines that are passed on when a worker writes `data`, and the last lines."""

    async def work() -> tuple[list[str], list[str]]:
        lines: list[str] = []
        output = WorkerOutput(loop=asyncio.get_running_loop(), on_line=lines.append)
        for piece in data:
            view = memoryview(piece)
            while view:
                view = view[await asyncio.to_thread(os.write, output.inlet, view) :]
        os.close(output.inlet)
        async with asyncio.timeout(10):
            while wait(lines):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        output.close()
        return lines, output.last_lines

    return asyncio.run(work())


def test_lines_come_whole_however_they_are_written() -> None:
    lines, last = printed([b"one\ntw", b"o\nthr\xffee\n", b"no end"])
    assert lines == ["one", "two", "thr\ufffdee", "no end"]
    assert last == lines


def test_a_flood_is_cut_and_counted() -> None:
    data = b"".join(b"step %d\n" % number for number in range(200_000))
    lines, last = printed([data, b"the end\n"])
    shown = [line for line in lines if line.startswith("step")]
    assert shown[:3] == ["step 0", "step 1", "step 2"]
    assert 1000 <= len(shown) < 20_000
    assert last[-1] == "the end"


def test_what_was_cut_is_told_when_it_is_quiet_again() -> None:
    async def work() -> list[str]:
        lines: list[str] = []
        output = WorkerOutput(loop=asyncio.get_running_loop(), on_line=lines.append)
        os.write(output.inlet, b"x\n" * 5000)
        await asyncio.sleep(0.3)
        os.write(output.inlet, b"quiet\n")
        async with asyncio.timeout(10):
            while "quiet" not in lines:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        os.close(output.inlet)
        output.close()
        return lines

    lines = asyncio.run(work())
    told = [line for line in lines if "printed too fast" in line]
    assert sum(int(line[1:].split()[0]) for line in told) + lines.count("x") == 5000


def test_a_line_without_end_is_cut_into_pieces() -> None:
    lines, _ = printed([b"x" * 300_000])
    assert lines
    assert max(map(len, lines)) == 2000


def test_an_assertion_of_many_threads_is_told_once_and_counted() -> None:
    where = "/pytorch/aten/src/ATen/native/cuda/Indexing.cu:1553: indexSelectLargeIndex"
    flood = [
        f"{where}: block: [{n // 32},0,0], thread: [{n % 32},0,0] Assertion `i < size` failed." for n in range(300)
    ]
    other = f"{where}: block: [1,0,0], thread: [2,0,0] Assertion `i >= 0` failed."
    advice = "CUDA kernel errors might be asynchronously reported at some other API call."
    end = "RuntimeError: CUDA error: device-side assert triggered"
    text = "\n".join(["start", *flood, other, other, "x", "x", end, advice, ""]).encode()
    lines, last = printed([text[:5000], text[5000:]])
    told = "(the same of 299 more threads)", other, "(the same of 1 more threads)"
    assert lines == ["start", flood[0], *told, "x", "x", end, advice]
    assert last[-5:] == [last[0], other, "x", "x", end]
    assert "`i < size`" in last[0]


def test_an_assertion_at_the_very_end_is_counted_too() -> None:
    line = b"a.cu:1: f: block: [0,0,0], thread: [%d,0,0] Assertion `ok` failed.\n"
    lines, _ = printed([b"".join(line % n for n in range(4))])
    assert lines[1:] == ["(the same of 3 more threads)"]
