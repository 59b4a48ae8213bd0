"""Zones and lines on walks that were worked out by hand, and what their configuration refuses."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from torchship.errors import BadConfig
from torchship_video.messages import Event, Track
from torchship_video.zones import FORGET, LineConfig, ZoneConfig, Zones

SIZE = (100, 100)
LINE = LineConfig(name="gate", start=(0.5, 0.8), end=(0.5, 0.2))
ZONE = ZoneConfig(name="yard", points=((0.4, 0.4), (0.8, 0.4), (0.8, 0.8), (0.4, 0.8)), dwell=1.0)


def at(x: float, y: float, number: int = 1, **more: Any) -> Track:
    given: dict[str, Any] = {"confirmed": True, "label": "person"} | more
    return Track(number, (x - 2, y - 20, x + 2, y), 0.9, **given)


def events(zones: Zones, *steps: tuple[float, list[Track]]) -> list[Event]:
    return [event for time, tracks in steps for event in zones.update(tracks, time=time, size=SIZE)]


def test_from_left_to_right_is_in_and_back_is_out() -> None:
    found = events(Zones(lines=[LINE]), (0, [at(30, 50)]), (1, [at(70, 50)]), (2, [at(30, 50, identity=7)]))
    assert found == [Event("in", "gate", 1), Event("out", "gate", 1, 7)]


def test_who_walks_round_the_end_of_a_line_has_not_crossed_it() -> None:
    assert events(Zones(lines=[LINE]), (0, [at(30, 50)]), (1, [at(40, 95)]), (2, [at(60, 95)]), (3, [at(70, 50)])) == []


def test_a_visit_with_its_dwell_time() -> None:
    found = events(
        Zones([ZONE]),
        (0, [at(10, 60)]),
        (1, [at(60, 60)]),
        (1.5, [at(60, 60)]),
        (2.25, [at(61, 60)]),
        (3, [at(95, 60)]),
    )
    assert found == [Event("enter", "yard", 1), Event("dwell", "yard", 1, 0, 1.25), Event("leave", "yard", 1, 0, 2.0)]


def test_a_track_that_is_lost_in_a_zone_leaves_it_when_it_was_seen_last() -> None:
    zones = Zones([ZONE])
    found = events(zones, (0, [at(60, 60)]), (0.5, [at(60, 60)]), (1.0, []), (0.5 + FORGET, []))
    assert found == [Event("enter", "yard", 1)]
    assert zones.inside() == {"yard": 1}
    assert events(zones, (0.6 + FORGET, [])) == [Event("leave", "yard", 1, 0, 0.5)]
    assert zones.inside() == {"yard": 0}


def test_a_predicted_box_crosses_nothing() -> None:
    assert events(Zones(lines=[LINE]), (0, [at(30, 50)]), (1, [at(70, 50, seen=False)]), (2, [at(35, 50)])) == []


def test_what_was_done_before_confirmation_is_told_at_confirmation() -> None:
    zones = Zones(lines=[LINE])
    assert events(zones, (0, [at(30, 50, confirmed=False)]), (1, [at(70, 50, confirmed=False)])) == []
    assert events(zones, (2, [at(75, 50)])) == [Event("in", "gate", 1)]


def test_only_the_labels_that_are_named() -> None:
    line = LineConfig(name="gate", start=LINE.start, end=LINE.end, labels=("car",))
    assert events(Zones(lines=[line]), (0, [at(30, 50)]), (1, [at(70, 50)])) == []
    assert events(Zones(lines=[line]), (0, [at(30, 50, label="car")]), (1, [at(70, 50, label="car")]))


def test_numbers_below_one_are_no_tracks() -> None:
    assert events(Zones(lines=[LINE]), (0, [at(30, 50, -1)]), (1, [at(70, 50, -1)])) == []


def test_a_stream_that_begins_anew_ends_all_visits() -> None:
    found = events(Zones([ZONE]), (8, [at(60, 60)]), (8.5, [at(60, 60)]), (0, [at(10, 60)]))
    assert found == [Event("enter", "yard", 1), Event("leave", "yard", 1, 0, 0.5)]


def test_a_camera_has_its_own_shapes_and_those_of_all() -> None:
    other = ZoneConfig(name="other", points=ZONE.points, camera="back")
    zones = Zones([ZONE, other], [LINE], camera="front")
    assert [zone.name for zone in zones.zones] == ["yard"]
    assert len(Zones([ZONE, other], camera="back").zones) == 2


def test_one_name_twice_on_a_camera_is_refused() -> None:
    with pytest.raises(BadConfig, match="'yard'"):
        Zones([ZONE], [LineConfig(name="yard", start=(0, 0), end=(1, 1))])


@pytest.mark.parametrize(
    ("kind", "table", "words"),
    [
        (ZoneConfig, {"name": "a", "points": [[0, 0], [1, 1]]}, "three corners"),
        (ZoneConfig, {"name": "a", "points": [[0, 0], [0.5, 0.5], [1, 1]]}, "three corners"),
        (ZoneConfig, {"name": "a", "points": [[0, 0], [640, 0], [0, 480]]}, "outside a picture"),
        (ZoneConfig, {"name": "a", "points": [[0, 0], [1, 0], [0, 1]], "dwell": -1}, "dwell"),
        (LineConfig, {"name": "a", "start": [0, 0], "end": [0, 0]}, "starts where it ends"),
        (LineConfig, {"name": "a", "start": [0, 0], "end": [1, 1], "size": [0, 1]}, "size"),
    ],
)
def test_shapes_that_are_none_are_refused(kind: Any, table: dict[str, Any], words: str) -> None:
    with pytest.raises((BadConfig, msgspec.ValidationError), match=words):
        msgspec.convert(table, kind)
