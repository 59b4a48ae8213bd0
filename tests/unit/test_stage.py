"""Functions and classes as stages, request parameters, join and split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
import numpy as np
import pytest

from torchship.errors import BadConfig, BadInput
from torchship.stage import FunctionStage, Parameter, Stage, join, stage
from torchship.tensors import Array

Score = Annotated[float, msgspec.Meta(ge=0, le=1, description="smallest score that is kept")]


@stage("scores:FP32[-1] -> kept:FP32[-1], count:INT64[1]")
def keep(scores: Array, *, threshold: Score = 0.5) -> tuple[Array, Array]:
    kept = scores[scores >= threshold]
    return kept, np.array([kept.size])


@stage("x:INT32[-1,2] -> y:INT32[-1,2]", batched=True, max_batch=8)
class Scale:
    def __init__(self, by: int = 2) -> None:
        self.by, self.closed = by, False

    def __call__(self, x: Array) -> Array:
        return x * self.by

    def close(self) -> None:
        self.closed = True


@stage("n:INT32[1] -> i:INT32[1]")
def count(n: Array) -> Iterator[Array]:
    for i in range(int(n[0])):
        yield np.array([i], np.int32)


SCORES = {"scores": np.array([0.2, 0.6, 0.9], np.float32)}


def test_a_function_is_a_stage() -> None:
    made = FunctionStage(keep)
    assert isinstance(made, Stage)
    assert made.max_batch == 1
    assert not made.signature.batched
    assert made(SCORES)["count"] == [2]
    assert made(SCORES, {"threshold": 0.7})["kept"].tolist() == pytest.approx([0.9])
    assert made.parameters == (Parameter("threshold", 0.5, 0.0, 1.0, "smallest score that is kept"),)


@pytest.mark.parametrize(
    ("value", "fault"), [(1.5, "0.0 to 1.0"), ("x", "float"), (float("nan"), "0.0"), (True, "float")]
)
def test_parameters_are_checked(value: object, fault: str) -> None:
    with pytest.raises(BadInput, match=fault):
        FunctionStage(keep)(SCORES, {"threshold": value})  # type: ignore[dict-item]


def test_a_class_is_made_with_its_options_and_closed() -> None:
    made = FunctionStage(Scale, options={"by": 3})
    assert made({"x": np.ones((2, 2), np.int32)})["y"].tolist() == [[3, 3], [3, 3]]
    assert (made.max_batch, made.signature.batched) == (8, True)
    made.close()
    with pytest.raises(BadConfig, match="options of Scale"):
        FunctionStage(Scale, options={"bye": 3})


def test_generators_stream() -> None:
    made = FunctionStage(count)
    assert made.streams
    assert [answer["i"][0] for answer in made.stream({"n": np.array([3], np.int32)})] == [0, 1, 2]


def test_undeclared_functions_are_refused() -> None:
    with pytest.raises(BadConfig, match="declares no signature"):
        FunctionStage(lambda x: x)
    with pytest.raises(BadConfig, match="takes no options"):
        FunctionStage(keep, options={"a": 1})


def test_a_missing_output_is_named() -> None:
    @stage("x:FP32[1] -> y:FP32[1]")
    def forgets(x: Array) -> dict[str, Array]:
        return {"z": x}

    with pytest.raises(BadConfig, match="without \\['y'\\]"):
        FunctionStage(forgets)({"x": np.zeros(1, np.float32)})


def test_join_puts_the_rows_of_jobs_one_after_the_other() -> None:
    jobs = [{"a": np.arange(n * 2).reshape(n, 2), "b": np.arange(n)} for n in (1, 3, 2)]
    joined, at = join(jobs), 0
    for job in jobs:
        rows = slice(at, at := at + len(job["b"]))
        assert all(np.array_equal(job[name], joined[name][rows]) for name in job)
    assert at == len(joined["a"]) == len(joined["b"])


def test_an_optional_input_gets_its_default() -> None:
    text = "x:FP32[1], a?:FP32[1], b?:FP32[1] -> y:FP32[1]"

    @stage(text)
    def added(x: Array, a: float = 10, b: float = 100, *, scale: float = 1.0) -> Array:
        return np.asarray((x + a + b) * scale, np.float32)

    @stage(text)
    class Added:
        def __call__(self, x: Array, a: float = 10, b: float = 100, *, scale: float = 1.0) -> Array:
            return np.asarray((x + a + b) * scale, np.float32)

    one = np.ones(1, np.float32)
    for body in (added, Added):
        made = FunctionStage(body)
        assert made({"x": one})["y"] == 111
        assert made({"x": one, "b": one})["y"] == 12
        assert made({"b": one, "a": one, "x": one}, {"scale": 2.0})["y"] == 6


def test_an_optional_input_without_a_default_is_refused() -> None:
    @stage("x:FP32[1], a?:FP32[1], b?:FP32[1] -> y:FP32[1]")
    def bare(x: Array, a: Array, *rest: Array) -> Array:
        return x

    with pytest.raises(BadConfig, match=r"bare has no default for its optional inputs \['a', 'b'\]"):
        FunctionStage(bare)
