"""`torchship serve` with TLS, client certificates and tokens, asked on both doors by stock clients and our own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from tests.journeys.test_server_process import ROOT, Running
from tests.unit.protocols.test_tls import papers
from torchship.client import Client, caller_context
from torchship.errors import Denied, Unauthenticated, Unavailable
from torchship.serve.access import new_token

__all__ = ["papers"]  # a fixture
FOUR = np.ones((1, 4), np.float32)


class Secure:
    """A running server that asks for a certificate, and for a token."""

    def __init__(self, folder: Path, papers: Path, receivers: int) -> None:
        self.token, stored = new_token()
        self.papers = papers
        (folder / "serve.toml").write_text(f"""
            [http]
            receivers = {receivers}
            [tls]
            certificate = "{papers}/server.pem"
            key = "{papers}/server.key"
            clients = "{papers}/ca.pem"
            [grpc]
            port = 0
            [[token]]
            name = "shop"
            hash = "{stored}"
            [[model]]
            name = "double"
            run = "tests.serving:double"
        """)
        self.process = Running(str(folder / "serve.toml"), "--http-port", "0")
        self.place = self.process.url.removeprefix("https://127.0.0.1")
        self.http = f"localhost{self.place}"
        told = re.search(r"gRPC at 127\.0\.0\.1:(\d+)", "".join(self.process.lines))
        assert told
        self.grpc = f"localhost:{told[1]}"

    @property
    def files(self) -> dict[str, str]:
        return {name: str(self.papers / file) for name, file in (
            ("authority", "ca.pem"), ("certificate", "client.pem"), ("key", "client.key"))}  # fmt: skip


@pytest.fixture(scope="module", params=[0, 2])
def secure(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, papers: Path) -> Iterator[Secure]:
    server = Secure(tmp_path_factory.mktemp("secure"), papers, request.param)
    yield server
    server.process.child.terminate()
    server.process.finish()
    assert server.process.child.returncode == 0


def test_our_client(secure: Secure) -> None:
    for url in (f"https://{secure.http}", f"grpcs://{secure.http}", f"grpcs://{secure.grpc}"):
        tls = caller_context(**secure.files)
        with Client(url, tls=tls, token=secure.token) as client:
            assert client.ready("double")
            assert (client.infer("double", FOUR)["y"] == 2).all()
            with pytest.raises(Denied):
                client.statistics("double")
        with Client(url, tls=tls) as client, pytest.raises(Unauthenticated, match="token"):
            client.infer("double", {"x": FOUR})
        with Client(url, tls=caller_context(authority=secure.files["authority"])) as client:
            assert not client.ready()
        with Client(url) as client, pytest.raises(Unavailable):
            client.metadata()


def test_triton_clients(secure: Secure) -> None:
    files = secure.files
    headers = {"authorization": f"Bearer {secure.token}"}
    one = tritonclient.grpc.InferInput("x", [1, 4], "FP32")
    one.set_data_from_numpy(FOUR)
    with tritonclient.grpc.InferenceServerClient(
        secure.grpc,
        ssl=True,
        root_certificates=files["authority"],
        certificate_chain=files["certificate"],
        private_key=files["key"],
    ) as rpc:
        assert (rpc.infer("double", [one], headers=headers).as_numpy("y") == 2).all()
    two = tritonclient.http.InferInput("x", [1, 4], "FP32")
    two.set_data_from_numpy(FOUR)
    with tritonclient.http.InferenceServerClient(
        secure.http, ssl=True, ssl_context_factory=lambda: caller_context(**files), insecure=False
    ) as rest:
        assert (rest.infer("double", [two], headers=headers).as_numpy("y") == 2).all()


def test_statuses(secure: Secure) -> None:
    with httpx.Client(base_url=f"https://{secure.http}", verify=caller_context(**secure.files)) as client:
        missing = client.post("/v2/models/double/infer")
        assert missing.status_code == 401
        assert missing.headers["www-authenticate"].startswith("Bearer")
        wrong = {"authorization": f"Bearer {secure.token}"}
        assert client.get("/metrics", headers=wrong).status_code == 403


def test_bench(secure: Secure) -> None:
    files = secure.files
    words = [word for name, file in files.items() for word in (f"--{name}", file)]
    for url in (f"https://{secure.http}/double", f"grpcs://{secure.grpc}/double"):
        done = subprocess.run(
            [sys.executable, "-m", "torchship", "bench", url, *words, "--token", secure.token, "--json",
             "--concurrency", "2", "--seconds", "0.2", "--warm-up", "0"],
            cwd=ROOT, check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (run,) = json.loads(done.stdout)["runs"]
        assert run["answers"] > 0
        assert run["faults"] == 0
