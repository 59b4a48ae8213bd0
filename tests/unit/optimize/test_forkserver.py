"""Forked children behave like fresh ones, whatever they do, and none outlives the server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import closing

import psutil
import pytest

from tests.unit.process_targets import ENDINGS, gone
from torchship import process
from torchship.optimize.forkserver import Forkserver

HERE = "tests.unit.process_targets"


@pytest.fixture
def forks() -> Iterator[Forkserver]:
    with closing(Forkserver(["wave", "no_such_module"], threads=1)) as server:
        yield server


def test_what_the_server_imported_is_there_at_once(forks: Forkserver) -> None:
    assert process.run(f"{HERE}:imported", argument="wave", timeout=60).value is False
    first = forks.run(f"{HERE}:imported", argument="wave", timeout=60)
    second = forks.run(f"{HERE}:imported", argument="wave", timeout=60)
    assert (first.value, second.value) == (True, True)
    servers = {forks.run(f"{HERE}:parents", argument=None, timeout=60).value[0] for _ in range(2)}
    assert len(servers) == 1
    assert servers != {os.getpid()}


@pytest.mark.parametrize(("target", "argument", "fault"), ENDINGS)
def test_every_end_has_its_words(forks: Forkserver, target: str, argument: object, fault: str) -> None:
    outcome = forks.run(f"{HERE}:{target}", argument=argument, timeout=60)
    assert fault in outcome.fault
    assert ("last words" in outcome.log) == (target == "complain")
    assert forks.run(f"{HERE}:echo", argument="still here", timeout=60).value == "still here"


def test_hangs_and_blow_ups_are_ended(forks: Forkserver) -> None:
    forks.run(f"{HERE}:echo", argument=None, timeout=60)
    assert "did not finish within" in forks.run(f"{HERE}:sleep", argument=60, timeout=0.5).fault
    outcome = forks.run(f"{HERE}:eat", argument=400 * 2**20, timeout=60, memory=200 * 2**20)
    assert "more than its limit of 0.20 GiB" in outcome.fault


def test_a_server_that_was_killed_is_replaced(forks: Forkserver) -> None:
    server = forks.run(f"{HERE}:parents", argument=None, timeout=60).value[0]
    os.kill(server, signal.SIGKILL)
    assert forks.run(f"{HERE}:echo", argument=1, timeout=60).value == 1
    assert forks.run(f"{HERE}:parents", argument=None, timeout=60).value[0] != server


def test_children_die_with_their_server(forks: Forkserver) -> None:
    outcome = forks.run(f"{HERE}:kill_the_parent", argument=None, timeout=60)
    assert outcome.fault == "killed by SIGKILL"
    assert gone(int(outcome.log))


def test_closing_it_ends_the_server() -> None:
    server = Forkserver([], threads=1)
    with closing(server):
        pid = server.run(f"{HERE}:parents", argument=None, timeout=60).value[0]
        assert psutil.pid_exists(pid)
    assert gone(pid)
