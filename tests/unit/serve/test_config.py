"""The server's file: every fault is told with its path; nothing is open to others by accident."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.artifact.made import linear
from torchship import hardware
from torchship.artifact import Store
from torchship.errors import BadConfig, Denied, NotFound
from torchship.pipeline import config as pipelines
from torchship.recipe import Recipe
from torchship.serve import config as configs
from torchship.serve.access import check_places, gate, hash_of, is_loopback, new_token
from torchship.serve.config import Token
from torchship.serve.host import configure, default_receivers, most_workers, on_cards

MODEL = {"name": "m", "run": "a:b"}


@pytest.mark.parametrize(
    ("data", "start"),
    [
        ({"modle": []}, "$: Object contains unknown field `modle`"),
        ({"model": [{"name": "1x", "run": "a:b"}]}, "$.model[0].name: Expected `str` matching regex"),
        ({"model": [{"name": "a/../b", "run": "a:b"}]}, "$.model[0].name"),
        ({"model": [{"name": "m"}]}, "$.model[0]: has nothing to run"),
        ({"model": [{**MODEL, "artifact": "x"}]}, "$.model[0]: has artifact and run"),
        ({"model": [MODEL, MODEL]}, "$.model[1].name: 'm' is taken"),
        ({"model": [{**MODEL, "timeout": 0}]}, "$.model[0].timeout: Expected `float` > 0"),
        ({"model": [{"name": "m", "stages": [{"run": "a:b", "copys": 2}]}]}, "$.model[0].stages[0]: Object contains"),
        ({"http": {"port": 70000}}, "$.http.port: Expected `int` <= 65535"),
        ({"token": [{"name": "t", "hash": "secret"}]}, "$.token[0].hash"),
        ({"log": {"level": "loud"}}, "$.log.level"),
    ],
)
def test_faults_are_told_with_their_path(data: object, start: str) -> None:
    with pytest.raises(BadConfig) as caught:
        configs.convert(data)
    assert str(caught.value).startswith(start)


def test_a_file_is_read_and_its_store_found_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('[store]\nroot = "here"\nwatch = 2\n[[model]]\nname = "m"\nartifact = "x@current"\ncopies = 2\n')
    found = configs.read(file)
    assert found.store.root == str(tmp_path / "here")
    assert found.store.watch == 2
    assert found.model[0].pipeline().stages[0].artifact == "x@current"
    assert found.model[0].pipeline().stages[0].copies == 2
    assert found.http.host == "127.0.0.1"
    with pytest.raises(NotFound, match="no file"):
        configs.read(tmp_path / "other.toml")
    file.write_text("[[model")
    with pytest.raises(BadConfig, match="not TOML"):
        configs.read(file)


def test_every_path_may_be_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    stages = (
        '[{artifact = "~/net"}, {run = "a:b", options = {labels = "~/names.txt", all = ["~/x"]}}, '
        '{remote = "grpc://h:1/m", options = {ca = "~/ca.pem"}}]'
    )
    file = tmp_path / "serve.toml"
    file.write_text(
        '[store]\nroot = "~/store"\n[tls]\ncertificate = "~/c.pem"\nkey = "~/k.pem"\n'
        '[control]\ntrace_folder = "~/traces"\n[[mount]]\nrun = "a:b"\noptions = {folder = "~/f"}\n'
        '[[model]]\nname = "one"\nartifact = "~/net"\nlabels = "~/names.txt"\n'
        f'[[model]]\nname = "m"\nstages = {stages}\n'
    )
    found = configs.read(file)
    assert (found.store.root, found.control.trace_folder) == ("/home/ann/store", "/home/ann/traces")
    assert found.tls is not None
    assert (found.tls.certificate, found.tls.key) == ("/home/ann/c.pem", "/home/ann/k.pem")
    assert found.mount[0].options == {"folder": "/home/ann/f"}
    assert (found.model[0].artifact, found.model[0].labels) == ("/home/ann/net", "/home/ann/names.txt")
    placed = found.model[1].stages
    assert placed == pipelines.read(file).stages
    assert placed[0].artifact == "/home/ann/net"
    assert placed[1].options == {"labels": "/home/ann/names.txt", "all": ["/home/ann/x"]}
    assert placed[2].options == {"ca": "/home/ann/ca.pem"}
    assert pipelines.store_of(file) == Path("/home/ann/store")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org", ""])
def test_elsewhere_needs_tokens_or_client_certificates(host: str) -> None:
    with pytest.raises(BadConfig, match=r"\$\.http\.host: .* can be reached from elsewhere"):
        check_places(configs.convert({"http": {"host": host}}))
    if host:  # an empty one is that of [http]
        with pytest.raises(BadConfig, match=r"\$\.grpc\.host"):
            check_places(configs.convert({"grpc": {"host": host, "port": 8001}}))
    check_places(configs.convert({"http": {"host": host}, "token": [{"name": "t", "hash": hash_of("x")}]}))
    papers = {"certificate": "c", "key": "k", "clients": "a"}
    check_places(configs.convert({"http": {"host": host}, "tls": papers}))
    assert not is_loopback(host)
    assert all(is_loopback(near) for near in ("127.0.0.1", "127.3.2.1", "::1", "localhost"))


def test_tokens_open_their_scopes_and_nothing_else() -> None:
    token, stored = new_token()
    other, kept = new_token()
    assert token not in stored
    admit = gate([Token("a", stored), Token("b", kept, ("manage", "metrics"))])
    assert admit is not None
    bearer = {"authorization": f"Bearer {token}"}
    admit("", {})
    admit("infer", bearer)
    admit("infer", {"authorization": f"bearer {token}"})
    admit("manage", {"authorization": f"Bearer {other}"})
    for scope, headers in (
        ("infer", {}),
        ("manage", bearer),
        ("infer", {"authorization": f"Bearer {other}"}),
        ("infer", {"authorization": f"Bearer {token}x"}),
        ("infer", {"authorization": f"Bearer {stored}"}),
        ("infer", {"authorization": token}),
        ("infer", {"authorization": "Bearer"}),
        ("infer", {"authorization": f"Basic {token}"}),
    ):
        with pytest.raises(Denied):
            admit(scope, headers)
    assert gate([]) is None


def test_native_code_is_trusted_by_a_word_on_the_command_line_or_in_the_file(tmp_path: Path) -> None:
    assert [model.trust for model in configure("a", "b@2", trust=True).model] == [True, True]
    assert not configure("a").model[0].trust
    (tmp_path / "s.toml").write_text("")
    with pytest.raises(BadConfig, match="said in the file"):
        configure(str(tmp_path / "s.toml"), trust=True)


@pytest.mark.parametrize("name", ["modèle", "stats", "a/b", "a b"])
def test_a_name_that_no_path_can_hold_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(BadConfig, match=r"\$\.model\[0\]\.name"):
        configs.convert({"model": [{"name": name, "run": "a:b"}]})


def test_receivers_are_the_default_where_a_model_runs_on_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the device that a stage asks for, or that its artifact was made for; a quarter of the cores, at most four."""
    for name, options in (("made", {"device": "cuda"}), ("plain", {})):
        recipe = Recipe("onnxruntime", {**options})
        Store(tmp_path / "store").publish(linear(tmp_path / name, name=name, recipe=recipe).path, name=name)
    models = {
        "asked": {"name": "m", "artifact": "plain", "device": "cuda:1"},
        "dealt": {
            "name": "m",
            "stages": [{"run": "a:b"}, {"artifact": "plain", "device": ["cpu", "cuda"], "copies": 2}],
        },
        "made": {"name": "m", "artifact": "made"},
        "plain": {"name": "m", "artifact": "plain"},
        "missing": {"name": "m", "artifact": "nowhere"},
    }
    for cores, some in ((32, 4), (16, 4), (8, 2), (2, 0)):
        monkeypatch.setattr(hardware, "cores", lambda cores=cores: cores)
        found = {
            name: default_receivers(on_cards(configs.convert({"model": [model]}), Store(tmp_path / "store")))
            for name, model in models.items()
        }
        assert found == {"asked": some, "dealt": some, "made": some, "plain": 0, "missing": 0}


@pytest.mark.parametrize(
    ("model", "workers"),
    [
        ({"run": "a:b"}, 1),  # fifty of these fit into a container with 300 descriptors
        ({"run": "a:b", "copies": 3}, 3),
        ({"run": "a:b", "spare": True}, 2),
        ({"run": "a:b", "copies": 2, "spare": True}, 2),
        ({"artifact": "x", "device": "cuda"}, 2),
        ({"artifact": "x", "device": "cuda", "spare": False}, 1),
        ({"stages": [{"run": "a:b", "copies": 2}, {"artifact": "x", "device": "cuda"}]}, 4),
    ],
)
def test_a_spare_worker_counts_where_there_may_be_one(model: dict[str, object], workers: int, tmp_path: Path) -> None:
    config = configs.convert({"model": [{"name": "m", **model}]})
    assert most_workers(config, on_cards(config, Store(tmp_path))) == workers


def test_receivers_are_said_in_the_file_or_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("[http]\nreceivers = 3\n")
    assert configure(str(file)).http.receivers == 3
    assert configure(str(file), receivers=0).http.receivers == 0
    with pytest.raises(BadConfig, match=r"\$.http.receivers"):
        configs.convert({"http": {"receivers": -1}})
