"""Triton's client examples, call for call, against the models in examples/oip: what they check is checked here."""

from __future__ import annotations

import asyncio
import queue
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient import utils
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, shared_memory

from tests.serving import Background
from torchship.serve import config as configs
from torchship.serve.host import Server

ROOT = Path(__file__).parents[2]
ONES = np.ones((1, 16), np.int32)
COUNT = np.arange(16, dtype=np.int32).reshape(1, 16)
VALUES = [11, 7, 5, 3, 2, 0, 1]


class Place:
    """Where the example server listens."""

    def __init__(self, server: Server) -> None:
        assert server.http is not None
        assert server.grpc is not None
        self.http, self.grpc = f"127.0.0.1:{server.http.port}", f"127.0.0.1:{server.grpc.port}"


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    config = configs.read(ROOT / "examples/oip/serve.toml")
    ports = {"http": configs.Http(port=0), "grpc": configs.Grpc(port=0)}
    background = Background()

    async def start() -> Server:
        return await Server(msgspec.structs.replace(config, **ports)).open()

    try:
        server = background.run(start())
        yield Place(server)
        background.run(server.close(patience=1.0))
    finally:
        background.close()


@pytest.fixture(params=["http", "grpc"])
def kit(request: pytest.FixtureRequest, place: Place) -> Iterator[tuple[Any, Any]]:
    """A module of tritonclient and a client of it."""
    module = getattr(tritonclient, request.param)
    with module.InferenceServerClient(getattr(place, request.param)) as client:
        yield module, client


def tensors(module: Any, *arrays: Any, datatype: str = "INT32") -> list[Any]:
    """INPUT0, INPUT1 ... with these arrays."""
    inputs = [module.InferInput(f"INPUT{number}", array.shape, datatype) for number, array in enumerate(arrays)]
    for one, array in zip(inputs, arrays, strict=True):
        one.set_data_from_numpy(array)
    return inputs


def as_text(array: Any) -> Any:
    return np.array([str(number).encode() for number in array.ravel()], object).reshape(array.shape)


def test_health_and_metadata(kit: tuple[Any, Any]) -> None:
    module, client = kit
    extra = (
        {"headers": {"test": "1", "dummy": "2"}}
        if module is tritonclient.grpc
        else {"query_params": {"test_1": 1, "test_2": 2}}
    )
    assert client.is_server_live(**extra)
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    server = client.get_server_metadata()
    assert (server["name"] if isinstance(server, dict) else server.name) == "triton"
    model = client.get_model_metadata("simple", **extra)
    assert (model["name"] if isinstance(model, dict) else model.name) == "simple"
    with pytest.raises(InferenceServerException) as caught:
        client.get_model_metadata("wrong_model_name")
    assert "Request for unknown model" in caught.value.message()
    config = client.get_model_config("simple")
    assert (config["name"] if isinstance(config, dict) else config.config.name) == "simple"


@pytest.mark.parametrize("coding", [None, "gzip", "deflate"])
def test_infer(kit: tuple[Any, Any], coding: str | None) -> None:
    module, client = kit
    coded = (
        {"compression_algorithm": coding}
        if module is tritonclient.grpc
        else {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
    )
    outputs = [module.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
    for wanted in (outputs, None):
        found = client.infer("simple", tensors(module, COUNT, ONES), outputs=wanted, headers={"test": "1"}, **coded)
        assert (found.as_numpy("OUTPUT0") == COUNT + ONES).all()
        assert (found.as_numpy("OUTPUT1") == COUNT - ONES).all()
    statistics = client.get_inference_statistics(model_name="simple")
    assert len(statistics["model_stats"] if isinstance(statistics, dict) else statistics.model_stats) == 1


def test_strings(kit: tuple[Any, Any]) -> None:
    module, client = kit
    found = client.infer("simple_string", tensors(module, as_text(COUNT), as_text(ONES), datatype="BYTES"))
    assert (found.as_numpy("OUTPUT0") == as_text(COUNT + ONES)).all()
    assert (found.as_numpy("OUTPUT1") == as_text(COUNT - ONES)).all()
    words = np.array([["", "\u00e9\u4f60", "\x00nul", "x" * 70_000]], object)
    given = np.array([[word.encode() for word in words[0]]], object)
    same = client.infer("simple_identity", tensors(module, given, datatype="BYTES"))
    assert same.as_numpy("OUTPUT0").tolist() == given.tolist()


def test_typed_contents_over_grpc(place: Place) -> None:
    """The examples that fill `contents` by hand: INT32, INT8 and BYTES; the answers come as raw contents."""
    fields = {"simple": "int_contents", "simple_int8": "int_contents", "simple_string": "bytes_contents"}
    types = {"simple": "INT32", "simple_int8": "INT8", "simple_string": "BYTES"}
    with grpc.insecure_channel(place.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for model, field in fields.items():
            ask = service_pb2.ModelInferRequest(model_name=model)
            for name, array in (("INPUT0", COUNT), ("INPUT1", ONES)):
                one = ask.inputs.add(name=name, datatype=types[model], shape=[1, 16])
                items = as_text(array).ravel().tolist() if model == "simple_string" else array.ravel().tolist()
                getattr(one.contents, field).extend(items)
            ask.outputs.add(name="OUTPUT0")
            ask.outputs.add(name="OUTPUT1")
            answer = stub.ModelInfer(ask)
            raw = answer.raw_output_contents[0]
            if model == "simple_string":
                found = [int(word) for word in utils.deserialize_bytes_tensor(raw)]
            else:
                found = np.frombuffer(raw, np.int8 if model == "simple_int8" else np.int32).tolist()
            assert found == (COUNT + ONES).ravel().tolist()


def test_model_control(kit: tuple[Any, Any]) -> None:
    module, client = kit
    index = client.get_model_repository_index()
    assert len(index if isinstance(index, list) else index.models) >= 8
    client.load_model("simple")
    assert client.is_model_ready("simple")
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("simple", config='"parameters": {"config": {{"max_batch_size": "16"}}}')
    client.load_model("simple", config='{"max_batch_size":"16"}')
    config = client.get_model_config("simple")
    assert (config["max_batch_size"] if isinstance(config, dict) else config.config.max_batch_size) == 16
    client.unload_model("simple")
    assert not client.is_model_ready("simple")
    with pytest.raises(InferenceServerException, match="Invalid file path"):
        client.load_model("simple", config="{}", files={"file:" + "A" * 256: b"a"})
    assert client.is_server_live()
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("wrong_model_name")
    client.load_model("simple")
    config = client.get_model_config("simple")  # the server's own again
    assert (config["max_batch_size"] if isinstance(config, dict) else config.config.max_batch_size) == 8
    assert (client.infer("simple", tensors(module, COUNT, ONES)).as_numpy("OUTPUT1") == COUNT - ONES).all()


def expected(values: list[int], sequence: int | str, *, dyna: bool) -> list[int]:
    """What the examples expect of a sequence."""
    if dyna and isinstance(sequence, str):  # this one adds up
        found = np.cumsum(values).tolist()
        return [*found[:-1], found[-1] + int(sequence)]
    last = int(sequence) if dyna else 0
    return [values[0] + 1, *values[1:-1], values[-1] + last]


def sequences(*, dyna: bool) -> list[tuple[str, list[int], int | str]]:
    """Model, values and id of the three sequences."""
    turned = [-value for value in VALUES]
    model = "simple_dyna_sequence" if dyna else "simple_sequence"
    return [
        (model, [0, *VALUES], 1000),
        (model, [100, *turned], 1001),
        ("simple_string_dyna_sequence", [20, *turned], "1002") if dyna else (model, [20, *turned], str(uuid.uuid4())),
    ]


def steps(module: Any, values: list[int], sequence: int | str) -> Iterator[dict[str, Any]]:
    """The arguments of each call of a sequence."""
    for count, value in enumerate(values, 1):
        one = module.InferInput("INPUT", [1, 1], "INT32")
        one.set_data_from_numpy(np.full((1, 1), value, np.int32))
        ends = {"sequence_start": count == 1, "sequence_end": count == len(values)}
        outputs = [module.InferRequestedOutput("OUTPUT")]
        yield {
            "inputs": [one],
            "outputs": outputs,
            "sequence_id": sequence,
            "request_id": f"{sequence}_{count}",
            **ends,
        }


@pytest.mark.parametrize("dyna", [False, True])
def test_sequences_one_call_at_a_time(kit: tuple[Any, Any], dyna: bool) -> None:
    module, client = kit
    for model, values, sequence in sequences(dyna=dyna):
        found = [client.infer(model, **step).as_numpy("OUTPUT")[0][0] for step in steps(module, values, sequence)]
        assert found == expected(values, sequence, dyna=dyna)


@pytest.mark.parametrize("dyna", [False, True])
def test_sequences_on_a_stream(place: Place, dyna: bool) -> None:
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    found: dict[str, list[int]] = {}
    with tritonclient.grpc.InferenceServerClient(place.grpc) as client:
        client.start_stream(callback=lambda result, error: done.put((result, error)))
        for model, values, sequence in sequences(dyna=dyna):
            for step in steps(tritonclient.grpc, values, sequence):
                client.async_stream_infer(model, **step)
        for _ in range(3 * (len(VALUES) + 1)):
            result, error = done.get(timeout=20)
            assert error is None
            found.setdefault(result.get_response().id.split("_")[0], []).append(result.as_numpy("OUTPUT")[0][0])
    for (_, values, sequence), one in zip(sequences(dyna=dyna), found.values(), strict=True):
        assert one == expected(values, sequence, dyna=dyna)


def test_repeat(place: Place) -> None:
    """A decoupled model: ten answers to one request."""
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    numbers, delays = np.arange(100, 110, dtype=np.int32), np.full(10, 2, np.uint32)
    given = {"IN": numbers, "DELAY": delays, "WAIT": np.array([1], np.uint32)}
    inputs = []
    for name, array in given.items():
        one = tritonclient.grpc.InferInput(name, array.shape, utils.np_to_triton_dtype(array.dtype))
        one.set_data_from_numpy(array)
        inputs.append(one)
    with tritonclient.grpc.InferenceServerClient(place.grpc) as client:
        client.start_stream(callback=lambda result, error: done.put((result, error)))
        outputs = [tritonclient.grpc.InferRequestedOutput("OUT")]
        client.async_stream_infer(model_name="repeat_int32", inputs=inputs, outputs=outputs)
        found = [done.get(timeout=20)[0].as_numpy("OUT").tolist() for _ in range(10)]
    assert found == [[number] for number in numbers.tolist()]


@pytest.mark.parametrize("text", [False, True])
def test_shared_memory(kit: tuple[Any, Any], text: bool) -> None:
    module, client = kit
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    first, second = (as_text(COUNT), as_text(ONES)) if text else (COUNT, ONES)
    blobs = [utils.serialize_byte_tensor(one) if text else one for one in (first, second)]
    size = max(utils.serialized_byte_size(one) if text else one.nbytes for one in blobs)
    model, datatype = ("simple_string", "BYTES") if text else ("simple", "INT32")
    handles = {}
    try:
        for name in ("input0_data", "input1_data", "output0_data", "output1_data"):
            key = f"/torchship_{uuid.uuid4().hex}"
            handles[name] = shared_memory.create_shared_memory_region(name, key, 256)
            client.register_system_shared_memory(name, key, 256)
        inputs = [module.InferInput(name, [1, 16], datatype) for name in ("INPUT0", "INPUT1")]
        for number, one in enumerate(inputs):
            shared_memory.set_shared_memory_region(handles[f"input{number}_data"], [blobs[number]])
            used = utils.serialized_byte_size(blobs[number]) if text else size
            one.set_shared_memory(f"input{number}_data", used)
        outputs = [module.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
        for number, wish in enumerate(outputs):
            wish.set_shared_memory(f"output{number}_data", 256)
        results = client.infer(model, inputs, outputs=outputs)
        for number, right in enumerate((COUNT + ONES, COUNT - ONES)):
            told: Any = results.get_output(f"OUTPUT{number}")
            datatype, shape = (
                (told["datatype"], told["shape"]) if isinstance(told, dict) else (told.datatype, told.shape)
            )
            kind = utils.triton_to_np_dtype(datatype)
            found = shared_memory.get_contents_as_numpy(handles[f"output{number}_data"], kind, shape)
            assert (found == (as_text(right) if text else right)).all()
        assert "output1_data" in str(client.get_system_shared_memory_status())
    finally:
        client.unregister_system_shared_memory()
        for handle in handles.values():
            shared_memory.destroy_shared_memory_region(handle)


def test_callbacks_and_futures(place: Place) -> None:
    """async_infer of both clients; the same input objects are used again."""
    with tritonclient.http.InferenceServerClient(place.http, concurrency=4) as client:
        inputs = tensors(tritonclient.http, COUNT, ONES)
        waiting = [client.async_infer("simple", inputs) for _ in range(8)]
        for one in waiting:
            assert (one.get_result().as_numpy("OUTPUT0") == COUNT + ONES).all()
    done: queue.Queue[Any] = queue.Queue()
    args = [("grpc.max_receive_message_length", -1), ("grpc.keepalive_time_ms", 10_000)]
    with tritonclient.grpc.InferenceServerClient(place.grpc, channel_args=args) as client:
        inputs = tensors(tritonclient.grpc, COUNT, ONES)
        client.async_infer("simple", inputs, partial(lambda box, result, error: box.put(error or result), done))
        assert (done.get(timeout=20).as_numpy("OUTPUT0") == COUNT + ONES).all()


def test_asyncio_stream(place: Place) -> None:
    async def asking() -> AsyncIterator[dict[str, Any]]:
        for step in steps(tritonclient.grpc, [5, 6, 7], 42):
            yield {"model_name": "simple_sequence", **step}

    async def main() -> list[int]:
        async with tritonclient.grpc.aio.InferenceServerClient(place.grpc) as client:
            answers = client.stream_infer(inputs_iterator=asking(), stream_timeout=20)
            return [result.as_numpy("OUTPUT")[0][0] async for result, error in answers if error is None]

    assert asyncio.run(main()) == [6, 6, 7]
