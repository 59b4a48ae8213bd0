"""Identities across cameras: one number a person, ambiguous when it is, merged, split, forgotten, saved, bounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from apps.video.tests.identity_kit import BOUNDS, RULE, gallery, looks, observation, see

from torchship.errors import BadConfig, BadInput, CorruptArtifact, NotFound, Unavailable
from torchship_video.identity.evidence import EvidenceBook
from torchship_video.identity.identities import Bounds
from torchship_video.identity.transitions import TravelTimes


def test_one_person_on_two_cameras_is_one_identity_and_two_people_are_two() -> None:
    identities = gallery()
    ann = see(identities, "door", 1, 1, 0.0, 1.0)
    bob = see(identities, "door", 2, 2, 0.5, 1.5)
    assert see(identities, "yard", 1, 1, 9.0, 10.0) == ann
    assert see(identities, "yard", 2, 2, 9.5, 10.5) == bob != ann
    assert [visit.camera for visit in identities.visits(ann)] == ["door", "yard"]
    assert identities.visits(ann)[1].similarity > 0.8


def test_a_track_is_not_known_before_it_is_decided_and_then_stays_who_it_is() -> None:
    identities = gallery(bounds=Bounds(least=3, ripe=10.0))
    for time in (0.0, 0.6):
        assert identities.update("door", 1, looks(1), 0.5, time) == (0, False)
    identities.update("door", 1, looks(1), 0.5, 1.2)
    known = {identities.update("door", 1, looks(2, turn=n), 0.9, 2.0 + n)[0] for n in range(5)}
    assert known == {1}, "other embeddings later do not change a decided track"


def test_two_tracks_at_one_time_on_one_camera_are_two_however_alike() -> None:
    identities = gallery()
    for time in (0.0, 0.6, 1.2):
        for track in (1, 2):
            identities.update("door", track, looks(1), 0.8, time)
    identities.decide()
    first, second = identities.observe(observation("door", [1, 2], 1.3)).tracks
    assert first.identity != second.identity
    assert 0 not in (first.identity, second.identity)


def test_a_track_that_comes_back_beside_its_supposed_successor_takes_the_identity_back() -> None:
    identities = gallery(bounds=Bounds(least=1, ripe=0.0, lost=20.0))
    one = see(identities, "door", 1, 1, 0.0, 1.0)
    assert see(identities, "door", 2, 1, 3.0, 4.0) == one, "the tracker lost it and gave it a new number"
    both = identities.observe(observation("door", [1, 2], 5.0)).tracks
    assert both[0].identity == one
    assert both[1].identity == 0, "it is decided anew"
    identities.decide()
    assert identities.observe(observation("door", [1, 2], 5.1)).tracks[1].identity not in (0, one)


def test_two_identities_that_fit_equally_are_said_to_be_ambiguous_until_evidence_decides() -> None:
    between = looks(1) / np.linalg.norm(looks(1)) + looks(2) / np.linalg.norm(looks(2))
    rule = type(RULE)(threshold=0.6, margin=0.05)
    identities = gallery(rule=rule)
    ann, bob = see(identities, "door", 1, 1, 0.0), see(identities, "door", 2, 2, 0.0)
    identities.update("yard", 1, between, 0.3, 10.0)
    identities.decide()
    (track,) = identities.observe(observation("yard", [1], 10.1)).tracks
    assert track.ambiguous
    assert track.identity in (ann, bob)
    (visit,) = [visit for visit in identities.visits(track.identity) if visit.camera == "yard"]
    assert {rival for rival, _ in visit.rivals} == {ann, bob}
    for time in (11.0, 12.0, 13.0):
        identities.update("yard", 1, looks(2, turn=int(time)), 0.9, time)
    identities.decide()
    (track,) = identities.observe(observation("yard", [1], 13.1)).tracks
    assert (track.identity, track.ambiguous) == (bob, False)


def test_travel_times_are_learned_and_decide_between_people_who_look_alike() -> None:
    rule = type(RULE)(threshold=0.8, margin=0.001, travel=0.3)
    identities = gallery(rule=rule)
    for n in range(12):  # everybody needs 10 seconds from the door to the yard
        see(identities, "door", 100 + n, 10 + n, 50.0 * n)
        see(identities, "yard", 100 + n, 10 + n, 50.0 * n + 10)
    (way,) = [way for way in identities.transitions() if (way.from_camera, way.to_camera) == ("door", "yard")]
    assert way.count == 12
    assert way.p50 == pytest.approx(10, abs=0.5)
    twin = gallery(rule=rule)
    twin._times = identities._times
    early, late = see(twin, "door", 1, 1, 0.0), see(twin, "door", 2, 3, 200.0)
    twin._members[late][0].vectors = twin._members[early][0].vectors  # twins: equally alike
    twin._vectors.clear()
    assert see(twin, "yard", 1, 1, 210.0) == late


def test_travel_times_favour_what_was_seen_and_say_nothing_of_unknown_ways() -> None:
    times = TravelTimes(window=600)
    assert times.favour("a", "b", 10) == 0
    for seconds in np.random.default_rng(0).normal(10, 1, 40):
        times.learn("a", "b", float(seconds))
    assert times.favour("a", "b", 10) > 0.5
    assert times.favour("a", "b", 200) < -0.5
    assert times.favour("b", "a", 10) == 0
    again = TravelTimes(window=600)
    again.load(times.dump())
    assert again.table() == times.table()
    again.forget_camera("a")
    assert again.table() == []


def test_merge_and_split_by_hand_and_what_cannot_be_merged() -> None:
    identities = gallery()
    ann, bob = see(identities, "door", 1, 1, 0.0, 2.0), see(identities, "door", 2, 2, 1.0, 3.0)
    cat = see(identities, "yard", 1, 3, 9.0)
    with pytest.raises(BadInput, match="both on camera door at one time"):
        identities.merge(ann, bob)
    with pytest.raises(BadInput, match="itself"):
        identities.merge(ann, ann)
    identities.merge(ann, cat)
    assert identities.numbers() == [ann, bob]
    with pytest.raises(NotFound):
        identities.visits(cat)
    yard = next(visit.serial for visit in identities.visits(ann) if visit.camera == "yard")
    with pytest.raises(NotFound, match="no visit 999"):
        identities.split(ann, [999])
    with pytest.raises(BadInput, match="2 of them were named"):
        identities.split(ann, [visit.serial for visit in identities.visits(ann)])
    assert identities.split(ann, [yard]) == cat
    assert identities.numbers() == [ann, bob, cat]


def test_merges_of_merges_are_split_back_in_turn() -> None:
    identities = gallery()
    ann, bob, cat = (see(identities, f"camera{n}", 1, n, 20.0 * n) for n in (1, 2, 3))
    serials = {number: [visit.serial for visit in identities.visits(number)] for number in (ann, bob, cat)}
    identities.merge(bob, cat)
    identities.merge(ann, bob)
    assert identities.split(ann, serials[bob] + serials[cat]) == bob
    assert identities.split(bob, serials[cat]) == cat
    assert {number: [v.serial for v in identities.visits(number)] for number in identities.numbers()} == serials


def test_a_gallery_comes_back_as_it_was_and_gives_no_number_twice(tmp_path: Path) -> None:
    identities = gallery(tmp_path)
    ann = see(identities, "door", 1, 1, 0.0, 1.0, crop=b"a picture")
    see(identities, "yard", 1, 1, 9.0)
    identities.flush()
    before, ways = identities.visits(ann), identities.transitions()
    identities._storage.close()  # type: ignore[union-attr]  # killed: nothing more is written
    again = gallery(tmp_path)
    assert again.visits(ann) == before
    assert again.transitions() == ways
    assert again.visits(ann)[0].crops[0].jpeg == b"a picture"
    assert see(again, "door", 1, 1, 30.0) == ann, "track 1 is another track now, and the same person"
    assert see(again, "door", 2, 2, 30.0) > ann
    again.close()


def test_a_folder_has_one_writer_and_one_embedder(tmp_path: Path) -> None:
    identities = gallery(tmp_path)
    see(identities, "door", 1, 1, 0.0)
    identities.flush()
    with pytest.raises(Unavailable, match="another process"):
        gallery(tmp_path)
    identities.close()
    with pytest.raises(BadConfig, match="here is other"):
        type(identities)(tmp_path, embedder="other", width=32, rule=RULE)
    (file,) = tmp_path.glob("identity-*.msgpack")
    assert file.stat().st_mode & 0o077 == 0
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptArtifact, match="checksum"):
        gallery(tmp_path)


def test_a_visit_in_two_files_belongs_to_the_newer_one(tmp_path: Path) -> None:
    identities = gallery(tmp_path)
    ann, bob = see(identities, "door", 1, 1, 0.0), see(identities, "yard", 1, 2, 0.0)
    identities.flush()
    old = (tmp_path / f"identity-{bob}.msgpack").read_bytes()
    identities.merge(ann, bob)
    identities._storage.close()  # type: ignore[union-attr]
    (tmp_path / f"identity-{bob}.msgpack").write_bytes(old)  # killed before the second file was removed
    (tmp_path / ".identity-9.msgpack.new").write_bytes(b"torn")
    again = gallery(tmp_path)
    assert again.numbers() == [ann]
    assert len(again.visits(ann)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.msgpack", f"identity-{ann}.msgpack", "lock"]
    again.close()


def test_who_was_not_seen_for_the_window_is_forgotten_and_the_oldest_when_there_are_too_many(tmp_path: Path) -> None:
    identities = gallery(tmp_path, bounds=Bounds(least=1, ripe=0.0, window=100.0, most_identities=3))
    first = see(identities, "door", 1, 1, 0.0)
    identities.flush()
    assert see(identities, "door", 2, 2, 200.0) != first
    assert first not in identities.numbers()
    identities.flush()
    assert not (tmp_path / f"identity-{first}.msgpack").exists()
    for n in range(3, 9):
        see(identities, "door", n, n, 200.0 + n)
    identities.observe(observation("door", [], 210.0))
    assert len(identities.numbers()) == 3
    identities.close()


def test_tracks_beyond_the_bound_are_refused_and_counted() -> None:
    identities = gallery(bounds=Bounds(most_open=2))
    for track in (1, 2, 3):
        identities.update("door", track, looks(track), 0.5, 0.0)
    assert identities.refused == 1


@pytest.mark.parametrize("bad", [np.zeros(32), np.full(32, np.nan), np.ones(31)])
def test_what_is_no_embedding_is_refused(bad: object) -> None:
    with pytest.raises(BadInput, match="expected 32"):
        gallery().update("door", 1, bad, 0.5, 0.0)  # type: ignore[arg-type]


def test_a_clock_that_was_set_back_does_not_stop_decisions() -> None:
    identities = gallery()
    see(identities, "door", 1, 1, 5000.0)
    for time in (10.0, 11.0, 12.0):
        identities.update("door", 2, looks(2), 0.5, time)
    assert identities.update("door", 2, looks(2), 0.5, 13.0)[0]


def test_a_tracker_that_began_anew_reuses_its_numbers_for_others() -> None:
    identities = gallery()
    ann = see(identities, "door", 1, 1, 0.0)
    identities.restarted("door")
    assert see(identities, "door", 1, 2, 1.0) != ann
    assert BOUNDS.least == 1


def test_the_page_is_given_those_seen_last_with_their_crops() -> None:
    identities = gallery()
    ann = see(identities, "door", 1, 1, 0.0, 1.0, crop=b"ann")
    bob = see(identities, "yard", 1, 2, 5.0, crop=b"bob")
    book = EvidenceBook(identities)
    newest, oldest = book.cards()
    assert (newest.identity, oldest.identity) == (bob, ann)
    assert (oldest.cameras, oldest.first, len(oldest.crops)) == (("door",), 0.0, 2)
    assert book.crop(bob, 0) == b"bob"
    assert book.crop(bob, 1) is None
    identities.forget(bob)
    assert book.crop(bob, 0) is None
    assert [card.identity for card in book.cards()] == [ann]
