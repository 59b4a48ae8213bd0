"""The commands about artifacts: inspect, store, predict; as a user types them."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.unit.artifact.made import WEIGHT, colour, linear
from torchship.artifact import Store, tensorfile
from torchship.cli import app
from torchship.errors import BadConfig, BadInput, CorruptArtifact, NotFound, TorchshipError, Unavailable
from torchship.wire import oip_json
from torchship.wire.messages import Response


def torchship(*words: str | Path, **options: Any) -> Result:
    """Type a command; errors of ours are raised."""
    found = CliRunner().invoke(app, [str(word) for word in words], **options)
    if isinstance(found.exception, TorchshipError):
        raise found.exception
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with `linear` (twice) and `colour`."""
    monkeypatch.setenv("TORCHSHIP_STORE", str(tmp_path / "store"))
    linear(tmp_path / "linear")
    colour(tmp_path / "colour")
    found = Store()
    for name in ("linear", "linear", "colour"):
        found.publish(tmp_path / name, name=name)
    return found


def test_inspect(store: Store, tmp_path: Path) -> None:
    text = torchship("inspect", "linear@1").output
    for words in ("x", "FP32", "onnxruntime", "backend/model.onnx", "this machine", "tests:linear"):
        assert words in text
    assert json.loads(torchship("inspect", "linear", "--json").output)["manifest"]["max_batch"] == 4
    torchship("store", "export", "colour", tmp_path / "c.zip")
    assert "red, green, blue" in torchship("inspect", tmp_path / "c.zip").output
    (store.resolve("linear") / "backend" / "model.onnx").write_bytes(b"")
    with pytest.raises(CorruptArtifact):
        torchship("inspect", "linear")
    assert "onnxruntime" in torchship("inspect", "linear", "--no-verify").output


def test_store_commands(store: Store, tmp_path: Path) -> None:
    assert "linear" in torchship("store", "list").output
    assert "nothing is published" in torchship("store", "list", "--store", tmp_path / "other").output
    assert "linear" in torchship("store", "--store", tmp_path / "other", "list", "--store", store.root).output
    assert [entry["name"] for entry in json.loads(torchship("store", "list", "--json").output)] == ["colour", "linear"]
    assert "onnxruntime" in torchship("store", "show", "linear").output
    shown = json.loads(torchship("store", "show", "linear", "--json").output)
    assert [(one["version"], one["current"]) for one in shown] == [(1, False), (2, True)]
    torchship("store", "current", "linear", "1")
    assert store.current("linear") == 1
    assert torchship("store", "remove", "linear@1", input="n\n").exit_code == 1
    assert store.versions("linear") == (1, 2)
    torchship("store", "remove", "linear@1", "--yes")
    torchship("store", "export", "linear@2", tmp_path / "l.tar")
    torchship("store", "remove", "linear", input="y\n")
    assert store.versions("linear") == ()
    assert "linear@3" in torchship("store", "import", tmp_path / "l.tar").output
    assert "other@1" in torchship("store", "import", tmp_path / "l.tar", "--name", "other").output
    assert "again@1" in torchship("store", "publish", tmp_path / "linear", "--name", "again").output
    with pytest.raises(BadConfig):
        torchship("store", "remove", "linear@current")
    with pytest.raises(NotFound):
        torchship("store", "show", "nope")
    with pytest.raises(NotFound, match="has no version 9"):  # and nothing was asked: there is no answer
        torchship("store", "remove", "colour@9")


def test_wrong_loads_are_told_before_a_server_is_started() -> None:
    for option, word in (("--sweep", "p99"), ("--rate", "a"), ("--concurrency", "0")):
        found = torchship("bench", "nope", option, word)
        assert found.exit_code == 2
        assert f"'{word}' is not a l" in found.output


def test_files_are_looked_at_before_a_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "x.npy").touch()
    with pytest.raises(BadInput, match="unknown suffix"):
        torchship("predict", "nope", "--input", tmp_path / "x.npy", "--output", "out.txt")
    with pytest.raises(NotFound, match=r"no file .*y\.npy"):
        torchship("predict", "nope", "--input", tmp_path / "y.npy")


GIVEN = np.array([[1, 2, 3], [4, 5, 6]], np.float32)


def write_all(folder: Path) -> list[Path]:
    """The same input in every kind of file."""
    np.save(folder / "x.npy", GIVEN)
    np.savez(folder / "x.npz", x=GIVEN)
    (folder / "x.safetensors").write_bytes(tensorfile.encode({"x": GIVEN}))
    (folder / "x.json").write_text(json.dumps({"x": GIVEN.tolist()}))
    (folder / "list.json").write_text(json.dumps(GIVEN.tolist()))
    item = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": GIVEN.ravel().tolist()}
    (folder / "oip.json").write_text(json.dumps({"inputs": [item]}))
    return [folder / name for name in ("x.npy", "x.npz", "x.safetensors", "x.json", "list.json", "oip.json")]


def test_predict_takes_every_kind_of_file(store: Store, tmp_path: Path) -> None:
    for path in write_all(tmp_path):
        answer = json.loads(torchship("predict", "linear", "--input", path, "--json").output)
        wanted = {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": (GIVEN @ WEIGHT).ravel().tolist()}
        assert answer["outputs"] == [wanted], path.name


@pytest.mark.parametrize("suffix", ["npz", "npy", "safetensors", "json"])
def test_predict_writes_every_kind_of_file(store: Store, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    text = torchship("predict", "linear", "--input", write_all(tmp_path)[0], "--output", out).output
    assert "y FP32[2, 2]" in text
    if suffix == "json":
        found = np.array(json.loads(out.read_text())[0]["data"]).reshape(2, 2)
    elif suffix == "safetensors":
        found = tensorfile.decode(out.read_bytes())["y"]
    else:
        loaded = np.load(io.BytesIO(out.read_bytes()))
        found = loaded if suffix == "npy" else loaded["y"]
    np.testing.assert_array_equal(found, GIVEN @ WEIGHT)


def test_predict_names_what_is_in_a_picture(store: Store, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "red.png")
    text = torchship("predict", "colour", "--input", tmp_path / "red.png", "--top", "2").output
    assert text.splitlines()[0].endswith("red")
    assert len(text.splitlines()) == 2
    numbers = torchship("predict", "colour", "--input", tmp_path / "red.png", "--mean", "0", "--std", "1", "--json")
    assert json.loads(numbers.output)["outputs"][0]["data"] == pytest.approx([7.84, 0.39, 0.39], abs=0.01)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.npy", b"no", "x.npy: not a readable .npy"),
        ("x.npz", b"no", "x.npz: not a readable .npz"),
        ("x.json", b"{", "not JSON"),
        ("x.json", b"3", "not a mapping"),
        ("x.json", b'{"x": [[1, 2], [3]]}', "input 'x'"),
        ("x.json", b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [5], "data": [1]}]}', "do not fill"),
        ("x.safetensors", b"no", "not a readable safetensors"),
        ("x.png", b"no", "a picture cannot become x:FP32[-1,3]"),
        ("x.txt", b"no", "a .txt file is not understood"),
        ("x.json", b'{"y": [1]}', "missing ['x']"),
    ],
)
def test_predict_says_what_is_wrong_with_a_file(
    store: Store, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput) as caught:
        torchship("predict", "linear", "--input", tmp_path / name)
    assert words in str(caught.value)


def test_predict_refuses_pickles_and_missing_files(store: Store, tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([print], object), allow_pickle=True)
    with pytest.raises(BadInput, match="not a readable"):
        torchship("predict", "linear", "--input", tmp_path / "evil.npy")
    with pytest.raises(NotFound):
        torchship("predict", "linear", "--input", tmp_path / "nope.npy")
    with pytest.raises(BadInput, match="is not NAME=VALUE"):
        torchship("predict", "linear", "--input", tmp_path / "evil.npy", "--parameter", "x")


class Served(BaseHTTPRequestHandler):
    """A model of the Open Inference Protocol that echoes its input as bytes."""

    def do_GET(self) -> None:
        tensor = {"name": "x", "datatype": "BYTES", "shape": [-1]}
        self.reply(200, json.dumps({"name": "echo", "inputs": [tensor], "outputs": [tensor]}).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers["Inference-Header-Content-Length"])
        request = oip_json.decode_request(body, model="echo", header_length=length)
        if request.parameters.get("fail"):
            self.reply(503, b'{"error": "the line is full"}')
            return
        answer = oip_json.encode_response(Response("echo", "1", {"x": request.inputs["x"]}), request)
        self.reply(200, answer.data, header_length=answer.header_length)

    def reply(self, status: int, body: bytes, header_length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if header_length is not None:
            self.send_header("Inference-Header-Content-Length", str(header_length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """A server of one model."""
    server = HTTPServer(("127.0.0.1", 0), Served)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v2/models/echo"
    server.shutdown()
    server.server_close()
    thread.join()


def test_predict_asks_a_server(url: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"hello")
    for target in (url, url.replace("/v2/models", "")):
        answer = json.loads(torchship("predict", target, "--input", tmp_path / "x.bin", "--json").output)
        assert answer["outputs"][0]["data"] == ["hello"]
    with pytest.raises(Unavailable, match="the line is full"):
        torchship("predict", url, "--input", tmp_path / "x.bin", "--parameter", "fail=true")


def test_predict_says_when_no_server_is_there(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"hello")
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:9"):
        torchship("predict", "http://127.0.0.1:9/v2/models/x", "--input", tmp_path / "x.bin")
    with pytest.raises(BadInput, match="names no model"):
        torchship("predict", "http://127.0.0.1:9", "--input", tmp_path / "x.bin")
