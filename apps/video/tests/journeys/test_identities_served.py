"""Journey: identities of a real server: found by the served line, changed by hand, forgotten, and back after a kill."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from PIL import Image

ROOT = Path(__file__).parents[4]
CONFIG = """
[http]
port = 0

[[model]]
name = "appearance"
outputs = ["embedding", "jpeg", "sharpness", "usable"]
stages = [{{ run = "torchship_video.appearance:Crops" }}, {{ run = "torchship_video.appearance:Histogram" }}]

[[mount]]
run = "apps.video.tests.identity_mount:mount"
options = {{ gallery = "{gallery}", walk = {walk} }}
"""


@contextlib.contextmanager
def served(folder: Path, *, walk: bool) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    config, log = folder / "server.toml", folder / f"log-{walk}"
    config.write_text(CONFIG.format(gallery=folder / "gallery", walk=str(walk).lower()))
    with log.open("wb") as output:
        command = [sys.executable, "-m", "torchship", "serve", str(config)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=url_of(child, log), timeout=30) as client:
            yield client, child
    finally:
        if child.poll() is None:
            child.terminate()
            assert child.wait(60) == 0, log.read_text()[-3000:]
        assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


def url_of(child: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        for word in log.read_text().split():
            if word.startswith("http://") and "/v2/" in word:
                return word.partition("/v2/")[0]
        time.sleep(0.1)
    child.kill()
    raise AssertionError(log.read_text())


def people(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/identities").json()["identities"]
    return found


def test_identities_are_found_shown_changed_by_hand_and_survive_a_kill(tmp_path: Path) -> None:
    with served(tmp_path, walk=True) as (client, child):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(
            len(one["cameras"]) == 2 for one in people(client) or [{"cameras": ()}]
        ):
            time.sleep(0.2)
        red, blue = (client.get(f"/v1/identities/{one['identity']}").json() for one in people(client))
        for one in (red, blue):
            assert [visit["camera"] for visit in one["visits"]] == ["door", "yard"]
            assert one["visits"][1]["similarity"] > 0.8
        crop = client.get(red["visits"][0]["crops"][0]["url"])
        assert crop.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(crop.content)).size == (64, 128)
        assert client.get("/v1/transitions").json()["transitions"][0]["to_camera"] == "yard"
        refused = client.post(f"/v1/identities/{red['identity']}/merge", json={"other": blue["identity"]})
        assert refused.status_code == 400
        assert "at one time" in refused.text
        assert client.post(f"/v1/identities/{red['identity']}/merge", json={"others": 1}).status_code == 400
        yard = red["visits"][1]["visit"]
        new = client.post(f"/v1/identities/{red['identity']}/split", json={"visits": [yard]}).json()["new"]
        assert client.post(f"/v1/identities/{red['identity']}/merge", json={"other": new}).status_code == 200
        assert client.get(f"/v1/identities/{new}").status_code == 404
        assert client.delete(f"/v1/identities/{blue['identity']}").json()["forgotten"] == 2
        assert client.delete(f"/v1/identities/{blue['identity']}").status_code == 404
        assert client.get("/v1/identities?limit=0").status_code == 400
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    files = b"".join(path.read_bytes() for path in (tmp_path / "gallery").iterdir())
    assert crop.content in files
    with served(tmp_path, walk=False) as (client, _):
        (back,) = people(client)
        assert back["identity"] == red["identity"]
        shown = client.get(f"/v1/identities/{back['identity']}").json()
        assert [visit["visit"] for visit in shown["visits"]] == [visit["visit"] for visit in red["visits"]]
        assert all(visit["by_hand"] for visit in shown["visits"])
        assert client.get(red["visits"][0]["crops"][0]["url"]).content == crop.content
        assert msgspec.json.decode(client.get("/v1/identities?camera=nowhere").content)["identities"] == []
