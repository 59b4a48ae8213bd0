"""A server as people run it: a process with a file, signals, faults, and nothing left behind."""

from __future__ import annotations

import json
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.unit.artifact.made import linear
from torchship.client import Client

ROOT = Path(__file__).parents[2]
TWO = """
[[model]]
name = "double"
run = "tests.serving:double"
[[model]]
name = "slow"
run = "tests.serving:sleeper"
"""
RECEIVED = "[http]\nreceivers = 2\n" + TWO


class Running:
    """A server process and where it listens."""

    def __init__(self, *words: str, python: str = sys.executable, **how: Any) -> None:
        command = [python, "-m", "torchship", "serve", *words]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, **how)
        self.lines: list[str] = []
        assert self.child.stderr is not None
        self.url = ""
        for line in self.child.stderr:
            self.lines.append(line)
            if found := re.search(r"(https?://127\.0\.0\.1:\d+)/", line):
                self.url = found[1]
                break

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as fault:
            return fault.code, json.load(fault)

    def double(self, value: float) -> tuple[int, Any]:
        given = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}
        return self.ask("/v2/models/double/infer", {"inputs": [given]})

    def finish(self) -> str:
        assert self.child.stderr is not None
        if not self.child.stderr.closed:
            with self.child.stderr as lines:
                self.lines += lines.readlines()
        self.child.wait(30)
        return "".join(self.lines)


@contextmanager
def serving(text: str, folder: Path, *words: str, **how: Any) -> Iterator[Running]:
    file = folder / "serve.toml"
    file.write_text(text)
    server = Running(str(file), "--http-port", "0", *words, **how)
    try:
        yield server
    finally:
        if server.child.poll() is None:
            server.child.kill()
        server.finish()


def workers_of(server: Running) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(server.child.pid).children(recursive=True)
    return found


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


def leftovers() -> set[str]:
    return {f"{folder}/{name}" for folder in ("/dev/shm", "/tmp") for name in os.listdir(folder) if "arena" in name}


def test_it_answers_survives_kill_9_and_stops_cleanly(tmp_path: Path) -> None:
    before = leftovers()
    with serving(TWO, tmp_path) as server:
        assert server.ask("/v2/health/ready") == (200, {"ready": True})
        assert server.double(2)[1]["outputs"][0]["data"] == [4.0] * 4
        workers = workers_of(server)
        assert len(workers) == 2
        for worker in workers:
            worker.kill()
        status, answer = server.double(3)  # waits for the new worker
        assert (status, answer["outputs"][0]["data"]) == (200, [6.0] * 4)
        assert 'torchship_worker_restarts_total{model="double",version="1",stage="double"} 1' in metrics(server)
        workers = workers_of(server)
        server.child.send_signal(signal.SIGTERM)
        log = server.finish()
        assert server.child.returncode == 0
        assert "Traceback" not in log
        assert gone(workers)
    assert leftovers() <= before


@contextmanager
def service_manager(folder: Path, *, watchdog: float) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """What systemd gives to a service of Type=notify, and its own end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(folder / "notify"))
        sock.settimeout(60)
        told = {"NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": str(int(watchdog * 1e6))}
        yield sock, os.environ | told


def until_told(sock: socket.socket, word: str) -> list[str]:
    """All lines up to the one that begins with `word`."""
    lines: list[str] = []
    while not lines or not lines[-1].startswith(word):
        lines += [line for line in sock.recv(4096).decode().split("\n") if line not in lines[-1:]]
        assert len(lines) < 1000
    return lines


def test_a_service_manager_is_told_and_the_children_are_not_asked_to(tmp_path: Path) -> None:
    with service_manager(tmp_path, watchdog=0.4) as (sock, env), serving(TWO, tmp_path, env=env) as server:
        before = until_told(sock, "READY=1")
        assert before == ["STATUS=opening double, slow", "READY=1"]
        assert until_told(sock, "STATUS=")[-1] == f"STATUS=serving double, slow at {server.url}"
        assert "WATCHDOG=1" in until_told(sock, "WATCHDOG=1")
        for worker in workers_of(server):
            assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & worker.environ().keys()
        server.child.send_signal(signal.SIGHUP)
        assert until_told(sock, "READY=1")[-3:-1][0] == "RELOADING=1"
        assert server.double(2)[0] == 200
        server.child.send_signal(signal.SIGTERM)
        assert until_told(sock, "STOPPING=1")
        assert "Traceback" not in server.finish()
        assert server.child.returncode == 0


def test_a_model_that_hangs_where_it_cannot_be_ended_gets_no_sign_of_life(tmp_path: Path) -> None:
    text = TWO + "run_timeout = 0.3\n"
    ask = {"inputs": [{"name": "ms", "shape": [1], "datatype": "INT32", "data": [6000]}]}
    with (
        service_manager(tmp_path, watchdog=0.4) as (sock, env),
        serving(text, tmp_path, "--one-process", env=env) as server,
    ):
        until_told(sock, "WATCHDOG=1")
        status, answer = server.ask("/v2/models/slow/infer", ask)
        assert (status, "hung: no answer for 0.3 s" in answer["error"]) == (500, True)
        words = "STATUS=a call of stage sleeper of tests.serving:sleeper hangs, and a thread cannot be ended"
        assert until_told(sock, "STATUS=a call of stage")[-1] == words
        assert sock.recv(4096).split(b"\n")[0] == b"WATCHDOG=1", "the call has returned: the server lives again"


def test_a_worker_that_hangs_is_replaced_and_the_watchdog_is_fed(tmp_path: Path) -> None:
    text = TWO + "run_timeout = 0.3\n"
    ask = {"inputs": [{"name": "ms", "shape": [1], "datatype": "INT32", "data": [60_000]}]}
    with service_manager(tmp_path, watchdog=0.4) as (sock, env), serving(text, tmp_path, env=env) as server:
        until_told(sock, "WATCHDOG=1")
        assert server.ask("/v2/models/slow/infer", ask)[0] == 500
        assert not [line for line in until_told(sock, "WATCHDOG=1") if "hangs" in line]
        ask["inputs"][0]["data"] = [0]
        assert server.ask("/v2/models/slow/infer", ask)[0] == 200


def test_in_one_process_there_is_no_other_and_it_says_what_that_costs(tmp_path: Path) -> None:
    with serving(TWO, tmp_path, "--one-process") as server:
        assert server.double(2)[1]["outputs"][0]["data"] == [4.0] * 4
        assert workers_of(server) == []
        code = "import sys, torchship.serve.host; print('google.protobuf' in sys.modules)"
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        assert found.stdout == "False\n"  # gRPC is loaded by its first call
        with Client(server.url.replace("http", "grpc")) as client:
            assert client.infer("double", np.full((1, 4), 3, np.float32))["y"].tolist() == [[6.0] * 4]
        held = re.search(r"^torchship_server_peak_memory_bytes (\d+)$", metrics(server), re.MULTILINE)
        assert held
        assert int(held[1]) > 2**24
        server.child.send_signal(signal.SIGTERM)
        log = server.finish()
        assert server.child.returncode == 0
        assert "a model that crashes ends this server" in log
        assert re.search(r"peak memory \d+\.\d MB of all processes", log)
        assert "Traceback" not in log


def test_in_one_process_a_hang_does_not_keep_the_server_from_stopping(tmp_path: Path) -> None:
    with serving(TWO.replace('name = "slow"', 'name = "slow"\nrun_timeout = 0.2'), tmp_path, "--one-process") as server:
        given = {"name": "ms", "shape": [1], "datatype": "INT32", "data": [600_000]}
        status, answer = server.ask("/v2/models/slow/infer", {"inputs": [given]})
        assert status == 500
        assert "hung" in answer["error"]
        assert server.double(2)[1]["outputs"][0]["data"] == [4.0] * 4  # the others go on
        assert server.ask("/v2/models/slow/infer", {"inputs": [given], "parameters": {"timeout": 100_000}})[0] == 503
        server.child.send_signal(signal.SIGTERM)
        log = server.finish()
        assert server.child.returncode == 0
        assert "terminate called" not in log


def test_receivers_survive_kill_9_and_stop_cleanly(tmp_path: Path) -> None:
    with serving(RECEIVED, tmp_path) as server:
        assert server.double(2)[1]["outputs"][0]["data"] == [4.0] * 4
        children = workers_of(server)
        for child in children:
            child.kill()
        time.sleep(0.5)  # what is dealt to a receiver before its end is known is lost with it
        assert server.double(3)[1]["outputs"][0]["data"] == [6.0] * 4  # waits for a receiver and a worker
        children += workers_of(server)
        server.child.send_signal(signal.SIGTERM)
        log = server.finish()
        assert server.child.returncode == 0
        assert log.count("killed by SIGKILL") == 4
        assert "Traceback" not in log
        assert gone(children)


def metrics(server: Running) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("text", [TWO, RECEIVED], ids=["here", "receivers"])
def test_sigterm_answers_what_is_under_way(tmp_path: Path, text: str) -> None:
    with serving(text, tmp_path) as server:
        body = json.dumps({"inputs": [{"name": "ms", "shape": [1], "datatype": "INT32", "data": [700]}]}).encode()
        port = int(server.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as sock:
            head = f"POST /v2/models/slow/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            time.sleep(0.2)
            server.child.send_signal(signal.SIGTERM)
            sock.settimeout(20)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        server.finish()
        assert server.child.returncode == 0


@pytest.mark.parametrize("text", [TWO, RECEIVED], ids=["here", "receivers"])
def test_two_interrupts_stop_at_once(tmp_path: Path, text: str) -> None:
    with serving(text, tmp_path) as server:
        body = json.dumps({"inputs": [{"name": "ms", "shape": [1], "datatype": "INT32", "data": [20_000]}]}).encode()
        port = int(server.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as sock:
            head = f"POST /v2/models/slow/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            time.sleep(0.2)
            workers = workers_of(server)
            server.child.send_signal(signal.SIGINT)
            time.sleep(0.3)
            assert server.child.poll() is None
            server.child.send_signal(signal.SIGINT)
            server.finish()
            assert server.child.returncode == 130
        assert gone(workers)


@pytest.mark.parametrize(("text", "count"), [(TWO, 2), (RECEIVED, 4)], ids=["here", "receivers"])
def test_kill_9_of_the_host_leaves_no_orphans(tmp_path: Path, text: str, count: int) -> None:
    with serving(text, tmp_path) as server:
        workers = workers_of(server)
        assert len(workers) == count
        server.child.kill()
        assert gone(workers)


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        ('[[model]]\nname = "m"\nrun = "tests.serving:nothing"\n', "has no attribute 'nothing'", 2),
        ('[[model]]\nname = "m"\nartifact = "never-published"\n', "never-published", 1),
        ('[http]\nhost = "0.0.0.0"\n', "can be reached from elsewhere", 2),
        ("[[model]\n", "not TOML", 2),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, message: str, code: int) -> None:
    with serving(f'{text}\n[store]\nroot = "store"\n', tmp_path) as server:
        log = server.finish()
    assert message in log
    assert "Traceback" not in log
    assert server.child.returncode == code


def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with serving(TWO, tmp_path, "--http-port", str(port)) as server:
            log = server.finish()
    assert f"cannot listen on 127.0.0.1:{port}" in log
    assert "Traceback" not in log
    assert server.child.returncode == 1


def python_for(user: int) -> str:
    """An interpreter of this version that a user without rights may run."""
    near = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]
    code = "import sys, msgspec, numpy, torchship"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    for python in near:
        with suppress(OSError):
            if (
                subprocess.run([python, "-c", code], user=user, group=user, env=environment, check=False).returncode
                == 0
            ):
                return python
    pytest.skip(f"user {user} may run no Python with these packages")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_a_user_without_a_name_and_a_home() -> None:
    """As in a container that runs as a number which no list of users knows, its environment empty."""
    user = 12345
    with pytest.raises(KeyError):
        pwd.getpwuid(user)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    how: dict[str, Any] = {"user": user, "group": user, "extra_groups": [], "env": environment}
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        folder = Path(place)
        folder.chmod(0o755)
        linear(folder / "net")
        text = f'[[model]]\nname = "net"\nartifact = "{folder}/net"\n' + TWO
        with serving(text, folder, python=python_for(user), **how) as server:
            given = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
            status, answer = server.ask("/v2/models/net/infer", {"inputs": [given]})
            assert (status, answer["outputs"][0]["data"]) == (200, [7.0, -1.0])
            assert server.double(2)[0] == 200
            assert psutil.Process(server.child.pid).uids().real == user
            server.child.terminate()
            server.finish()
            assert server.child.returncode == 0
