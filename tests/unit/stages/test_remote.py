"""Remote stages against a real gRPC server: retries, time-outs, circuits; every fault with its own error."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.pipeline.test_plan import BODIES
from tests.unit.stages.oip_server import Behaviour, serve
from torchship.client import Budget
from torchship.errors import BadConfig, BadInput, Busy, Expired, NotFound, StageFailed, TorchshipError, Unavailable
from torchship.pipeline import Composed, PipelineConfig, StageConfig, plan
from torchship.pipeline.opening import describe_apart
from torchship.stages.remote import Endpoint, Endpoints, Remote, read_options
from torchship.tensors import Signature

X = {"x": np.arange(6, dtype=np.float32).reshape(3, 2)}
SIGNATURE = Signature.parse("x:FP32[-1,2] -> y:FP32[-1,2]")
DEAD = "grpc://127.0.0.1:9/double"


@pytest.fixture
def told() -> Behaviour:
    """What the server does."""
    return Behaviour()


@pytest.fixture
def url(told: Behaviour) -> Iterator[str]:
    """A server of `double`."""
    with serve(told) as port:
        yield f"grpc://127.0.0.1:{port}/double"


def remote(*urls: str, **options: Any) -> Remote:
    """A remote stage whose signature is known."""
    return Remote(urls, signature=SIGNATURE, options=read_options(options))


def test_it_asks_and_answers(url: str, told: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    stage = Remote([url], options=read_options({"parameters": {"a": 1}, "token_env": "MY_TOKEN"}))
    assert stage.signature == SIGNATURE  # as the server's metadata says
    assert stage.signature.batched
    np.testing.assert_array_equal(stage(X, {"b": 2.5})["y"], X["x"] * 2)
    assert told.calls == [{"model": "double", "a": 1, "b": 2.5}]
    assert ("authorization", "Bearer secret") in told.headers
    stage.close()


@pytest.mark.parametrize(
    ("code", "error"),
    [("INVALID_ARGUMENT", BadInput), ("NOT_FOUND", NotFound), ("INTERNAL", StageFailed)],
)
def test_a_clear_no_is_not_asked_again(url: str, told: Behaviour, code: str, error: type[TorchshipError]) -> None:
    told.fail, told.times = code, 1
    stage = remote(url)
    with pytest.raises(error, match="as told"):
        stage(X)
    assert len(told.calls) == 1
    stage.close()


def test_what_may_pass_is_tried_again(url: str, told: Behaviour) -> None:
    told.fail, told.times = "UNAVAILABLE", 2
    stage = remote(url)
    np.testing.assert_array_equal(stage(X)["y"], X["x"] * 2)
    assert len(told.calls) == 3
    stage.close()


def test_a_dead_endpoint_costs_nothing_but_a_retry(url: str, told: Behaviour) -> None:
    stage = remote(DEAD, url, breaker_failures=2)
    for _ in range(6):
        stage(X)
    assert told.rows == 6 * 3
    stage.close()


def test_a_slow_server_runs_into_the_timeout(url: str, told: Behaviour) -> None:
    told.delay = 0.5
    stage = remote(url, timeout=0.1, attempts=2)
    with pytest.raises(Expired):
        stage(X)
    stage.close()


def test_open_circuits_answer_at_once(told: Behaviour) -> None:
    stage = remote(DEAD, breaker_failures=2, breaker_pause=60, attempts=1)
    for _ in range(2):
        with pytest.raises(Unavailable):
            stage(X)
    with pytest.raises(Busy) as caught:
        stage(X)
    assert 20 < caught.value.retry_after <= 60
    stage.close()


def test_a_server_that_comes_back_is_found_again(told: Behaviour) -> None:
    with serve(told) as port:
        stage = remote(f"grpc://127.0.0.1:{port}/double", breaker_failures=1, breaker_pause=0.01, attempts=1)
        stage(X)
    with pytest.raises(TorchshipError):
        stage(X)
    with serve(told, port=port):
        found = None
        for _ in range(200):
            try:
                found = stage(X)
                break
            except TorchshipError:
                pass
            time.sleep(0.05)
    assert found is not None
    stage.close()


def test_a_batch_is_cut_for_several_endpoints(told: Behaviour) -> None:
    told.delay = 0.02
    other = Behaviour(delay=0.02)
    x = np.arange(46, dtype=np.float32).reshape(23, 2)
    with serve(told) as port, serve(other) as second:
        urls = [f"grpc://127.0.0.1:{number}/double" for number in (port, second)]
        stage = remote(*urls)
        np.testing.assert_array_equal(stage({"x": x})["y"], x * 2)
        assert [len(told.calls), len(other.calls)] == [1, 1]
        np.testing.assert_array_equal(stage({"x": x[:1]})["y"], x[:1] * 2)
        stage.close()
        many = remote(urls[0], parallel=8)
        for _ in range(5):
            np.testing.assert_array_equal(many({"x": x})["y"], x * 2)
        many.close()
        other.fail, other.times = "UNAVAILABLE", 1  # one part is asked for again, the other is not
        before = len(told.calls) + len(other.calls)
        stage = remote(*urls)
        np.testing.assert_array_equal(stage({"x": x})["y"], x * 2)
        assert len(told.calls) + len(other.calls) == before + 3
        told.fail, told.times, other.fail, other.times = "INTERNAL", 1, "INTERNAL", 1
        with pytest.raises(StageFailed, match="as told"):
            stage({"x": x})
        stage.close()
    assert told.most > 1, "nothing was asked at the same time"


def test_a_killed_endpoint_is_left_alone(told: Behaviour) -> None:
    with serve(told) as port:
        with serve(Behaviour()) as second:
            stage = remote(
                *(f"grpc://127.0.0.1:{n}/double" for n in (port, second)), breaker_failures=2, breaker_pause=60
            )
            stage(X)
        began = time.monotonic()
        for _ in range(40):
            np.testing.assert_array_equal(stage(X)["y"], X["x"] * 2)
        assert time.monotonic() - began < 30, "each call waited for the dead one"
        stage.close()


def test_grpcs_trusts_the_given_authority_only(told: Behaviour, tmp_path: Path) -> None:
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    for name in ("server", "stranger"):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        subprocess.run([*words, *files, *names], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    papers = (tmp_path / "server.key").read_bytes(), (tmp_path / "server.pem").read_bytes()
    with serve(told, papers=papers) as port:
        url = f"grpcs://localhost:{port}/double"
        stage = remote(url, ca=str(tmp_path / "server.pem"))
        np.testing.assert_array_equal(stage(X)["y"], X["x"] * 2)
        stage.close()
        for options in ({"ca": str(tmp_path / "stranger.pem")}, {}):
            stage = remote(url, attempts=1, timeout=2.0, **options)
            with pytest.raises(Unavailable):
                stage(X)
            stage.close()
    with pytest.raises(BadConfig, match=r"options\.ca"):
        remote(url, ca=str(tmp_path / "none.pem"))


def test_as_a_stage_of_a_pipeline(url: str) -> None:
    stages = (
        StageConfig(run=f"{BODIES}:parse"),
        StageConfig(remote=url, name="far"),
        StageConfig(run=f"{BODIES}:score"),
    )
    found = plan(PipelineConfig("p", stages), describing=describe_apart)
    assert found.nodes[1].signature.batched
    composed = Composed(found)
    assert composed({"text": np.array([b"1,2,3"], object)})["rows"].tolist() == [3]
    composed.close()


def test_parameters_that_it_names_are_passed_on(url: str, told: Behaviour) -> None:
    found = plan(PipelineConfig("p", (StageConfig(remote=url, parameters={"top": 1, "group": ""}),)))
    assert {p.name: p.default for p in found.parameters} == {"top": 1, "group": ""}
    composed = Composed(found)
    composed(X, {"top": 3, "other": 7})
    with pytest.raises(BadInput, match="'top'"):
        composed(X, {"top": "many"})
    composed.close()
    assert told.calls == [{"model": "double", "top": 3, "group": ""}]


def test_faults_of_configuration(url: str) -> None:
    def planned(**stage: Any) -> None:
        plan(PipelineConfig("p", (StageConfig(**stage),)))

    with pytest.raises(BadConfig, match=r"\$\.stages\[0\]: 'http://x' is not an endpoint"):
        planned(remote="http://x")
    with pytest.raises(BadConfig, match=r"options: .*nope"):
        planned(remote=url, options={"nope": 1})
    with pytest.raises(BadConfig, match="must be positive"):
        planned(remote=url, options={"attempts": 0})
    with pytest.raises(BadConfig, match="the environment has no NO_SUCH_TOKEN"):
        planned(remote=url, options={"token_env": "NO_SUCH_TOKEN"})
    with pytest.raises(NotFound, match=r"\$\.stages\[0\]: .*no model nope"):
        planned(remote=url.replace("double", "nope"))
    with pytest.raises(Unavailable, match=r"\$\.stages\[0\]"):
        planned(remote=DEAD)
    planned(remote=DEAD, signature="x:FP32[-1,2] -> y:FP32[-1,2]")  # a declared signature needs no server


def endpoint(host: str) -> Endpoint:
    """The model `m` on a host."""
    return Endpoint.parse(f"grpc://{host}:1/m")


class Clock:
    """Time that only moves when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_retry_budget_bounds_retries() -> None:
    pool = Endpoints([endpoint("a"), endpoint("b")], clock=Clock(), budget=Budget(tokens=2, ratio=0.5))
    counts = [len(list(pool.attempts(3))) for _ in range(5)]
    assert counts == [3, 1, 2, 1, 2]  # two in reserve, then one for every two requests


def test_a_circuit_opens_pauses_tries_and_closes() -> None:
    clock = Clock()
    one = endpoint("a")
    pool = Endpoints([one], clock=clock, failures=3, pause=1.0)
    for _ in range(2):
        pool.failed(one)
    assert list(pool.attempts(1)) == [one]
    pool.failed(one)
    assert list(pool.attempts(1)) == []
    assert pool.opens_in == 1.0
    clock.now = 1.1
    assert list(pool.attempts(1)) == [one]
    pool.failed(one)  # the trial failed: twice as long
    assert pool.opens_in == pytest.approx(2.0)
    clock.now = 5
    pool.succeeded(one)
    pool.failed(one)
    assert list(pool.attempts(1)) == [one]


@pytest.mark.parametrize("url", ["grpc://h/m", "grpc://h:1", "grpc://h:1/../x", "grpc://h:1/m/v/w", "grpc://:1/m"])
def test_what_is_no_endpoint(url: str) -> None:
    with pytest.raises(BadConfig):
        Endpoint.parse(url)


def test_endpoints_are_read() -> None:
    found = Endpoint.parse("grpcs://[::1]:443/net-1.b/3")
    where = found.address
    assert (where.netloc, where.model, where.version, where.secure) == ("[::1]:443", "net-1.b", "3", True)
