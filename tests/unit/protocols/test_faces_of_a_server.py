"""What a server tells and lets be changed: OpenAPI, /docs, generate, repository, shared memory, settings."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest

from tests.unit.protocols.running import MODELS, STREAMS, WAYS, Running, receivers, running
from torchship.client import Client
from torchship.errors import BadConfig, BadInput, StageFailed, Unsupported
from torchship.serve.api import rest
from torchship.serve.api.docs import examples, models
from torchship.serve.api.front import Front
from torchship.serve.api.regions import SharedMemory
from torchship.serve.api.settings import LogSettings, Tracing
from torchship.serve.http.exchange import Head
from torchship.wire.messages import Request, WantedOutput


@pytest.fixture(scope="module", params=WAYS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("traces")

    async def listen(front: Front) -> Any:
        front = replace(front, tracing=Tracing(folder=folder), forward="x-.*")
        return await rest.listen(front, port=0, receivers=await receivers(request.param))

    with running(listen) as found:
        found.service.folder = folder  # type: ignore[attr-defined]
        yield found


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as found:
        yield found


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_half_precision_travels_as_such(server: Running, scheme: str) -> None:
    """FP16 goes where the signature says FP16, and nowhere else: a model that takes FP32 is asked in FP32."""
    x = np.array([[1, -2, 65504, 6e-8], [0.1, np.inf, -0.0, 2**-14]], np.float16)
    with Client(f"{scheme}://127.0.0.1:{server.port}") as client:
        found = client.infer("half", x)["y"]
        assert found.dtype == np.float16
        assert np.array_equal(found, x * np.float16(0.5))
        with pytest.raises(BadInput, match=r"FP16.*FP32|FP32.*FP16"):
            client.infer("echo", np.zeros((1, 16), np.float16))
        with pytest.raises(BadInput, match=r"FP16.*FP32|FP32.*FP16"):
            client.infer("half", np.zeros((1, 4), np.float32))


def test_half_precision_as_json_and_as_nothing_but_bytes(client: httpx.Client) -> None:
    url, ask = "/v2/models/half/infer", {"name": "x", "shape": [1, 4], "datatype": "FP16", "data": [1, 2, 3, 0.1]}
    (told,) = client.post(url, json={"inputs": [ask]}).json()["outputs"]
    assert (told["datatype"], told["data"]) == ("FP16", [0.5, 1.0, 1.5, float(np.float16(0.1)) / 2])
    headers = {"content-type": "application/octet-stream"}
    raw = client.post(url, content=np.ones((1, 4), "<f2").tobytes(), headers=headers)
    assert raw.json()["outputs"][0]["data"] == [0.5] * 4


def test_every_example_of_the_docs_works(server: Running, client: httpx.Client, tmp_path: Path) -> None:
    (tmp_path / "picture.jpg").write_bytes(b"\xff\xd8")
    assert client.get("/", follow_redirects=True).text == client.get("/docs").text
    ran = 0
    assert [model["name"] for model in models(server.service)] == [*MODELS]
    for model in models(server.service):
        name = model["name"]
        assert name in client.get("/docs").text
        for command in examples(model, base=f"http://127.0.0.1:{server.port}"):
            done = subprocess.run(
                ["bash", "-c", command.replace("curl", "curl -sS -f", 1)],
                cwd=tmp_path, capture_output=True, timeout=30, check=True,
            )  # fmt: skip
            assert json.loads(done.stdout.removeprefix(b"data: "))["model_name"] == name
            ran += 1
    assert ran >= 5


def test_examples_of_large_tensors() -> None:
    one = {"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 224, 224]}]}
    assert "head -c 602112" in examples(one, base="http://h")[0]
    two = {"name": "m", "inputs": [*one["inputs"], {"name": "t", "datatype": "BYTES", "shape": [1]}]}
    script = shlex.split(examples(two, base="http://h")[0])[:3]
    body = json.loads(subprocess.run(script, capture_output=True, timeout=30, check=True).stdout)
    assert [len(item["data"]) for item in body["inputs"]] == [150528, 1]


def test_a_host_that_is_no_host(client: httpx.Client) -> None:
    text = client.get("/docs", headers={"Host": "x;rm"}).text
    assert "x;rm" not in text


def test_names_of_all_models(client: httpx.Client) -> None:
    assert client.get("/v2/models").json() == {"models": [*MODELS]}


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(BadConfig, match="forward_headers"):
        Front(cast(Any, None), forward="(")


def test_openapi(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    infer = document["paths"]["/v2/models/echo/infer"]["post"]
    body = infer["requestBody"]["content"]["application/json"]["example"]
    assert client.post("/v2/models/echo/infer", json=body).status_code == 200
    assert document["paths"]["/v2/health/live"]["get"]["summary"]


def test_openapi_is_what_strict_readers_want(client: httpx.Client) -> None:
    """Arrays say what they hold, what is required exists, places of a path are declared, and operations have names."""
    document = client.get("/openapi.json").json()
    names: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("type") == "array":
                assert "items" in node, node
            if node.get("type") == "object" and "required" in node:
                assert set(node["required"]) <= node["properties"].keys(), node
            for below in node.values():
                walk(below)
        elif isinstance(node, list):
            for below in node:
                walk(below)

    walk(document)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            names.append(operation["operationId"])
            assert operation["summary"]
            assert set(operation["tags"]) <= {tag["name"] for tag in document["tags"]}
            declared = operation.get("parameters", ())
            assert [part["name"] for part in declared] == re.findall(r"{(\w+)}", path)
            assert all(part["required"] and part["schema"]["pattern"] for part in declared)
    assert len(names) == len(set(names))


def test_a_client_that_calls_everything_octets(client: httpx.Client) -> None:
    """As aiohttp does, and with it Triton's asynchronous client; a tensor that begins with a brace is still one."""
    given = {"inputs": [{"name": "x", "shape": [1, 16], "datatype": "FP32", "data": [0.5] * 16}]}
    octets = {"content-type": "application/octet-stream"}
    url = "/v2/models/echo/infer"
    for _ in range(2):  # the second one is known by its bytes
        answer = client.post(url, content=json.dumps(given).encode(), headers=octets)
        assert answer.json()["outputs"][0]["data"] == [0.5] * 16
    raw = b"{" * 64
    assert client.post(url, content=raw, headers=octets).status_code == 200
    assert client.post(url, content=raw[1:], headers=octets).status_code == 400


def test_generate(client: httpx.Client) -> None:
    answer = client.post("/v2/models/text/generate", json={"text_input": "hi", "id": "a"}).json()
    assert answer == {"model_name": "text", "model_version": "1", "id": "a", "text_output": "HI"}
    numbers = client.post("/v2/models/echo/versions/1/generate", json={"x": list(range(16))}).json()
    assert numbers["y"] == list(range(16))
    several = client.post(f"/v2/models/{STREAMS}/generate", json={"text_input": "hi", "parameters": {"count": 2}})
    assert several.status_code == 400
    assert "generate_stream" in several.json()["error"]


@pytest.mark.parametrize(
    "body", [b"[]", b"{", b'{"id":1,"text_input":"a"}', b'{"text_input":1}', b'{"text_input":"a","parameters":3}',
             b'{"text_input":"a","x":[1]}', b"{}"]
)  # fmt: skip
def test_generate_with_wrong_bodies(client: httpx.Client, body: bytes) -> None:
    answer = client.post("/v2/models/text/generate", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_generate_stream(server: Running, client: httpx.Client) -> None:
    ask = {"text_input": "hi", "count": 3}
    answer = client.post(f"/v2/models/{STREAMS}/generate_stream", json=ask)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "no-transform" in answer.headers["cache-control"]
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert [event["text_output"] for event in events] == ["HI"] * 3
    server.service.fault = StageFailed("it broke")
    try:
        events = client.post(f"/v2/models/{STREAMS}/generate_stream", json=ask).text.split("\n\n")
    finally:
        server.service.fault = None
    assert json.loads(events[3].removeprefix("data: ")) == {"error": "it broke"}


def test_repository(client: httpx.Client) -> None:
    assert client.post("/v2/repository/models/text/unload").status_code == 200
    assert client.get("/v2/models/text/ready").status_code == 503
    assert client.post("/v2/repository/models/text/load", json={"parameters": {}}).status_code == 200
    names = [entry["name"] for entry in client.post("/v2/repository/index", json={"ready": True}).json()]
    assert "text" in names
    for body in (b"[]", b'{"ready":3}', b'{"parameters":3}'):
        path = "/v2/repository/index" if b"parameters" not in body else "/v2/repository/models/text/load"
        assert client.post(path, content=body).status_code == 400


def test_shared_memory_is_off_by_default(client: httpx.Client) -> None:
    assert client.get("/v2/systemsharedmemory/status").json() == []
    assert client.post("/v2/systemsharedmemory/unregister").status_code == 200
    body = {"key": "/a", "byte_size": 4}
    assert client.post("/v2/systemsharedmemory/region/a/register", json=body).status_code == 400
    assert client.get("/v2/cudasharedmemory/status").json() == []
    assert client.post("/v2/cudasharedmemory/region/a/register", json={}).status_code == 400
    assert client.post("/v2/cudasharedmemory/region/a/unregister").status_code == 200
    assert client.get("/v2/cudasharedmemory/region/a/status").status_code == 404


def test_traces(server: Running, client: httpx.Client) -> None:
    changed = client.post(
        "/v2/models/text/trace/setting",
        json={"trace_level": ["TIMESTAMPS", "TENSORS"], "trace_rate": "1", "trace_file": "t.jsonl", "trace_count": "2"},
    ).json()
    assert changed["trace_level"] == ["TIMESTAMPS", "TENSORS"]
    item = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    for number in range(4):
        client.post("/v2/models/text/infer", json={"id": str(number), "inputs": [item]})
    folder: Path = server.service.folder  # type: ignore[attr-defined]
    lines = [json.loads(line) for line in (folder / "t.jsonl").read_text().splitlines()]
    assert [line["request_id"] for line in lines] == ["0", "1"]
    assert lines[0]["inputs"] == {"text_input": [1]}
    assert lines[0]["timestamps"][0]["ns"] <= lines[0]["timestamps"][1]["ns"]
    cleared = client.post("/v2/models/text/trace/setting", json={"trace_level": None, "trace_count": None}).json()
    assert cleared["trace_level"] == ["OFF"]
    assert client.get("/v2/trace/setting").json()["trace_file"] == ""


@pytest.mark.parametrize(
    "change",
    [{"trace_file": "../x"}, {"trace_level": ["ALL"]}, {"trace_rate": "x"}, {"no": "1"}, {"trace_rate": ["1", "2"]}],
)
def test_traces_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"trace|unknown"):
        Tracing(folder=Path("/nowhere")).change(change)


def test_no_traces_without_a_folder() -> None:
    tracing = Tracing()
    with pytest.raises(Unsupported, match="does not trace"):
        tracing.change({"trace_level": ["TIMESTAMPS"]})
    assert not tracing.active
    assert tracing.around(print, Request("m", {})) is print
    assert tracing.change({})["trace_level"] == ["OFF"]


def test_log_settings_do_what_they_say() -> None:
    settings = LogSettings(logger="torchship.test.settings")
    logger = logging.getLogger("torchship.test.settings")
    settings.change({"log_verbose_level": 1})
    assert logger.level == logging.DEBUG
    settings.change({"log_verbose_level": 0, "log_info": False})
    assert logger.level == logging.WARNING
    settings.change({"log_warning": False, "log_error": False})
    assert logger.level == logging.CRITICAL
    for wrong in ({"log_info": 1}, {"no": True}, {"log_verbose_level": -1}):
        with pytest.raises(BadInput):
            settings.change(wrong)
    with pytest.raises(Unsupported):
        settings.change({"log_file": "/etc/passwd"})


def test_headers_are_forwarded(server: Running, client: httpx.Client) -> None:
    item = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["a"]}
    client.post("/v2/models/text/infer", json={"inputs": [item]}, headers={"X-User": "u", "Authorization": "secret"})
    assert server.service.seen[-1].headers == {"x-user": "u"}


def test_regions_survive_files_that_shrink(tmp_path: Path) -> None:
    memory = SharedMemory(folder=tmp_path)
    file = tmp_path / "one"
    file.write_bytes(bytes(100))
    memory.register("r", key="/one", offset=20, size=80)
    memory.write("r", b"abc", offset=4, size=4)
    assert bytes(memory.read("r", offset=4, size=3)) == b"abc"
    assert file.read_bytes()[24:27] == b"abc"
    for offset, size in ((0, 81), (80, 1), (-1, 2)):
        with pytest.raises(BadInput, match="80 bytes"):
            memory.read("r", offset=offset, size=size)
    with pytest.raises(BadInput, match="the output has 5 bytes"):
        memory.write("r", b"abcde", offset=0, size=4)
    os.truncate(file, 30)
    with pytest.raises(BadInput, match="shorter"):
        memory.read("r", offset=0, size=80)
    with pytest.raises(BadInput, match="shorter"):
        memory.write("r", bytes(40), offset=0, size=40)
    asyncio.run(memory.unregister())
    asyncio.run(memory.unregister("r"))
    assert memory.status() == []


def test_regions_that_may_not_be(tmp_path: Path) -> None:
    memory = SharedMemory(folder=tmp_path / "in")
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_bytes(bytes(9))
    (tmp_path / "in" / "ok_link").symlink_to(tmp_path / "out")
    os.mkfifo(tmp_path / "in" / "ok_fifo")
    (tmp_path / "in" / "ok").write_bytes(bytes(9))
    for key in ("ok_link", "ok_fifo", "../out", "..", "ok_none", "other", "a/b", "", "ok\0"):
        with pytest.raises(BadInput):
            memory.register("r", key=key, offset=0, size=1)
    for offset, size in ((0, 10), (-1, 3), (9, 1), (0, 0), (2**63, 1)):
        with pytest.raises(BadInput):
            memory.register("r", key="/ok", offset=offset, size=size)
    assert np.array(memory.status()).size == 0


def test_a_silent_stream_sends_comments(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchship.serve.api.generate.SILENCE", 0.1)
    answer = client.post(f"/v2/models/{STREAMS}/generate_stream", json={"text_input": "a", "count": 2, "wait": 0.5})
    events = [line for line in answer.text.split("\n\n") if line]
    assert events[0] == ":"
    assert [json.loads(event[6:])["text_output"] for event in events if event != ":"] == ["A", "A"]


def test_who_leaves_a_stream_stops_it(server: Running, client: httpx.Client) -> None:
    ask = {"text_input": "a", "count": 100, "wait": 0.3}
    with client.stream("POST", f"/v2/models/{STREAMS}/generate_stream", json=ask) as answer:
        next(answer.iter_bytes())
    short = {"text_input": "b", "count": 1}
    events = client.post(f"/v2/models/{STREAMS}/generate_stream", json=short).text
    assert json.loads(events.split("\n\n")[0].removeprefix("data: "))["text_output"] == "B"


def test_draining_needs_a_token(client: httpx.Client) -> None:
    answer = client.post("/v2/drain")
    assert answer.status_code == 403
    assert "token" in answer.json()["error"]


def test_headers_in_capitals_are_forwarded() -> None:
    front = Front(cast(Any, None), forward="X-Tenant|TraceParent")
    head = Head("POST", "/", "", {"x-tenant": "a", "traceparent": "b", "x-other": "c"})
    assert front.forwarded(head) == {"x-tenant": "a", "traceparent": "b"}


def test_a_region_stays_until_the_requests_that_use_it_are_answered(server: Running, tmp_path: Path) -> None:
    memory, file = SharedMemory(folder=tmp_path), tmp_path / "one"
    file.write_bytes(bytes(4))
    memory.register("r", key="/one", offset=0, size=4)
    request = Request("m", {}, outputs=(WantedOutput("y", parameters={"shared_memory_region": "r"}),))

    async def main() -> None:
        held = memory.hold(request)
        leaving = asyncio.ensure_future(memory.unregister("r"))
        await asyncio.sleep(0)
        assert memory.status() == []
        assert not leaving.done()
        memory.write("r", b"abcd", offset=0, size=4)
        memory.release(held)
        await leaving
        with pytest.raises(BadInput, match="Unable to find"):
            memory.write("r", b"abcd", offset=0, size=4)

    server.run(main())
    assert file.read_bytes() == b"abcd"
