"""The sinks themselves, in this process: what they write, what they refuse, what they survive."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
from apps.video.tests.sink_kit import CROSSED, HEIGHT, WIDTH, frame, observed
from PIL import Image

from torchship.errors import BadConfig
from torchship_video.drawing import color_of, jpeg, picture
from torchship_video.messages import Observation, Track
from torchship_video.sinks import KINDS, Opening, SinkConfig, jsonl, kind_of, mjpeg, motchallenge, mp4, webhook
from torchship_video.sinks.files import LineFile, path_of
from torchship_video.sinks.spool import Attempt, Spool
from torchship_video.zones import LineConfig, ZoneConfig

GREY = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)


def test_every_kind_states_its_facts() -> None:
    needs = {"webhook": {"url": "http://127.0.0.1:1/"}, "mqtt": {}, "mjpeg": {}}
    for kind in KINDS:
        module, options = kind_of(SinkConfig(kind=kind, options=needs.get(kind, {"path": "x"})))
        assert isinstance(module.PIXELS, bool)
        assert isinstance(module.AGAIN, bool)
        assert isinstance(options, module.OPTIONS)
        assert not module.PIXELS or options.width >= 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (SinkConfig(kind="fax"), "no sink 'fax'"),
        (SinkConfig(kind="jsonl"), "path"),
        (SinkConfig(kind="jsonl", options={"path": "a", "color": 1}), "color"),
        (SinkConfig(kind="jsonl", queue=-1, options={"path": "a"}), "queue"),
        (SinkConfig(kind="mp4", options={"path": "a", "quality": 99}), "quality"),
        (SinkConfig(kind="webhook", options={"url": "ftp://a/"}), "url"),
        (SinkConfig(kind="webhook", options={"url": "http://a:99999/"}), "url"),
        (SinkConfig(kind="webhook", options={"url": "http://a/", "secret": "env:NO_SUCH_NAME"}), "NO_SUCH_NAME"),
        (SinkConfig(kind="webhook", options={"url": "http://a/", "headers": {"x": "a\r\nb"}}), "line break"),
        (SinkConfig(kind="mqtt", options={"topic": "a/#"}), "topic"),
        (SinkConfig(kind="mqtt", options={"qos": 3}), "qos"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_the_way_out(config: SinkConfig, words: str) -> None:
    with pytest.raises(BadConfig, match=words) as refused:
        kind_of(config)
    assert refused.value.hint or "it needs" in str(refused.value) or "is" in str(refused.value)


def test_json_lines_tell_everything_by_name(tmp_path: Path) -> None:
    sink = jsonl.JsonLines(jsonl.JsonLinesOptions(path=str(tmp_path / "out.jsonl")), Opening())
    sink.write(observed(3, events=CROSSED), None)
    sink.write(Observation(frame(4)), None)  # nothing to tell
    sink.close()
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["camera"], found["sequence"], found["position"]) == ("door", 3, 0.3)
    assert found["tracks"][0]["box"] == [40, 60, 100, 200]
    assert found["tracks"][0]["identity"] == 7
    assert found["events"] == [{"kind": "in", "where": "gate", "track": 1, "identity": 7, "seconds": 0.0}]


def test_lines_are_set_aside_by_size(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "a", limit=10, keep=2)
    for number in range(7):
        file.write(b"line %d\n" % number)
    file.close()
    assert [(tmp_path / name).read_text() for name in ("a", "a.1", "a.2")] == ["line 6\n", "line 5\n", "line 4\n"]
    assert not (tmp_path / "a.3").exists()


def test_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"whole\nto")
    file = LineFile(tmp_path / "a")
    file.write(b"next\n")
    file.close()
    assert (tmp_path / "a").read_bytes() == b"whole\nnext\n"


@pytest.mark.parametrize(
    ("camera", "name"), [("door", "door.txt"), ("../../etc", ".._.._etc.txt"), ("a b/c", "a_b_c.txt"), ("", "_.txt")]
)
def test_a_camera_names_a_file_and_no_folder(camera: str, name: str) -> None:
    assert path_of("out/{camera}.txt", camera) == Path("out") / name


def test_motchallenge_has_confirmed_tracks_that_were_seen_with_frames_from_one(tmp_path: Path) -> None:
    sink = motchallenge.MotText(motchallenge.MotOptions(path=str(tmp_path / "{camera}.txt")), Opening())
    sink.write(observed(0), None)
    sink.write(observed(1, camera="yard"), None)
    hidden = Track(1, (0, 0, 9, 9), 0.5, "person", True, seen=False)
    sink.write(Observation(frame(2), (hidden,)), None)
    sink.close()
    assert (tmp_path / "door.txt").read_text() == "1,1,40.00,60.00,60.00,140.00,0.900,-1,-1,-1\n"
    assert (tmp_path / "yard.txt").read_text().startswith("2,1,")


def test_motchallenge_begins_anew_but_goes_on_after_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("of yesterday\n")
    for restarts in (0, 1):
        sink = motchallenge.MotText(motchallenge.MotOptions(path=str(path)), Opening(restarts=restarts))
        sink.write(observed(restarts), None)
        sink.close()
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["1", "2"]


def test_two_cameras_do_not_share_a_file(tmp_path: Path) -> None:
    sink = motchallenge.MotText(motchallenge.MotOptions(path=str(tmp_path / "a.txt")), Opening())
    sink.write(observed(0), None)
    with pytest.raises(BadConfig, match="'door' and 'yard'") as refused:
        sink.write(observed(1, camera="yard"), None)
    assert "{camera}" in refused.value.hint


def test_a_box_is_drawn_in_the_colour_of_its_identity_with_its_number() -> None:
    image = np.asarray(picture(GREY, observed()))
    assert tuple(image[130, 40]) == color_of(7)
    assert tuple(image[130, 150]) == (150, 150, 150)  # not confirmed
    assert (image[45:60, 40:100] != 40).any()  # the plate above the box
    assert (image[100:160, 60:90] == 40).all()


def test_zones_and_lines_are_drawn_on_their_camera_alone() -> None:
    zones = [ZoneConfig(name="yard", points=((0.1, 0.1), (0.9, 0.1), (0.9, 0.9)))]
    lines = [LineConfig(name="gate", start=(0, 0.5), end=(1, 0.5), camera="elsewhere")]
    bare = Observation(frame())
    image = np.asarray(picture(GREY, bare, zones=zones, lines=lines))
    assert tuple(image[100, 288]) == (255, 200, 40)
    assert (np.asarray(picture(GREY, bare, lines=lines)) == 40).all()


def test_boxes_fit_a_picture_that_was_made_smaller() -> None:
    image = np.asarray(picture(np.ascontiguousarray(GREY[::2, ::2]), observed()))
    assert tuple(image[65, 20]) == color_of(7)


def test_a_box_that_is_outside_or_turned_round_breaks_nothing() -> None:
    for box in ((-50.0, -50.0, -10.0, -10.0), (100.0, 100.0, 50.0, 50.0), (300.0, 200.0, 900.0, 900.0)):
        picture(GREY, Observation(frame(), (Track(1, box, 0.5, "person", True),)))


def test_a_jpeg_is_never_larger_than_asked() -> None:
    noise = np.random.default_rng(1).integers(0, 255, (480, 640, 3), np.uint8)
    made = jpeg(Image.fromarray(noise), largest=100_000)
    assert made[:2] == b"\xff\xd8"
    assert len(made) <= 100_000


def test_mjpeg_gives_pictures_and_no_more_than_wanted() -> None:
    sink = mjpeg.MotionJpeg(mjpeg.MjpegOptions(fps=1.0), Opening())
    made = [sink.write(observed(number), GREY) for number in range(5)]
    assert (made[0] or b"")[:2] == b"\xff\xd8"
    assert made[1:] == [None] * 4


def films(folder: Path) -> dict[str, list[float]]:
    """Of every film the times of its frames."""
    found = {}
    for path in sorted(folder.glob("*.mp4")):
        with av.open(str(path)) as film:
            found[path.name] = [round(float(shown.time), 2) for shown in film.decode(video=0)]
    return found


def test_a_film_has_the_times_of_its_frames_and_keeps_what_is_there(tmp_path: Path) -> None:
    for _ in range(2):
        sink = mp4.Mp4(mp4.Mp4Options(path=str(tmp_path / "{camera}.mp4")), Opening())
        for number in (0, 1, 3):
            sink.write(observed(number), GREY)
        sink.close()
    assert films(tmp_path) == {"door.mp4": [0, 0.1, 0.3], "door-2.mp4": [0, 0.1, 0.3]}


def test_frames_of_another_size_and_of_another_hour_begin_another_film(tmp_path: Path) -> None:
    sink = mp4.Mp4(mp4.Mp4Options(path=str(tmp_path / "a.mp4"), minutes=0.05), Opening())
    sink.write(observed(0), GREY)
    sink.write(observed(1), GREY[:-1, :-1])  # odd sides lose a row and a column
    sink.write(observed(40), GREY[:-1, :-1])
    sink.close()
    assert {name: len(times) for name, times in films(tmp_path).items()} == {"a.mp4": 1, "a-2.mp4": 1, "a-3.mp4": 1}


def test_a_signature_is_what_the_document_says() -> None:
    header = webhook.signature(b"key", b'{"a":1}', at=1700000000)
    expected = hmac.new(b"key", b'1700000000.{"a":1}', hashlib.sha256).hexdigest()
    assert header == f"t=1700000000,v1={expected}"


class Receiving:
    """A receiver that is told what to answer."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.bodies = list(answers), list[bytes]()

    def __call__(self, name: str, body: bytes) -> Attempt:
        answer: Any = self.answers.pop(0) if self.answers else "delivered"
        if answer == "down":
            raise ConnectionRefusedError("nobody there")
        if answer == "delivered":
            self.bodies.append(body)
        return Attempt(answer, "as told")


def emptied(spool: Spool) -> dict[str, int]:
    end = time.monotonic() + 20
    while spool.counts()["spooled"] and time.monotonic() < end:
        time.sleep(0.01)
    return spool.counts()


def test_a_spool_keeps_the_order_and_gives_up_what_is_refused(tmp_path: Path) -> None:
    receiver = Receiving("down", "again", "delivered", "refused")
    spool = Spool(tmp_path, receiver, limit=1000)
    for body in (b"1", b"2", b"3"):
        spool.put(body)
    counts = emptied(spool)
    spool.close()
    assert receiver.bodies == [b"1", b"3"]
    assert (counts["delivered"], counts["refused"], counts["tries"]) == (2, 1, 5)


def test_a_spool_that_is_full_drops_the_oldest(tmp_path: Path) -> None:
    receiver = Receiving(*["down"] * 50)
    spool = Spool(tmp_path, receiver, limit=25)
    for number in range(5):
        spool.put(b"%010d" % number)
    assert spool.counts()["spool_dropped"] == 3
    receiver.answers.clear()
    emptied(spool)
    spool.close()
    assert [int(body) for body in receiver.bodies[-2:]] == [3, 4]


def test_what_a_spool_held_is_sent_by_the_next(tmp_path: Path) -> None:
    receiver = Receiving(*["down"] * 50)
    spool = Spool(tmp_path, receiver, limit=1000)
    spool.put(b"kept")
    spool.close()
    (tmp_path / "00000000000000000001-torn.json.tmp").write_bytes(b"half")
    assert [path.read_bytes() for path in tmp_path.glob("*.json")] == [b"kept"]
    receiver.answers.clear()
    again = Spool(tmp_path, receiver, limit=1000)
    emptied(again)
    again.close()
    assert receiver.bodies == [b"kept"]
    assert os.listdir(tmp_path) == ["lock"]


def test_two_sinks_do_not_share_a_spool(tmp_path: Path) -> None:
    first = Spool(tmp_path, Receiving(), limit=10)
    with pytest.raises(BadConfig, match="another sink"):
        Spool(tmp_path, Receiving(), limit=10)
    first.close()
    Spool(tmp_path, Receiving(), limit=10).close()


def test_options_come_from_plain_data() -> None:
    table = {"kind": "mp4", "options": {"path": "a.mp4", "quality": 30}}
    _, options = kind_of(msgspec.convert(table, SinkConfig))
    assert options == mp4.Mp4Options(path="a.mp4", quality=30)
