"""Long requests and answers are read and written beside the event loop, which goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from torchship.errors import BadInput
from torchship.serve.api import infer
from torchship.serve.api.front import Front
from torchship.serve.api.grpc import GrpcInference
from torchship.serve.api.infer import Inference
from torchship.wire import oip_grpc
from torchship.wire.messages import Request, Response
from torchship.wire.oip_grpc import InferCodec
from torchship.wire.oip_json import encode_response
from torchship.wire.schema import message


class Caller:
    """An exchange or a call: remembers its answer; `head` says nothing."""

    gone = False
    job: Any = None
    head = type("Head", (), {"timeout": 0.0, "headers": {}})()

    def __init__(self) -> None:
        self.answered: Any = None
        self.ended = asyncio.Event()

    def answer(self, data: bytes, **_: Any) -> None:
        self.answered = data
        self.ended.set()

    def fail(self, fault: Exception) -> None:
        self.answered = fault
        self.ended.set()


class Service:
    """Keeps what was started."""

    regions, forward = None, ""
    service = None

    def __init__(self) -> None:
        self.started: list[Request] = []

    def start(self, request: Request, answer: Any, whom: Any) -> None:
        self.started.append(request)
        whom.ended.set()


def held(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> tuple[threading.Event, list[int]]:
    """Lets a function wait until the event is set, and notes the threads that it runs in."""
    work, go, threads = getattr(place, name), threading.Event(), []

    def waiting(*given: Any, **more: Any) -> Any:
        threads.append(threading.get_ident())
        assert go.wait(20), "the loop stood still: nothing set the event"
        return work(*given, **more)

    monkeypatch.setattr(place, name, waiting)
    return go, threads


def test_a_long_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    go, threads = held(monkeypatch, infer, "encode_response")
    response = Response("m", "1", {"y": np.arange(400_000, dtype=np.float32).reshape(1, -1)})

    async def run() -> Any:
        caller: Any = Caller()
        Inference(Front(service=None))._answer(caller, Request("m", {}, id="7"), response)  # type: ignore[arg-type]
        asyncio.get_running_loop().call_soon(go.set)
        assert caller.answered is None
        await caller.ended.wait()
        return caller.answered

    assert asyncio.run(run()) == encode_response(response, Request("m", {})).data
    assert threads
    assert threading.get_ident() not in threads


def typed(count: int, *, datatype: str = "FP32", said: int | None = None) -> bytes:
    ask = message("inference.ModelInferRequest")(model_name="m")
    item = ask.inputs.add(name="x", datatype=datatype, shape=[count if said is None else said])
    values = np.arange(count) % 1000
    {"FP32": item.contents.fp32_contents, "INT8": item.contents.int_contents}[datatype].extend(values.tolist())
    data: bytes = ask.SerializeToString()
    return data


def asked(codec: InferCodec, body: bytes, before: Any = None) -> tuple[Any, Service]:
    service: Any = Service()

    async def run() -> Any:
        caller: Any = Caller()
        GrpcInference(service, codec)(caller, body, 0)
        if before is not None:
            asyncio.get_running_loop().call_soon(before.set)
            assert not service.started
        await caller.ended.wait()
        return caller.answered

    return asyncio.run(run()), service


def test_a_long_request_in_typed_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = InferCodec()
    go, threads = held(monkeypatch, oip_grpc, "typed_contents")
    _, service = asked(codec, typed(300_000), go)
    assert np.array_equal(service.started[0].inputs["x"], (np.arange(300_000) % 1000).astype(np.float32))
    assert threading.get_ident() not in threads


@pytest.mark.parametrize(("given", "says"), [({"said": 7}, "expected 7"), ({"datatype": "INT8"}, "out of the range")])
def test_what_is_wrong_with_it(given: dict[str, Any], says: str) -> None:
    fault, service = asked(InferCodec(), typed(900_000, **given))
    assert isinstance(fault, BadInput)
    assert says in str(fault)
    assert not service.started


def test_which_requests_are_slow() -> None:
    ask = message("inference.ModelInferRequest")(model_name="m")
    ask.inputs.add(name="x", datatype="FP32", shape=[300_000])
    ask.raw_input_contents.append(bytes(1_200_000))
    raw: bytes = ask.SerializeToString()
    assert not InferCodec.slow(raw, 0)
    assert not InferCodec.slow(b"\0" * 5 + raw, 5)
    assert not InferCodec.slow(typed(1000), 0)
    assert InferCodec.slow(typed(300_000), 0)
    assert InferCodec.slow(b"\0" * 5 + typed(300_000), 5)
    assert InferCodec.slow(b"\xff" * 2_000_000, 0)
    assert InferCodec.slow(b"\x0a\0" * 1_000_000 + raw, 0)  # the look is bounded
