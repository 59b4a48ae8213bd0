"""Sequences: in order, on one worker, with a start, an end and an idle time-out; their state dies with the worker."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from tests.unit.serve.test_line import Opened, run, until
from torchship.errors import BadInput, StageFailed
from torchship.serve.engine.line import Line
from torchship.tensors import Tensors


def ask(line: Line, value: int, name: str | int, *, start: bool = False, end: bool = False) -> asyncio.Future[Tensors]:
    values = {"sequence_id": name, "sequence_start": start, "sequence_end": end}
    return line.submit({"x": np.array([value], np.int32)}, parameters=values)


def test_each_sequence_has_its_worker_and_its_order() -> None:
    async def work() -> None:
        async with Opened({"run": "Totals", "copies": 2}) as line:
            names: list[str | int] = ["a", "b", "c", 7]
            asked = [(name, ask(line, 1, name, start=True)) for name in names]
            asked += [(name, ask(line, value, name)) for value in range(2, 6) for name in names]
            asked += [(name, ask(line, 10, name, end=True)) for name in names]
            answers = [(name, await future) for name, future in asked]
            for name in names:
                mine = [answer for one, answer in answers if one == name]
                assert [int(answer["total"][0]) for answer in mine] == [1, 3, 6, 10, 15, 25]
                assert len({int(answer["pid"][0]) for answer in mine}) == 1
            assert len({int(answer["pid"][0]) for _, answer in answers}) == 2
            with pytest.raises(BadInput, match="was not started"):
                ask(line, 1, "a")
            assert line.admission.jobs == 0

    run(work)


def test_start_and_end_count_even_where_the_stage_does_not_name_them() -> None:
    async def work() -> None:
        async with Opened({"run": "Members"}) as line:
            for number in range(20):  # each is over before the next
                assert int((await ask(line, 1, number + 1, start=True))["total"][0]) == 1
                assert int((await ask(line, 1, number + 1, end=True))["total"][0]) == 2
            assert line._sequences is not None
            assert len(line._sequences) == 0
            with pytest.raises(BadInput, match="'sequence_end' is 'yes', expected bool"):
                line.submit({"x": np.array([1], np.int32)}, parameters={"sequence_id": "a", "sequence_end": "yes"})

    run(work)


def test_idle_sequences_end() -> None:
    async def work() -> None:
        async with Opened({"run": "Totals"}, sequence_idle=0.2) as line:
            await ask(line, 1, "a", start=True)
            assert line._sequences is not None
            await until(lambda: not line._sequences)
            with pytest.raises(BadInput, match=r"idle for more than 0\.2 s"):
                ask(line, 1, "a")

    run(work)


def test_a_lost_worker_is_told_and_its_sequences_start_anew() -> None:
    async def work() -> None:
        async with Opened({"run": "Totals"}) as line:
            await ask(line, 1, "a", start=True)
            killed, behind = ask(line, 666, "a"), ask(line, 2, "a")
            for future in (killed, behind):
                with pytest.raises(StageFailed, match=r"is lost|SIGKILL"):
                    await future
            await until(lambda: line.ready)
            with pytest.raises(BadInput, match="was not started"):
                ask(line, 1, "a")
            assert int((await ask(line, 5, "a", start=True))["total"][0]) == 5

    run(work)
