"""Triton's own clients, unmodified, against our front doors: HTTP, gRPC, asyncio, streams, shared memory, control."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException, shared_memory

from tests.serving import Background
from tests.unit.protocols.running import Running, running
from torchship.client import Client
from torchship.errors import BadInput
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.api.regions import SharedMemory
from torchship.serve.config import ModelConfig, convert
from torchship.serve.host import Server
from torchship.wire.schema import message

NUMBERS = np.arange(16, dtype=np.int32).reshape(1, 16)


@dataclass
class Doors:
    """Both ports of one server; `fake` is its service where no workers stand behind it."""

    http: str
    grpc: str
    fake: Running | None = None


def _fake() -> Iterator[Doors]:
    ports: dict[str, Any] = {}

    async def listen(front: Front) -> Any:
        front = replace(front, regions=SharedMemory())
        ports["grpc"] = await rest.listen(front, port=0, grpc_only=True)
        return await rest.listen(front, port=0)

    with running(listen) as found:
        yield Doors(f"127.0.0.1:{found.port}", f"127.0.0.1:{ports['grpc'].port}", found)
        found.run(ports["grpc"].close(grace=1))


def _real() -> Iterator[Doors]:
    stages = "tests.journeys.oip_stages"
    models = {
        "add_sub": "examples.oip.stages:add_sub",
        "echo": f"{stages}:echo",
        "text": f"{stages}:upper",
        "again": f"{stages}:again",
        "sum": f"{stages}:Accumulator",
        "scaled": f"{stages}:scaled",
    }
    config = convert(
        {
            "http": {"port": 0},
            "grpc": {"port": 0},
            "control": {"repository": True, "shared_memory": True},
            "model": [
                {
                    "name": name,
                    "run": run,
                    **({"sequence_idle": 5.0} if name == "sum" else {}),
                }
                for name, run in models.items()
            ],
        }
    )
    background = Background()

    async def start() -> Server:
        return await Server(config).open()

    try:
        server = background.run(start())
        assert server.http is not None
        assert server.grpc is not None
        yield Doors(f"127.0.0.1:{server.http.port}", f"127.0.0.1:{server.grpc.port}")
        background.run(server.close(patience=1.0))
    finally:
        background.close()


@pytest.fixture(scope="module", params=["fake", "real"])
def doors(request: pytest.FixtureRequest) -> Iterator[Doors]:
    yield from _fake() if request.param == "fake" else _real()


@pytest.fixture(scope="module")
def real() -> Iterator[Doors]:
    yield from _real()


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
    assert client.get_server_metadata(**extra)["name"] == "triton"
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
    with pytest.raises(InferenceServerException, match=r"unknown model|no model|is not served"):
        client.infer("none", asked(module))
    with pytest.raises(InferenceServerException, match="input names do not fit"):
        client.infer("add_sub", asked(module)[:1])
    with pytest.raises(InferenceServerException, match="axis 1 is 15, expected 16"):
        client.infer("add_sub", asked(module, NUMBERS[:, :15]))
    with pytest.raises(InferenceServerException, match=r"output 'x'"):
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
    with pytest.raises(InferenceServerException, match=r"no model|unknown model"):
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
        if module is tritonclient.grpc:  # one for each output, though none holds anything
            answer = client.infer("add_sub", inputs, outputs=[output]).get_response()
            assert list(answer.raw_output_contents) == [b""]
        inputs[0].set_shared_memory("both", 256)
        with pytest.raises(InferenceServerException, match="has 192 bytes"):
            client.infer("add_sub", inputs)
        with pytest.raises(InferenceServerException, match="already in manager"):
            client.register_system_shared_memory("both", key, 192)
        with pytest.raises(InferenceServerException, match="key"):
            client.register_system_shared_memory("other", "/../etc/passwd", 1)
        with pytest.raises(InferenceServerException, match="is not"):
            client.register_system_shared_memory("other", key, 9999)
    finally:
        client.unregister_system_shared_memory("both")
        shared_memory.destroy_shared_memory_region(handle)
    assert not Path(f"/dev/shm{key}").exists()


def test_where_the_channels_are() -> None:
    """The configuration over gRPC says the format of pictures, as clients that prepare them ask for it."""

    async def listen(front: Front) -> Any:
        return await rest.listen(front, port=0, grpc_only=True)

    with running(listen) as found:
        found.run(found.service.catalog.load(ModelConfig(name="photos", run="tests.unit.protocols.stages:photos")))
        try:
            with tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{found.port}") as client:
                config = client.get_model_config("photos").config
        finally:
            found.run(found.service.catalog.unload("photos"))
            del found.service.catalog.entries["photos"]  # other tests of this process share the service
    kinds = type(config.input[0])
    assert [(one.name, list(one.dims), one.format) for one in config.input] == [
        ("first", [3, 8, 8], kinds.FORMAT_NCHW),
        ("last", [8, 8, 3], kinds.FORMAT_NHWC),
    ]


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
        assert "none" in str(error)
        client.async_stream_infer("add_sub", asked(tritonclient.grpc), enable_empty_final_response=True)
        only = done.get(timeout=20)[0]
        assert only.get_response().parameters["triton_final_response"].bool_param
        assert (only.as_numpy("OUTPUT1") == 0).all()
        client.stop_stream()


def test_asyncio_clients(doors: Doors) -> None:
    async def main() -> None:
        for module, url in ((tritonclient.http.aio, doors.http), (tritonclient.grpc.aio, doors.grpc)):
            async with module.InferenceServerClient(url) as client:
                inputs = asked(tritonclient.http if module is tritonclient.http.aio else tritonclient.grpc)
                results = await asyncio.gather(*(client.infer("add_sub", inputs) for _ in range(20)))
                assert all((result.as_numpy("OUTPUT0") == NUMBERS * 2).all() for result in results)

    asyncio.run(main())


def test_a_deadline_cancels_over_grpc() -> None:
    for doors in _fake():
        assert doors.fake is not None
        service = doors.fake.service
        service.delay, service.cancelled = 5.0, 0
        with (
            tritonclient.grpc.InferenceServerClient(doors.grpc) as client,
            pytest.raises(InferenceServerException, match="Deadline"),
        ):
            client.infer("add_sub", asked(tritonclient.grpc), client_timeout=0.2)
        assert service.seen[-1].deadline == pytest.approx(0.2, abs=0.1)
        for _ in range(100):
            if service.cancelled:
                break
            doors.fake.run(asyncio.sleep(0.02))
        assert service.cancelled == 1


def test_a_model_that_streams(real: Doors) -> None:
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    text = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"hi"], np.object_))
    with tritonclient.grpc.InferenceServerClient(real.grpc) as client:
        client.start_stream(lambda result, error: done.put((result, error)))
        client.async_stream_infer("again", [text], parameters={"count": 4}, enable_empty_final_response=True)
        answers = [done.get(timeout=20)[0] for _ in range(5)]
        texts = [answer.as_numpy("text_output").tolist() for answer in answers[:4]]
        assert texts == [[b"%d hi" % number] for number in range(4)]
        last = [answer.get_response().parameters["triton_final_response"].bool_param for answer in answers]
        assert last == [False] * 4 + [True]
        with pytest.raises(InferenceServerException, match="stream"):
            client.infer("again", [text])
        client.stop_stream()


def test_sequences_reach_a_stateful_stage_in_order(real: Doors) -> None:
    one = tritonclient.grpc.InferInput("x", [1], "INT32")
    with tritonclient.grpc.InferenceServerClient(real.grpc) as client:
        totals: dict[int, list[int]] = {7: [], 9: []}
        for step in range(1, 4):
            for sequence, found in totals.items():
                one.set_data_from_numpy(np.array([sequence * step], np.int32))
                ends = {"sequence_start": step == 1, "sequence_end": step == 3}
                total = client.infer("sum", [one], sequence_id=sequence, **ends).as_numpy("total")
                found.append(int(total[0]))
    assert totals == {7: [7, 30, 69], 9: [16, 48, 96]}  # one worker, which both sequences share


def test_our_own_client(real: Doors) -> None:
    for url in (f"http://{real.http}", f"grpc://{real.grpc}"):
        with Client(url) as client:
            assert (client.infer("echo", NUMBERS.astype(np.float32))["y"] == NUMBERS).all()
    with Client(f"grpc://{real.grpc}") as client:
        words = {"text_input": np.array([b"a"], object)}
        found = [answer["text_output"][0] for answer in client.stream("again", words, parameters={"count": 2})]
        assert found == [b"0 a", b"1 a"]


def test_reflection_and_health(real: Doors) -> None:
    """What grpcurl asks: which services there are, and what a message looks like."""
    import grpc as grpcio

    ask = message("grpc.reflection.v1.ServerReflectionRequest")
    tell = message("grpc.reflection.v1.ServerReflectionResponse")
    with grpcio.insecure_channel(real.grpc) as channel:
        call = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=lambda one: one.SerializeToString(),
            response_deserializer=tell.FromString,
        )
        questions = [
            ask(list_services=""),
            ask(file_containing_symbol="inference.ModelInferRequest.InferInputTensor"),
            ask(file_by_filename="health.proto"),
            ask(file_containing_symbol="no.Such"),
        ]
        services, file, health, none = list(call(iter(questions), timeout=20))
        names = [one.name for one in services.list_services_response.service]
        assert "inference.GRPCInferenceService" in names
        assert len(file.file_descriptor_response.file_descriptor_proto) == 1
        assert len(health.file_descriptor_response.file_descriptor_proto) == 1
        assert none.error_response.error_code == 5
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=20) == b"\x08\x01"
        with pytest.raises(grpcio.RpcError, match="NOT_FOUND"):
            check(message("grpc.health.v1.HealthCheckRequest")(service="none").SerializeToString(), timeout=20)
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=20)
        assert next(watch) == b"\x08\x01"
        watch.cancel()


@pytest.mark.parametrize("module", [tritonclient.http, tritonclient.grpc])
def test_optional_inputs(real: Doors, module: Any) -> None:
    url = real.http if module is tritonclient.http else real.grpc
    extra = {} if module is tritonclient.http else {"as_json": True}
    array = np.array([[1, 2]], np.float32)
    with module.InferenceServerClient(url) as client:
        config = client.get_model_config("scaled", **extra)
        x, by = config.get("config", config)["input"]
        assert (x["name"], x.get("optional", False)) == ("x", False)
        assert (by["name"], by["optional"]) == ("by", True)
        known = client.get_model_metadata("scaled", **extra)["inputs"]
        assert [set(one) for one in known] == [{"name", "datatype", "shape"}] * 2
        inputs = [module.InferInput(name, [1, 2], "FP32") for name in ("x", "by")]
        for binary in (True, False) if module is tritonclient.http else (True,):
            for one, value in zip(inputs, (array, array * 3), strict=True):
                one.set_data_from_numpy(value, **({"binary_data": binary} if module is tritonclient.http else {}))
            for _ in range(3):  # the same bytes again are read in a shorter way
                assert client.infer("scaled", inputs[:1]).as_numpy("y").tolist() == [[1, 2]]
                assert client.infer("scaled", inputs).as_numpy("y").tolist() == [[3, 12]]
            with pytest.raises(InferenceServerException, match=r"missing \['x'\]"):
                client.infer("scaled", inputs[1:])


def test_optional_inputs_by_our_clients_and_plain_json(real: Doors) -> None:
    array = np.array([[1, 2]], np.float32)
    for url in (f"http://{real.http}", f"grpc://{real.grpc}"):
        with Client(url) as client:
            assert client.infer("scaled", {"x": array})["y"].tolist() == [[1, 2]]
            assert client.infer("scaled", {"by": array, "x": array})["y"].tolist() == [[1, 4]]
            with pytest.raises(BadInput, match=r"missing \['x'\]"):
                client.infer("scaled", {"by": array})
    with httpx.Client(base_url=f"http://{real.http}") as client:
        generate = "/v2/models/scaled/generate"
        assert client.post(generate, json={"x": [1, 2]}).json()["y"] == [1, 2]
        assert client.post(generate, json={"x": [1, 2], "by": [2, 2]}).json()["y"] == [2, 4]
        assert "missing ['x']" in client.post(generate, json={"by": [1, 2]}).json()["error"]
        infer = client.get("/openapi.json").json()["paths"]["/v2/models/scaled/infer"]["post"]
        schema = infer["requestBody"]["content"]["application/json"]["schema"]["properties"]["inputs"]
        assert (schema["minItems"], schema["maxItems"]) == (1, 2)
