"""Laws of the line: it answers as the composed pipeline does, and every caller gets exactly its own rows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.replicas import InProcessReplica
from tests.serving import FORMS, WORDS, Background, planned
from torchship.errors import Expired, StageFailed, TorchshipError
from torchship.pipeline.composed import Composed
from torchship.pipeline.planning import Plan
from torchship.serve.engine.launch import WorkerThread
from torchship.serve.engine.line import Line
from torchship.serve.engine.replica import LocalReplica, Replica, ReplicaEvents, StartReplica
from torchship.serve.engine.spec import LineLimits, WorkerSpec
from torchship.tensors import Tensors

RELAXED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.sampled_from([-2.0, -1.0, 0.5, 1.0, 2.0, 3.0, 13.0])
PLANS: dict[str, tuple[dict[str, Any], ...]] = {
    "rows": ({"run": "double"}, {"run": "sums"}),
    "rows change": ({"run": "positive"}, {"run": "sums", "parameters": {"offset": 2}}),
    "odd arrays": ({"run": "odd", "outputs": {"y": "twice"}}, {"run": "sums", "inputs": {"y": "twice"}}),
    "fault": ({"run": "moody", "copies": 2}, {"run": "sums"}),
    "branch": (
        {"run": "double"},
        {"run": "moody", "outputs": {"y": "other"}},
        {"run": "sums", "inputs": {"y": "other"}},
    ),
    "carried": ({"run": "double", "outputs": {"y": "twice"}}, {"run": "positive"}, {"run": "sums"}),
}


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    made = Background()
    yield made
    made.close()


def three_ways(plan: Plan, background: Background) -> Iterator[tuple[Line, Line, Composed]]:
    """A line with worker processes, one with replicas inside this process, and all stages in a row."""
    line, inside = background.run(opened(plan)), background.run(opened(plan, start=InProcessReplica))
    composed = Composed(plan)
    yield line, inside, composed
    background.run(line.close())
    background.run(inside.close())
    composed.close()


@pytest.fixture(scope="module", params=PLANS)
def trio(request: pytest.FixtureRequest, background: Background) -> Iterator[tuple[Line, Line, Composed]]:
    """A line of processes, one of replicas in this process, and no line at all."""
    plan = planned(*PLANS[request.param])
    yield from three_ways(plan, background)


async def opened(plan: Plan, *, start: StartReplica = LocalReplica) -> Line:
    return await Line(plan, limits=LineLimits(), start=start).open()


async def ask(line: Line, tensors: Tensors, **options: Any) -> Tensors | TorchshipError:
    try:
        return await line.submit(tensors, **options)
    except TorchshipError as fault:
        return fault


def attempt(stage: Composed, tensors: Tensors, parameters: dict[str, Any]) -> Tensors | TorchshipError:
    try:
        return stage(tensors, parameters)
    except TorchshipError as fault:
        return fault


def same(found: Tensors | TorchshipError, expected: Tensors | TorchshipError) -> None:
    if isinstance(expected, TorchshipError):
        assert type(found) is type(expected)
        assert str(found) == str(expected)
        return
    assert not isinstance(found, TorchshipError), found
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)


@RELAXED
@given(rows=st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=20), offset=st.integers(0, 9))
def test_line_equals_composed(
    trio: tuple[Line, Line, Composed], background: Background, rows: list[list[float]], offset: int
) -> None:
    line, inside, composed = trio
    tensors = {"x": np.array(rows, np.float32)}
    parameters = {"offset": offset} if offset else {}
    expected = attempt(composed, tensors, parameters)
    same(background.run(ask(line, tensors, parameters=parameters)), expected)
    same(background.run(ask(inside, tensors, parameters=parameters)), expected)


def threaded(spec: WorkerSpec, events: ReplicaEvents) -> Replica:
    return LocalReplica(spec, events, launch=WorkerThread)


@pytest.fixture(scope="module", params=PLANS)
def in_threads(request: pytest.FixtureRequest, background: Background) -> Iterator[tuple[Line, Composed]]:
    """A line whose workers are threads of this process, and no line at all."""
    plan = planned(*PLANS[request.param])
    line, composed = background.run(opened(plan, start=threaded)), Composed(plan)
    yield line, composed
    background.run(line.close())
    composed.close()


@RELAXED
@given(rows=st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=20), offset=st.integers(0, 9))
def test_a_line_in_one_process_equals_composed(
    in_threads: tuple[Line, Composed], background: Background, rows: list[list[float]], offset: int
) -> None:
    line, composed = in_threads
    tensors = {"x": np.array(rows, np.float32)}
    parameters = {"offset": offset} if offset else {}
    same(background.run(ask(line, tensors, parameters=parameters)), attempt(composed, tensors, parameters))


@pytest.fixture(scope="module")
def disguised(background: Background) -> Iterator[tuple[Line, Line, Composed]]:
    plan = planned({"run": "disguised"}, {"run": "disguised", "name": "again", "inputs": {"x": "y", "word": "said"}})
    yield from three_ways(plan, background)


@settings(RELAXED, max_examples=40)
@given(
    rows=st.lists(st.tuples(VALUES, VALUES, st.binary(max_size=4)), min_size=1, max_size=7),
    form=st.sampled_from(list(FORMS)),
    words=st.sampled_from(["bytes", "text", "fixed width", "buffers"]) | st.sampled_from(list(WORDS)),
    asked=st.sampled_from(["=", ">", "<"]),
)
def test_line_equals_composed_whatever_the_arrays_are_made_of(
    disguised: tuple[Line, Line, Composed],
    background: Background,
    rows: list[tuple[float, float, bytes]],
    form: str,
    words: str,
    asked: str,
) -> None:
    """Byte order, strides and objects: the same values on all ways, or the same error."""
    line, inside, composed = disguised
    word = np.array([*(row[2] for row in rows), None], object)[:-1]
    tensors = {"x": np.array([row[:2] for row in rows], f"{asked}f4"), "word": word}
    parameters = {"form": form, "words": words}
    expected = attempt(composed, tensors, parameters)
    same(background.run(ask(line, tensors, parameters=parameters)), expected)
    same(background.run(ask(inside, tensors, parameters=parameters)), expected)
    wrong = {"long doubles", "complex", "lists", "numbers", "nothing", "surrogates"} & {form, words}
    assert isinstance(expected, StageFailed) == bool(wrong)
    if not isinstance(expected, TorchshipError) and form not in ("the same again",):
        assert np.array_equal(expected["y"], tensors["x"])
        if words in ("bytes", "buffers"):
            assert expected["said"].tolist() == word.tolist()


@pytest.fixture(
    scope="module",
    params=[
        ({"run": "shifted"},),
        ({"run": "shifted", "outputs": {"rows": "many"}}, {"run": "Total"}),
        ({"run": "double"}, {"run": "shifted", "inputs": {"x": "y"}}),  # nothing is named bias or word: never there
        ({"run": "either"},),
    ],
)
def partial(request: pytest.FixtureRequest, background: Background) -> Iterator[tuple[Line, Line, Composed]]:
    plan = planned(*request.param)
    yield from three_ways(plan, background)


@settings(RELAXED, max_examples=15)
@given(
    jobs=st.lists(
        st.tuples(st.lists(VALUES, min_size=1, max_size=20), st.booleans(), st.booleans()), min_size=1, max_size=12
    )
)
def test_line_equals_composed_whichever_inputs_are_there(
    partial: tuple[Line, Line, Composed], background: Background, jobs: list[tuple[list[float], bool, bool]]
) -> None:
    """Requests with and without the optional inputs, at the same time: each gets the answer that it gets alone."""
    line, inside, composed = partial
    names = {spec.name for spec in composed.signature.inputs}
    asked: list[Tensors] = []
    for values, with_bias, with_word in jobs:
        x = np.array([[value] * 4 for value in values], np.float32)
        word = np.array([[b"a\0", b"b"][: 1 + len(x) % 2]] * len(x), object)
        if "text" in names:
            asked.append(({"x": x[0, :1]} if with_bias else {}) | ({"text": word[0, :1]} if with_word else {}))
            continue
        more = ({"bias": x * 3} if with_bias else {}) | ({"word": word} if with_word else {})
        asked.append({"x": x} | {name: array for name, array in more.items() if name in names})
    expected = [attempt(composed, tensors, {}) for tensors in asked]

    async def all_of_them(line: Line) -> list[Tensors | TorchshipError]:
        return await asyncio.gather(*(ask(line, tensors) for tensors in asked))

    for one in (line, inside):
        for found, right in zip(background.run(all_of_them(one)), expected, strict=True):
            assert not isinstance(right, TorchshipError), right
            assert not isinstance(found, TorchshipError), found
            counted = {"rows", "many"}  # of the batch, which is larger on a line
            same(*({n: a for n, a in some.items() if n not in counted} for some in (found, right)))


@pytest.fixture(scope="module")
def moody(background: Background) -> Iterator[Line]:
    line = background.run(
        opened(planned({"run": "double", "copies": 2}, {"run": "moody", "copies": 2, "inputs": {"x": "y"}}))
    )
    yield line
    background.run(line.close())


JOB = st.tuples(
    st.integers(1, 12),
    st.sampled_from(["fine"] * 12 + ["raise", "late"]),
    st.integers(0, 2),
)


@settings(RELAXED, max_examples=20)
@given(jobs=st.lists(JOB, min_size=1, max_size=40), kill=st.booleans())
def test_every_caller_gets_its_own_rows(
    moody: Line, background: Background, jobs: list[tuple[int, str, int]], kill: bool
) -> None:
    async def all_of_them() -> list[Tensors | TorchshipError]:
        asked = []
        for index, (rows, fate, priority) in enumerate(jobs):
            x = np.full((rows, 4), index + 20_000, np.float32)
            if fate == "raise":
                x[-1] = 6.5  # doubled, it is thirteen
            deadline = 1e-6 if fate == "late" else 0.0
            asked.append(asyncio.ensure_future(ask(moody, {"x": x}, deadline=deadline, priority=priority)))
        await asyncio.sleep(0)
        if kill:
            for node in moody.nodes:
                node.station.replicas[0].kill("a test wants it")
        return await asyncio.gather(*asked)

    for index, ((rows, fate, _), found) in enumerate(zip(jobs, background.run(all_of_them()), strict=True)):
        if fate == "raise":
            assert isinstance(found, StageFailed)
            assert "thirteen" in str(found)
        elif fate == "late":
            assert isinstance(found, Expired)
        else:
            assert not isinstance(found, TorchshipError), found
            assert np.array_equal(found["y"], np.full((rows, 4), 2 * (index + 20_000) + 1, np.float32))
    assert (moody.admission.jobs, moody.admission.rows, moody.admission.size) == (0, 0, 0)


def test_no_slot_is_lost(moody: Line, background: Background) -> None:
    """After all that, every slot of every worker is free again."""

    async def settle() -> list[tuple[int, int]]:
        for _ in range(1500):
            replicas = [replica for node in moody.nodes for replica in node.station.replicas]
            if len(replicas) == 4 and all(one.state == "ready" and not one.in_flight for one in replicas):
                break
            await asyncio.sleep(0.02)
        return [(one.room, one.slots) for one in replicas]

    assert all(free == depth for free, depth in background.run(settle()))
