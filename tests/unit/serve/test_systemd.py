"""What a service manager is told, over sockets as systemd makes them, and when it is told nothing more."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchship.serve.systemd import ServiceSupervisor


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """The manager's end, and how NOTIFY_SOCKET spells it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@torchship-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        sock.settimeout(10)
        yield sock, name


def test_it_tells_and_takes_its_variables_out_of_the_environment(listening: tuple[socket.socket, str]) -> None:
    sock, name = listening
    environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid()), "HOME": "/"}
    manager = ServiceSupervisor(environment)
    assert environment == {"HOME": "/"}
    manager.tell("READY=1", "STATUS=serving")
    assert sock.recv(4096) == b"READY=1\nSTATUS=serving"
    manager.reloading()
    first, second = sock.recv(4096).decode().split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) > 0


def attended(sock: socket.socket, manager: ServiceSupervisor, told: list[tuple[str, str]], *, count: int) -> list[str]:
    """The first datagrams of a manager that sees what is told, one after the other, the last again and again."""

    async def main() -> list[str]:
        loop, left = asyncio.get_running_loop(), list(told)
        sock.setblocking(False)
        task = asyncio.ensure_future(manager.attend(lambda: left.pop(0) if len(left) > 1 else left[0]))
        async with asyncio.timeout(20):
            found = [(await loop.sock_recv(sock, 4096)).decode() for _ in range(count)]
        task.cancel()
        return found

    return asyncio.run(main())


def test_a_sign_of_life_comes_only_while_nothing_hangs(listening: tuple[socket.socket, str]) -> None:
    sock, name = listening
    manager = ServiceSupervisor({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000"})
    told = [
        ("", "serving a"),
        ("", "serving a"),
        ("a hangs", "not ready: a"),
        ("a hangs", "not ready"),
        ("", "serving a"),
    ]
    assert attended(sock, manager, told, count=5) == [
        "WATCHDOG=1\nSTATUS=serving a",
        "WATCHDOG=1",
        "STATUS=a hangs",  # once, and nothing for the second look
        "WATCHDOG=1\nSTATUS=serving a",
        "WATCHDOG=1",
    ]


def test_without_a_watchdog_of_ours_there_are_only_words(listening: tuple[socket.socket, str]) -> None:
    sock, name = listening
    manager = ServiceSupervisor({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": "1"})
    assert attended(sock, manager, [("", "serving\na")], count=1) == ["STATUS=serving a"]


def test_nobody_there_is_no_fault(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    ServiceSupervisor({}).tell("READY=1")
    assert not ServiceSupervisor({}).there
    assert not ServiceSupervisor({"NOTIFY_SOCKET": "vsock:2:1"}).there
    assert "only Unix sockets" in caplog.text
    ServiceSupervisor({"NOTIFY_SOCKET": str(tmp_path / "none")}).tell("READY=1")
    assert "cannot be told READY=1" in caplog.text
