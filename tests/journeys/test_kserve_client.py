"""KServe's Python client, unmodified, against both front doors.

It wants older versions of packages that we use, so it lives in an environment of its own, made on the first run.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.protocols.running import Running, running
from torchship.serve.api import rest
from torchship.serve.api.front import Front
from torchship.serve.http.listen import Listener

HOME = Path(sys.prefix) / "kserve"
VERSION = "0.21.0"


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the other environment."""
    found = HOME / "bin" / "python"
    done = HOME / f"kserve-{VERSION}"
    with (Path(sys.prefix) / "kserve.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at a time
        if not done.exists():
            uv = str(Path(sys.prefix) / "bin" / "uv")
            subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, str(HOME)], check=True, timeout=60)
            words = [uv, "pip", "install", "-q", "--python", str(found), f"kserve=={VERSION}"]
            subprocess.run(words, check=True, timeout=280)
            done.touch()
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    async def listen(front: Front) -> Listener:
        return await rest.listen(front, port=0)

    with running(listen) as found:
        yield found


def test_kserve_client(python: Path, server: Running) -> None:
    place = f"127.0.0.1:{server.port}"
    script = Path(__file__).with_name("kserve_calls.py")
    done = subprocess.run(
        [str(python), str(script), place, place], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout.splitlines()[-1])
    doubled = [[2 * number for number in range(16)]]
    assert heard == {
        "rest ready": [True, True, True],
        "grpc ready": [True, True],
        **{f"{name} {binary}": ["k", doubled] for name in ("rest", "grpc") for binary in (False, True)},
    }
