"""Laws of zones and lines that hold for every walk."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from torchship_video.messages import Event, Track
from torchship_video.zones import MARGIN, LineConfig, ZoneConfig, Zones

SIZE = (640, 480)
HEIGHT = 100.0
LINE = LineConfig(name="door", start=(0.5, 1.0), end=(0.5, 0.0))  # upwards: right of it is `in`
ZONE = ZoneConfig(name="yard", points=((0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)), dwell=1.0)
places = st.tuples(st.floats(0, 640), st.floats(0, 480))
walks = st.lists(places, min_size=1, max_size=40)


def track(place: tuple[float, float], number: int = 1, *, confirmed: bool = True, seen: bool = True) -> Track:
    x, y = place
    return Track(number, (x - 20, y - HEIGHT, x + 20, y), 0.9, "person", confirmed, seen)


def walked(zones: Zones, walk: list[tuple[float, float]], *, confirmed: int = 0) -> list[Event]:
    """All events of a walk, ten steps a second, whose track is confirmed from a step on."""
    events: list[Event] = []
    for step, place in enumerate(walk):
        events += zones.update([track(place, confirmed=step >= confirmed)], time=step / 10, size=SIZE)
    return [*events, *zones.close()]


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


@given(walks)
def test_a_line_is_crossed_in_and_out_by_turns(walk: list[tuple[float, float]]) -> None:
    found = kinds(walked(Zones(lines=[LINE]), walk))
    assert all(one != other for one, other in pairwise(found))


@given(walks)
def test_a_line_turned_round_tells_the_opposite(walk: list[tuple[float, float]]) -> None:
    turned = LineConfig(name="door", start=LINE.end, end=LINE.start)
    swapped = {"in": "out", "out": "in"}
    found = kinds(walked(Zones(lines=[LINE]), walk))
    assert kinds(walked(Zones(lines=[turned]), walk)) == [swapped[kind] for kind in found]


@given(st.lists(st.floats(-MARGIN * HEIGHT, MARGIN * HEIGHT), max_size=60), st.booleans())
def test_a_track_that_trembles_on_a_line_is_counted_once(tremble: list[float], passes: bool) -> None:
    end = 420.0 if passes else 220.0
    walk = [(220.0, 300.0), *((320 + offset, 300.0) for offset in tremble), (end, 300.0)]
    assert kinds(walked(Zones(lines=[LINE]), walk)) == (["in"] if passes else [])


@given(walks)
def test_a_zone_is_entered_and_left_by_turns_and_never_left_without_being_entered(
    walk: list[tuple[float, float]],
) -> None:
    found = [kind for kind in kinds(walked(Zones([ZONE]), walk)) if kind != "dwell"]
    assert found == ["enter", "leave"] * (len(found) // 2)


@given(walks)
def test_the_time_in_a_zone_is_no_more_than_the_walk_and_dwell_comes_once_a_visit(
    walk: list[tuple[float, float]],
) -> None:
    events = walked(Zones([ZONE]), walk)
    assert sum(event.seconds for event in events if event.kind == "leave") <= len(walk) / 10
    assert all(event.seconds >= ZONE.dwell for event in events if event.kind == "dwell")
    visits = "".join(event.kind[0] for event in events).split("l")
    assert all(visit.count("d") <= 1 for visit in visits)


@given(walks)
def test_what_is_never_confirmed_does_nothing(walk: list[tuple[float, float]]) -> None:
    zones = Zones([ZONE], [LINE])
    assert walked(zones, walk, confirmed=len(walk)) == []
    assert zones.inside() == {"yard": 0}


@given(walks, st.integers(0, 40))
def test_the_time_of_confirmation_changes_no_count(walk: list[tuple[float, float]], late: int) -> None:
    late = min(late, len(walk) - 1)
    assert walked(Zones([ZONE], [LINE]), walk, confirmed=late) == walked(Zones([ZONE], [LINE]), walk)


@settings(max_examples=50)
@given(walks, walks)
def test_tracks_do_not_disturb_one_another(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> None:
    alone, zones, together = walked(Zones([ZONE], [LINE]), one), Zones([ZONE], [LINE]), list[Event]()
    for step in range(max(len(one), len(other))):
        here = [track(one[step])] if step < len(one) else []
        here += [track(other[step], 2)] if step < len(other) else []
        together += zones.update(here, time=step / 10, size=SIZE)
    together += zones.close()
    assert [event for event in together if event.track == 1] == alone


@given(walks)
def test_shares_of_the_frame_and_pixels_mean_the_same(walk: list[tuple[float, float]]) -> None:
    pixels = LineConfig(name="door", start=(320, 480), end=(320, 0), size=SIZE)
    assert walked(Zones(lines=[pixels]), walk) == walked(Zones(lines=[LINE]), walk)
