"""TLS and mTLS: REST, HTTP/2 and gRPC on one port, chosen by ALPN; strangers stay outside."""

from __future__ import annotations

import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.unit.protocols.running import Running, running
from torchship.errors import BadConfig
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.http.listen import Certificates, tls_context


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a certificate for localhost, and one for a client."""
    folder = tmp_path_factory.mktemp("papers")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=60)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    for name, subject in (("server", "localhost"), ("client", "caller")):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={subject}")
        (folder / "ext").write_text("subjectAltName=DNS:localhost\n")
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", f"{name}.pem", "-days", "2", "-extfile", "ext",
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def server(papers: Path) -> Iterator[Running]:
    async def listen(front: Front) -> Any:
        tls = tls_context(papers / "server.pem", key=papers / "server.key", clients=papers / "ca.pem")
        return await rest.listen(front, port=0, tls=tls)

    with running(listen) as found:
        yield found


def caller(papers: Path, *protocols: str, known: bool = True) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(papers / "ca.pem"))
    context.set_alpn_protocols(list(protocols))
    if known:
        context.load_cert_chain(papers / "client.pem", papers / "client.key")
    return context


def ask(server: Running, context: ssl.SSLContext, data: bytes) -> bytes:
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(data)
        return secure.recv(4096)


def test_http1(server: Running, papers: Path) -> None:
    answer = ask(server, caller(papers, "http/1.1"), b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


def test_http2_by_alpn(server: Running, papers: Path) -> None:
    answer = ask(server, caller(papers, "h2", "http/1.1"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    assert answer[3] == 4  # SETTINGS


def test_curl(server: Running, papers: Path) -> None:
    words = ["--cacert", "ca.pem", "--cert", "client.pem", "--key", "client.key", "--resolve"]
    url = f"https://localhost:{server.port}/v2/health/ready"
    for version in ("--http1.1", "--http2"):
        done = subprocess.run(
            ["curl", "-sS", version, *words, f"localhost:{server.port}:127.0.0.1", url],
            cwd=papers, capture_output=True, timeout=30, check=True,
        )  # fmt: skip
        assert done.stdout == b'{"ready":true}'


def test_strangers(server: Running, papers: Path) -> None:
    stranger, answer = caller(papers, "http/1.1", known=False), b""
    with suppress(ssl.SSLError, ConnectionError):
        answer = ask(server, stranger, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer == b""
    assert ask(server, caller(papers, "http/1.1"), b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")


def test_grpc_client(server: Running, papers: Path) -> None:
    import grpc

    words = [(papers / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem")]
    options = [("grpc.ssl_target_name_override", "localhost")]
    with grpc.secure_channel(f"127.0.0.1:{server.port}", grpc.ssl_channel_credentials(*words), options) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        assert call(b"", timeout=20) == b"\x08\x01"


@pytest.mark.parametrize(
    "names", [("no.pem", "server.key", ""), ("server.pem", "client.key", ""), ("server.pem", "server.key", "ext")]
)
def test_papers_that_are_not_right(papers: Path, names: tuple[str, str, str]) -> None:
    with pytest.raises(BadConfig, match="tls: cannot use"):
        tls_context(papers / names[0], key=papers / names[1], clients=papers / names[2] if names[2] else "")


def test_a_certificate_is_renewed_in_place(papers: Path, tmp_path: Path) -> None:
    """New connections get the new one; a pair that does not belong together, half-copied, changes nothing."""
    files = {name: tmp_path / f"server.{name}" for name in ("pem", "key")}

    def put(source: str, *kinds: str) -> None:
        for kind in kinds:
            files[kind].write_bytes((papers / f"{source}.{kind}").read_bytes())

    put("server", "pem", "key")
    certificates = Certificates(files["pem"], key=files["key"])

    async def listen(front: Front) -> Any:
        return await rest.listen(front, port=0, tls=certificates.context)

    def served(found: Running) -> str:
        context = ssl.create_default_context(cafile=str(papers / "ca.pem"))
        context.check_hostname = False
        with (
            socket.create_connection(("127.0.0.1", found.port), timeout=10) as plain,
            context.wrap_socket(plain) as link,
        ):
            told: Any = link.getpeercert()
            return str(dict(pair[0] for pair in told["subject"])["commonName"])

    with running(listen) as found:
        assert served(found) == "localhost"
        for kinds, expected in ((("pem",), "localhost"), (("key",), "caller")):
            put("client", *kinds)
            certificates.renew()
            assert served(found) == expected


def test_a_root_that_is_removed_is_no_longer_trusted(papers: Path, tmp_path: Path) -> None:
    """The clients of the authority that is in the file now get in, those of one that was in it do not."""
    for name in ("other", "root"):
        words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}"]
        subprocess.run(["openssl", *words, *files], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    clients, ours, theirs = tmp_path / "clients.pem", papers / "ca.pem", tmp_path / "other.pem"
    clients.write_bytes(ours.read_bytes() + theirs.read_bytes())
    certificates = Certificates(papers / "server.pem", key=papers / "server.key", clients=clients)

    async def listen(front: Front) -> Any:
        return await rest.listen(front, port=0, tls=certificates.context)

    other = caller(papers, "http/1.1", known=False)
    other.load_cert_chain(theirs, tmp_path / "other.key")

    def let_in(found: Running, context: ssl.SSLContext) -> bool:
        with suppress(ssl.SSLError, ConnectionError):
            return ask(found, context, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 200")
        return False

    with running(listen) as found:
        assert let_in(found, caller(papers, "http/1.1"))
        assert let_in(found, other)
        clients.write_bytes(theirs.read_bytes())
        certificates.renew()
        assert not let_in(found, caller(papers, "http/1.1"))
        assert let_in(found, other)
        clients.write_bytes(b"half-written")
        certificates.renew()
        assert let_in(found, other)
