"""What a container does to a server: few descriptors, process number 1, system calls that are refused."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys

import pytest

from torchship.errors import Unavailable
from torchship.serve.container import check_system_calls, room_for_connections

INIT = """
import os, subprocess, sys, time
from torchship.serve.container import become_init
become_init()
assert os.getppid() == 1, os.getppid()
for _ in range(3):
    subprocess.run([sys.executable, "-c", "import os\\nif not os.fork(): os._exit(0)"], check=True)
time.sleep(0.3)
states = [open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] for pid in os.listdir("/proc") if pid.isdigit()]
print(os.getpid(), states.count("Z"), flush=True)
sys.exit(7)
"""


def limited(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))


@pytest.mark.parametrize(("limit", "workers", "room"), [(300, 50, 36), (1024, 10, 920), (1_000_000, 50, 4096)])
def test_descriptors_are_kept_for_the_workers(
    monkeypatch: pytest.MonkeyPatch, limit: int, workers: int, room: int
) -> None:
    limited(monkeypatch, limit)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    assert room_for_connections(workers) == room


def test_too_few_descriptors_are_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    limited(monkeypatch, 256)
    with pytest.raises(Unavailable, match="50 workers need 280 file descriptors, this process may have 256"):
        room_for_connections(50)


@pytest.mark.parametrize("name", ["memfd_create", "pidfd_open"])
def test_a_system_call_that_is_refused_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    check_system_calls()

    def refused(*_: object) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, name, refused)
    with pytest.raises(Unavailable, match=f"the system call {name} is not allowed here"):
        check_system_calls()


def test_process_number_1_waits_for_orphans_and_ends_as_its_child_does() -> None:
    words = ["unshare", "--pid", "--fork", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*words, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this process may not make a namespace of its own")
    done = subprocess.run([*words, sys.executable, "-c", INIT], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.split() == ["2", "0"], done.stderr
    assert done.returncode == 7
