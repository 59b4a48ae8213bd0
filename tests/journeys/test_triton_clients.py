"""Triton's own clients, unmodified, against our front doors: HTTP, gRPC, asyncio, streams, shared memory, control."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException, shared_memory

from tests.unit.protocols.fake import FakeService
from tests.unit.protocols.running import Running, running
from torchship.serve.protocols import grpc, rest
from torchship.serve.protocols._regions import SharedMemory
from torchship.serve.protocols.rest import Front

NUMBERS = np.arange(16, dtype=np.int32).reshape(1, 16)


@dataclass
class Doors:
    """Both ports of one server."""

    running: Running
    http: str
    grpc: str


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    ports: dict[str, Any] = {}

    async def listen(service: FakeService) -> Any:
        front = Front(service, regions=SharedMemory(prefix="torchship_test"))
        ports["grpc"] = await grpc.listen(service, port=0, front=front)
        return await rest.listen(service, port=0, front=front)

    with running(listen) as found:
        yield Doors(found, f"127.0.0.1:{found.port}", f"127.0.0.1:{ports['grpc'].port}")
        found.run(ports["grpc"].close(grace=1))


@pytest.fixture(params=["http", "grpc"])
def kit(request: pytest.FixtureRequest, doors: Doors) -> Iterator[tuple[Any, Any]]:
    """A module of tritonclient and a client of it."""
    module = getattr(tritonclient, request.param)
    with module.InferenceServerClient(getattr(doors, request.param)) as client:
        yield module, client


def asked(module: Any, array: Any = NUMBERS) -> list[Any]:
    inputs = []
    for name in ("INPUT0", "INPUT1"):
        one = module.InferInput(name, list(array.shape), "INT32")
        one.set_data_from_numpy(array)
        inputs.append(one)
    return inputs


def test_health_and_metadata(kit: tuple[Any, Any]) -> None:
    module, client = kit
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("add_sub", "1")
    extra = {} if module is tritonclient.http else {"as_json": True}
    assert client.get_server_metadata(**extra)["name"] == "torchship"
    model = client.get_model_metadata("add_sub", **extra)
    assert [one["name"] for one in model["inputs"]] == ["INPUT0", "INPUT1"]
    config = client.get_model_config("add_sub", **extra)
    assert config.get("config", config)["max_batch_size"] == 8
    stats = client.get_inference_statistics("add_sub", **extra)
    assert stats["model_stats"][0]["name"] == "add_sub"


def test_infer(kit: tuple[Any, Any]) -> None:
    module, client = kit
    for number in range(3):
        result = client.infer("add_sub", asked(module), request_id=str(number), priority=1, timeout=5_000_000)
        assert (result.as_numpy("OUTPUT0") == NUMBERS * 2).all()
        assert (result.as_numpy("OUTPUT1") == 0).all()
        answer = result.get_response()
        assert (answer["id"] if isinstance(answer, dict) else answer.id) == str(number)
    one = client.infer("add_sub", asked(module), outputs=[module.InferRequestedOutput("OUTPUT0")])
    assert one.as_numpy("OUTPUT1") is None
    many = np.repeat(NUMBERS, 5000, 0)
    assert (client.infer("add_sub", asked(module, many)).as_numpy("OUTPUT0") == many * 2).all()


def test_classes(kit: tuple[Any, Any]) -> None:
    module, client = kit
    best = client.infer("add_sub", asked(module), outputs=[module.InferRequestedOutput("OUTPUT0", class_count=2)])
    assert best.as_numpy("OUTPUT0").ravel().tolist() == [b"30:15", b"28:14"]


def test_strings(kit: tuple[Any, Any]) -> None:
    module, client = kit
    text = module.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"hello \xc3\xa9"], np.object_))
    assert client.infer("text", [text]).as_numpy("text_output").tolist() == [b"HELLO \xc3\xa9"]


def test_errors(kit: tuple[Any, Any]) -> None:
    module, client = kit
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.infer("none", asked(module))
    with pytest.raises(InferenceServerException, match="input names do not fit"):
        client.infer("add_sub", asked(module)[:1])
    with pytest.raises(InferenceServerException, match="axis 1 is 15, expected 16"):
        client.infer("add_sub", asked(module, NUMBERS[:, :15]))
    with pytest.raises(InferenceServerException, match="no output 'x'"):
        client.infer("add_sub", asked(module), outputs=[module.InferRequestedOutput("x")])


def test_model_control(kit: tuple[Any, Any]) -> None:
    _, client = kit
    client.unload_model("text")
    assert not client.is_model_ready("text")
    client.load_model("text")
    assert client.is_model_ready("text")
    index = client.get_model_repository_index()
    models = index if isinstance(index, list) else [{"name": one.name} for one in index.models]
    assert "text" in [one["name"] for one in models]
    with pytest.raises(InferenceServerException, match="no model"):
        client.load_model("none")


def test_shared_memory(kit: tuple[Any, Any]) -> None:
    module, client = kit
    key = f"/torchship_test_{os.getpid()}"
    handle = shared_memory.create_shared_memory_region("both", key, 192)
    try:
        shared_memory.set_shared_memory_region(handle, [NUMBERS, NUMBERS])
        client.register_system_shared_memory("both", key, 192)
        extra = {} if module is tritonclient.http else {"as_json": True}
        assert "both" in str(client.get_system_shared_memory_status(**extra))
        inputs = [module.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
        inputs[0].set_shared_memory("both", 64)
        inputs[1].set_shared_memory("both", 64, offset=64)
        output = module.InferRequestedOutput("OUTPUT0")
        output.set_shared_memory("both", 64, offset=128)
        client.infer("add_sub", inputs, outputs=[output])
        found = shared_memory.get_contents_as_numpy(handle, np.int32, [1, 16], offset=128)
        assert (found == NUMBERS * 2).all()
        inputs[0].set_shared_memory("both", 256)
        with pytest.raises(InferenceServerException, match="has 192 bytes"):
            client.infer("add_sub", inputs)
        with pytest.raises(InferenceServerException, match="already in manager"):
            client.register_system_shared_memory("both", key, 192)
        for wrong in ("/../etc/passwd", "/secret"):
            with pytest.raises(InferenceServerException, match="key"):
                client.register_system_shared_memory("other", wrong, 1)
        with pytest.raises(InferenceServerException, match="is not"):
            client.register_system_shared_memory("other", key, 9999)
    finally:
        client.unregister_system_shared_memory("both")
        shared_memory.destroy_shared_memory_region(handle)
    assert not Path(f"/dev/shm{key}").exists()


def test_settings(kit: tuple[Any, Any]) -> None:
    module, client = kit
    extra = {} if module is tritonclient.http else {"as_json": True}
    assert "OFF" in str(client.get_trace_settings(**extra))
    with pytest.raises(InferenceServerException, match="does not trace"):
        client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})
    assert "3" in str(client.update_log_settings({"log_verbose_level": 3}, **extra))
    assert "log_verbose_level" in str(client.get_log_settings(**extra))
    client.update_log_settings({"log_verbose_level": 0})


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression(doors: Doors, coding: str) -> None:
    with tritonclient.http.InferenceServerClient(doors.http) as client:
        result = client.infer(
            "add_sub",
            asked(tritonclient.http, np.repeat(NUMBERS, 100, 0)),
            request_compression_algorithm=coding,
            response_compression_algorithm=coding,
        )
        assert result.as_numpy("OUTPUT0").shape == (100, 16)
    with tritonclient.grpc.InferenceServerClient(doors.grpc) as client:
        result = client.infer("add_sub", asked(tritonclient.grpc), compression_algorithm=coding)
        assert (result.as_numpy("OUTPUT0") == NUMBERS * 2).all()


def test_json_tensors(doors: Doors) -> None:
    with tritonclient.http.InferenceServerClient(doors.http) as client:
        one = tritonclient.http.InferInput("x", [1, 16], "FP32")
        one.set_data_from_numpy(NUMBERS.astype(np.float32), binary_data=False)
        output = tritonclient.http.InferRequestedOutput("y", binary_data=False)
        assert (client.infer("echo", [one], outputs=[output]).as_numpy("y") == NUMBERS).all()


def test_many_calls_at_once_over_grpc(doors: Doors) -> None:
    done: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(doors.grpc) as client:
        for number in range(200):
            inputs = asked(tritonclient.grpc, NUMBERS + number)
            client.async_infer("add_sub", inputs, lambda result, error, n=number: done.put((n, result, error)))
        for _ in range(200):
            number, result, error = done.get(timeout=20)
            assert error is None
            assert (result.as_numpy("OUTPUT0") == (NUMBERS + number) * 2).all()


def test_stream_over_grpc(doors: Doors) -> None:
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(doors.grpc) as client:
        client.start_stream(lambda result, error: done.put((result, error)))
        for number in range(20):
            client.async_stream_infer("add_sub", asked(tritonclient.grpc, NUMBERS + number), request_id=str(number))
        for number in range(20):
            result, error = done.get(timeout=20)
            assert error is None
            assert result.get_response().id == str(number)
            assert (result.as_numpy("OUTPUT0") == (NUMBERS + number) * 2).all()
        client.async_stream_infer("none", asked(tritonclient.grpc))
        result, error = done.get(timeout=20)
        assert "unknown model" in str(error)
        client.async_stream_infer("add_sub", asked(tritonclient.grpc), enable_empty_final_response=True)
        answers = [done.get(timeout=20)[0].get_response() for _ in range(2)]
        assert answers[1].parameters["triton_final_response"].bool_param
        client.stop_stream()


def test_asyncio_clients(doors: Doors) -> None:
    async def main() -> None:
        for module, url in ((tritonclient.http.aio, doors.http), (tritonclient.grpc.aio, doors.grpc)):
            async with module.InferenceServerClient(url) as client:
                inputs = asked(tritonclient.http if module is tritonclient.http.aio else tritonclient.grpc)
                results = await asyncio.gather(*(client.infer("add_sub", inputs) for _ in range(20)))
                assert all((result.as_numpy("OUTPUT0") == NUMBERS * 2).all() for result in results)

    asyncio.run(main())


def test_a_deadline_cancels_over_grpc(doors: Doors) -> None:
    service = doors.running.service
    service.delay, before = 5.0, service.cancelled
    try:
        with (
            tritonclient.grpc.InferenceServerClient(doors.grpc) as client,
            pytest.raises(InferenceServerException, match="Deadline"),
        ):
            client.infer("add_sub", asked(tritonclient.grpc), client_timeout=0.2)
        assert service.seen[-1].deadline == pytest.approx(0.2, abs=0.1)
        for _ in range(100):
            if service.cancelled > before:
                break
            doors.running.run(asyncio.sleep(0.02))
        assert service.cancelled > before
    finally:
        service.delay = 0.0
