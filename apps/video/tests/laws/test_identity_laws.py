"""Laws of identities: never twice on one camera, merge then split restores, forget leaves no byte, no camera first."""

from __future__ import annotations

import tempfile
from pathlib import Path

from apps.video.tests.identity_kit import BOUNDS, RULE, gallery, looks, observation, see
from hypothesis import given, settings
from hypothesis import strategies as st

from torchship_video.identity.identities import Identities

CAMERAS = ("a", "b", "c")
SIGHT = st.tuples(st.sampled_from(CAMERAS), st.integers(1, 4), st.integers(1, 3))  # camera, track, person
STEPS = st.lists(st.lists(SIGHT, max_size=6, unique_by=lambda sight: sight[:2]), min_size=1, max_size=12)
GAP = st.sampled_from([0.2, 0.7, 3.0, 8.0])


def partition(identities: Identities) -> set[frozenset[tuple[str, int, float]]]:
    """Who is with whom, without numbers."""
    return {frozenset((v.camera, v.track, v.first) for v in identities.visits(n)) for n in identities.numbers()}


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, gaps=st.lists(GAP, min_size=12, max_size=12))
def test_an_identity_is_never_twice_on_one_camera_at_one_time(
    steps: list[list[tuple[str, int, int]]], gaps: list[float]
) -> None:
    identities, time = gallery(), 0.0
    for step, gap in zip(steps, gaps, strict=False):
        time += gap
        for camera in CAMERAS:
            tracks = [track for place, track, _ in step if place == camera]
            shown = [track.identity for track in identities.observe(observation(camera, tracks, time)).tracks]
            known = [number for number in shown if number]
            assert len(known) == len(set(known))
        for camera, track, person in step:
            identities.update(camera, track, looks(person, turn=track), 0.5, time)
    identities.decide()
    for number in identities.numbers():
        visits = identities.visits(number)
        assert not [(a, b) for a in visits for b in visits if a is not b and a.meets(b)]


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, order=st.permutations(CAMERAS))
def test_the_order_of_cameras_does_not_matter(steps: list[list[tuple[str, int, int]]], order: list[str]) -> None:
    found = []
    for cameras in (CAMERAS, order):
        identities = gallery()
        for number, step in enumerate(steps):
            for camera in cameras:
                for place, track, person in sorted(step):
                    if place == camera:
                        identities.update(camera, track, looks(person, turn=track), 0.5, number * 0.7)
        identities.decide()
        found.append((partition(identities), identities.transitions(), identities.numbers()))
    assert found[0] == found[1]


@settings(max_examples=40, deadline=None)
@given(people=st.lists(st.integers(1, 6), min_size=2, max_size=6, unique=True), data=st.data())
def test_merge_then_split_restores(people: list[int], data: st.DataObject) -> None:
    identities = gallery()
    numbers = [see(identities, f"camera{n}", 1, person, 30.0 * n) for n, person in enumerate(people)]
    into, other = data.draw(st.permutations(sorted(set(numbers))))[:2]
    before = {number: sorted(v.serial for v in identities.visits(number)) for number in identities.numbers()}
    identities.merge(into, other)
    assert identities.split(into, before[other]) == other
    after = {number: sorted(v.serial for v in identities.visits(number)) for number in identities.numbers()}
    assert before == after


@settings(max_examples=25, deadline=None)
@given(people=st.lists(st.integers(1, 4), min_size=1, max_size=6), data=st.data())
def test_forget_leaves_no_byte(people: list[int], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(prefix="torchship-law-") as folder:
        identities = gallery(folder)
        numbers = [
            see(identities, f"camera{n}", 1, person, 30.0 * n, crop=b"\xff\xd8 picture of %d in visit %d" % (person, n))
            for n, person in enumerate(people)
        ]
        identities.flush()
        merged = data.draw(st.booleans()) and len(set(numbers)) > 1
        if merged:
            into, other = sorted(set(numbers))[:2]
            identities.merge(into, other)
        number = data.draw(st.sampled_from(identities.numbers()))
        visits = identities.visits(number)
        secrets = [kept.data for visit in visits for kept in visit.vectors]
        secrets += [crop.jpeg for visit in visits for crop in visit.crops]
        assert len(secrets) >= 2
        others = [
            crop.jpeg for n in identities.numbers() if n != number for v in identities.visits(n) for crop in v.crops
        ]
        on_disk = b"".join(path.read_bytes() for path in Path(folder).iterdir())
        assert all(secret in on_disk for secret in secrets)
        identities.forget(number)
        on_disk = b"".join(path.read_bytes() for path in Path(folder).iterdir())
        assert not [secret for secret in secrets if secret in on_disk]
        assert all(other in on_disk for other in others)
        identities.close()
        on_disk = b"".join(path.read_bytes() for path in Path(folder).iterdir())
        assert not [secret for secret in secrets if secret in on_disk]
        again = Identities(folder, embedder="test", width=32, rule=RULE, bounds=BOUNDS)
        assert number not in again.numbers()
        again.close()
