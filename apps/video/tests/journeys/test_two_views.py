"""vtest.avi as two cameras that share nothing: who is who across them, and counts on a line, against a written truth.

`python -m benchmarks.identity` prints the figures; the bounds here lie below them.
"""

from __future__ import annotations

import asyncio

import pytest
from benchmarks import identity as journey

from torchship_video import appearance


@pytest.mark.skipif(not journey.VTEST.exists(), reason="needs vtest.avi: apt-get install opencv-doc")
def test_people_who_walk_from_one_camera_to_the_other_keep_their_identity() -> None:
    gallery = journey.gallery(appearance.HISTOGRAM_RULE, width=appearance.HISTOGRAM_WIDTH)
    result = asyncio.run(journey.watch(gallery, appearance.line()))
    assert result.missed <= 4
    assert result.precision() >= 0.62
    assert result.recall() >= 0.42
    facts = journey.truth()["line"]
    assert abs(result.crossed["to_the_left"] - facts["to_the_left"]) <= 1
    assert abs(result.crossed["to_the_right"] - facts["to_the_right"]) <= 1
    ways = {(way.from_camera, way.to_camera): way for way in gallery.transitions()}
    for way in (("left", "right"), ("right", "left")):
        assert ways[way].count >= 3
        assert 0 < ways[way].p50 < 5, "seconds through the strip that neither camera sees"
    for seen in result.shown.values():
        known = [track.identity for track in seen.tracks if track.identity]
        assert len(known) == len(set(known)), "one identity twice on one camera"
    crops = [crop for number in gallery.numbers() for visit in gallery.visits(number) for crop in visit.crops]
    assert crops
    assert all(crop.jpeg.startswith(b"\xff\xd8") for crop in crops)
