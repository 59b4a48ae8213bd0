"""Journey: the faces API of a real server: people come and go, thresholds change, workers are killed under load."""

from __future__ import annotations

import base64
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from apps.faces.tests import face_kit
from PIL import Image

JPEG = {"content-type": "image/jpeg"}


@pytest.fixture  # one for each test: another test kills workers
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    folder = tmp_path_factory.mktemp("served")
    log = folder / "log"
    store = face_kit.store().root
    command = ["faces", "serve", "--gallery", str(folder / "gallery"), "--store", str(store), "--http-port", "0"]
    with log.open("wb") as output:
        child = subprocess.Popen([sys.executable, "-m", "torchship", *command], stdout=output, stderr=output)
    try:
        yield started(child, log), psutil.Process(child.pid)
        assert child.poll() is None, log.read_text()
    finally:
        child.terminate()
        assert child.wait(60) == 0, log.read_text()[-3000:]
        assert "Traceback" not in log.read_text(), log.read_text()[-3000:]


def started(child: subprocess.Popen[bytes], log: Path) -> str:
    """The URL, once everything answers."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and child.poll() is None:
        for word in log.read_text().split():
            if word.startswith("http://") and "/v2/" in word:
                return word.partition("/v2/")[0]
        time.sleep(0.2)
    child.kill()
    raise AssertionError(log.read_text())


@pytest.fixture
def client(server: tuple[str, psutil.Process]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server[0], timeout=60) as made:
        yield made


def who(client: httpx.Client, picture: bytes, **query: str) -> list[str | None]:
    answer = client.post("/v1/faces/identify", content=picture, headers=JPEG, params=query)
    assert answer.status_code == 200, answer.text
    return [face["person"] for face in answer.json()["faces"]]


@pytest.mark.timeout(300)
def test_people_come_and_go(client: httpx.Client) -> None:
    obama, obama2, obama3, biden = (face_kit.picture(name) for name in ("obama", "obama2", "obama3", "biden"))
    assert who(client, obama3) == [None]
    files = [("image", obama), ("image", obama2), ("image", face_kit.encoded(Image.new("RGB", (64, 64))))]
    answer = client.put("/v1/people/obama", files=[*files, ("groups", (None, "presidents"))])
    assert answer.status_code == 201, answer.text
    assert len(answer.json()["enrolled"]) == 2
    assert answer.json()["refused"] == [{"picture": 2, "reason": "there is no face in the picture"}]
    assert client.post("/v1/people/biden", content=biden, headers=JPEG).status_code == 201

    assert who(client, obama3) == ["obama"]
    assert who(client, biden) == ["biden"]
    assert who(client, obama3, threshold="0.98") == [None]
    assert who(client, biden, group="presidents", threshold="0.3") == [None]
    assert who(client, face_kit.stranger()) == [None]

    assert client.get("/v1/people").json() == {"people": ["obama", "biden"], "next": None, "count": 2, "templates": 3}
    page = client.get("/v1/people", params={"limit": 1}).json()
    assert (page["people"], page["next"]) == (["obama"], "obama")
    assert client.get("/v1/people", params={"after": "obama"}).json()["people"] == ["biden"]
    assert client.get("/v1/people/obama").json()["groups"] == ["presidents"]

    same = client.post("/v1/faces/verify", files={"first": obama, "second": obama3}).json()
    other = client.post("/v1/faces/verify", files={"first": obama, "second": biden}).json()
    strict = client.post("/v1/faces/verify?threshold=0.99", files={"first": obama, "second": obama3}).json()
    assert (same["same"], other["same"], strict["same"]) == (True, False, False)

    template = client.get("/v1/people/obama").json()["templates"][0]["template"]
    assert client.delete(f"/v1/people/obama/templates/{template}").json()["forgotten"] == 1
    assert client.delete("/v1/people/obama", params={"compact": "true"}).status_code == 200
    assert who(client, obama3) == [None]
    assert client.get("/v1/people/obama").status_code == 404
    assert client.get("/v1/gallery").json()["people"] == 1
    named = "/v1/people/J%C3%BCrgen%20M"  # as people are called
    assert client.put(named, content=obama, headers=JPEG).json()["person"] == "Jürgen M"
    assert client.delete(named).json() == {"person": "Jürgen M", "forgotten": 1}


@pytest.mark.timeout(120)
def test_detect_and_embed(client: httpx.Client) -> None:
    found = client.post("/v1/faces/detect", content=face_kit.picture("obama"), headers=JPEG).json()["faces"]
    assert len(found) == 1
    assert found[0]["score"] > 0.9
    assert found[0].keys() == {"box", "score", "points"}
    embedded = client.post("/v1/faces/embed", content=face_kit.picture("obama"), headers=JPEG).json()
    assert len(embedded["faces"][0]["embedding"]) == 512
    assert "fr_feature" in embedded["model"]


@pytest.mark.timeout(120)
def test_bad_requests_are_told_why(client: httpx.Client) -> None:
    for content, kind, word in (
        (b"hello", "image/jpeg", "not a picture"),
        (face_kit.picture("obama")[:4000], "image/jpeg", "broken"),
        (b"", "image/jpeg", "the body is empty"),
        (b"x", "text/html", "cannot read a body"),
        (b"{", "application/json", "not what is expected"),
        (b'{"image": 5}', "application/json", "not what is expected"),
        (b"--x", "multipart/form-data; boundary=x", "0 pictures"),
        (b"--x", "multipart/form-data", "boundary"),
    ):
        answer = client.post("/v1/faces/detect", content=content, headers={"content-type": kind})
        assert answer.status_code == 400, (content, answer.text)
        assert word in answer.json()["error"]
    picture = base64.b64encode(face_kit.picture("obama")).decode()
    for path, word in (
        ("verify?threshold=abc", "'threshold' is 'abc'"),
        ("verify?threshold=5", "-1.0 to 1.0"),
        ("identify?thresold=0.7", "no parameter 'thresold'"),
    ):
        body = {"first": picture, "second": picture} if "verify" in path else {"image": picture}
        answer = client.post(f"/v1/faces/{path}", json=body)
        assert (answer.status_code, word in answer.json()["error"]) == (400, True), answer.text
    strict = {"image": picture, "parameters": {"min_score": 1.0}}
    assert client.post("/v1/faces/detect", json=strict).json() == {"faces": []}
    assert client.post("/v1/faces/verify", files={"first": b"x"}).json()["error"].startswith("verify takes two")
    assert (
        client.post("/v1/faces/detect?min_score=7", content=face_kit.picture("obama"), headers=JPEG).status_code == 400
    )
    assert client.get("/v1/people/J%C3%BCrgen%20M").status_code == 404
    assert client.put("/v1/people/a%2Fb", content=face_kit.picture("obama"), headers=JPEG).status_code == 400
    assert client.put("/v1/people/x", content=face_kit.encoded(Image.new("L", (9, 9)))).status_code == 400
    assert client.get("/v1/people", params={"limit": "many"}).status_code == 400
    assert client.delete("/v1/people/nobody").status_code == 404
    assert client.delete("/v1/people/nobody/templates/x").status_code == 400


@pytest.mark.timeout(300)
def test_killed_workers_lose_nothing(client: httpx.Client, server: tuple[str, psutil.Process]) -> None:
    """Every worker is killed in turn while pictures of two people are sent: each caller gets its own answer or 503."""
    pictures = {name: face_kit.picture(name) for name in ("obama", "biden")}
    for name, picture in pictures.items():
        assert client.put(f"/v1/people/{name}", content=picture, headers=JPEG).status_code == 201
    wrong: list[str] = []
    answered, refused = [0], [0]
    enrolled: list[str] = []
    stop = threading.Event()

    def call(name: str) -> None:
        with httpx.Client(base_url=server[0], timeout=60) as mine:
            while not stop.is_set():
                answer = mine.post("/v1/faces/identify", content=pictures[name], headers=JPEG)
                if answer.status_code == 503:
                    refused[0] += 1
                    time.sleep(0.05)
                elif answer.status_code != 200 or [f["person"] for f in answer.json()["faces"]] != [name]:
                    wrong.append(f"{name}: {answer.status_code} {answer.text[:300]}")
                else:
                    answered[0] += 1

    def enrol() -> None:
        with httpx.Client(base_url=server[0], timeout=60) as mine:
            for number in range(1000):
                if stop.is_set():
                    return
                answer = mine.put(f"/v1/people/extra{number}", content=face_kit.stranger(), headers=JPEG)
                if answer.status_code == 201:
                    enrolled.append(f"extra{number}")
                elif answer.status_code != 503:
                    wrong.append(f"enrol: {answer.status_code} {answer.text[:300]}")

    threads = [threading.Thread(target=call, args=(name,)) for name in pictures] + [threading.Thread(target=enrol)]
    for thread in threads:
        thread.start()
    workers = [child for child in server[1].children(recursive=True) if "torchship" in " ".join(child.cmdline())]
    for worker in workers:
        time.sleep(0.7)
        worker.kill()
    deadline = time.monotonic() + 120
    while client.get("/v2/health/ready").status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.2)
    before = answered[0]
    while answered[0] < before + 6 and time.monotonic() < deadline:
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(workers) >= 7
    assert wrong == []
    assert answered[0] >= before + 6, f"{refused[0]} refused"
    held = client.get("/v1/people", params={"limit": 1000}).json()["people"]
    assert set(enrolled) <= set(held), "an acknowledged enrolment was lost"
    assert enrolled
