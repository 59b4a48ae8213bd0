"""Crops in place from the ring, colours as a vector, and which crops are worth it."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from torchship.artifact import Store
from torchship.errors import BadInput
from torchship.pipeline import Composed, convert, plan
from torchship.tensors import Tensors
from torchship_video import appearance, ring
from torchship_video.identity.selection import CropChoice, box_quality
from torchship_video.messages import Frame, Observation, Track, encode

RED, BLUE = (200, 20, 30), (20, 40, 190)


@pytest.fixture
def writer() -> Iterator[ring.RingWriter]:
    made = ring.RingWriter.make(size=320 * 240 * 3, slots=2)
    yield made
    made.close()


def publish(writer: ring.RingWriter) -> Frame:
    """Red clothes on the left, blue ones on the right, grey ground."""
    slot = writer.claim()
    assert slot is not None
    pixels = slot.pixels(320, 240, "RGB")
    pixels[:] = 128
    pixels[40:200, 20:80], pixels[40:200, 200:260] = RED, BLUE
    return slot.publish("door", sequence=0)


def ask(frame: Frame, *boxes: tuple[float, ...]) -> Tensors:
    line = Composed(plan(convert(appearance.line()), Store()), Store())
    handles = np.full((len(boxes), 1), encode(frame), np.object_)
    return line({"frame": handles, "box": np.array(boxes, np.float32)}, {})


def test_the_line_cuts_boxes_out_of_the_ring_and_embeds_their_colours(writer: ring.RingWriter) -> None:
    frame = publish(writer)
    found = ask(frame, (20, 40, 80, 200), (22, 50, 78, 190), (200, 40, 260, 200))
    assert found["usable"].all()
    vectors = found["embedding"]
    assert vectors.shape == (3, appearance.HISTOGRAM_WIDTH)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.9
    assert vectors[0] @ vectors[2] < 0.1
    picture = Image.open(io.BytesIO(found["jpeg"][0, 0]))
    assert picture.size == (appearance.WIDTH, appearance.HEIGHT)
    assert np.abs(np.asarray(picture)[60, 30].astype(int) - RED).max() < 12


def test_a_row_whose_frame_is_gone_or_whose_box_is_outside_is_not_usable_and_fails_nobody(
    writer: ring.RingWriter,
) -> None:
    old = publish(writer)
    fresh = [publish(writer), publish(writer)][-1]
    crops = appearance.Crops()
    handles = np.array([[encode(old)], [encode(fresh)], [encode(fresh)], [encode(fresh)]], np.object_)
    boxes = np.array([[20, 40, 80, 200], [20, 40, 80, 200], [900, 0, 950, 9], [np.nan, 0, 1, 1]], np.float32)
    pixels, jpegs, _, usable = crops(handles, boxes)
    assert usable.tolist() == [False, True, False, False]
    assert (pixels[1, 64, 32] == RED).all()
    assert not pixels[[0, 2, 3]].any()
    assert jpegs[0, 0] == b""


def test_what_is_no_handle_is_refused() -> None:
    with pytest.raises(BadInput, match="no handle"):
        appearance.Crops()(np.array([[b"\x01"]], np.object_), np.zeros((1, 4), np.float32))


def test_a_sharp_crop_is_sharper_than_a_blurred_one() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 64, 3), np.uint8)
    blurred: NDArray[np.uint8] = np.asarray(Image.fromarray(noise).resize((8, 16)).resize((64, 128)))
    assert appearance.sharpness(np.full((128, 64, 3), 90, np.uint8)) == 0
    assert appearance.sharpness(noise) > 2 * appearance.sharpness(blurred)


def test_a_box_is_worth_less_when_it_is_small_hidden_or_cut() -> None:
    whole = box_quality((100, 100, 160, 260), [], width=640, height=480)
    assert whole == 1.0
    assert box_quality((100, 100, 130, 180), [], width=640, height=480) == 0.5
    assert box_quality((0, 100, 60, 260), [], width=640, height=480) == pytest.approx(0.3)
    in_front, behind = (130.0, 120.0, 190.0, 300.0), (130.0, 90.0, 190.0, 250.0)
    assert box_quality((100, 100, 160, 260), [in_front], width=640, height=480) == pytest.approx(1 - 30 * 140 / 9600)
    assert box_quality((100, 100, 160, 260), [behind], width=640, height=480) == 1.0
    assert box_quality((100, 100, 100, 260), [], width=640, height=480) == 0


def test_a_track_gives_its_first_crops_and_then_only_better_ones() -> None:
    choice = CropChoice(kept=2, gap=1.0, better=1.2)

    def chosen(time: float, height: float, *, confirmed: bool = True, seen: bool = True) -> bool:
        track = Track(1, (100, 100, 150, 100 + height), 0.9, "person", confirmed, seen)
        frame = Frame("door", "torchship-ring-x", 0, 2, 0, time, time, 640, 480, "RGB")
        return bool(choice.choose(Observation(frame, (track,)), time=time))

    assert not chosen(0.0, 80, confirmed=False)
    assert not chosen(0.0, 80, seen=False)
    assert not chosen(0.0, 10), "too small"
    assert chosen(0.0, 80)
    assert not chosen(0.5, 80), "too soon"
    assert chosen(1.0, 80)
    assert not chosen(2.0, 80), "no better than what there is"
    assert chosen(3.0, 120)
    choice.restarted("door")
    assert chosen(3.1, 40)


def test_one_frame_gives_at_most_so_many_crops_the_best() -> None:
    choice = CropChoice(most=2)
    tracks = [Track(n, (60.0 * n, 100, 60.0 * n + 40, 140 + 20.0 * n), 0.9, "person", True) for n in range(1, 6)]
    frame = Frame("door", "torchship-ring-x", 0, 2, 0, 0, 0, 640, 480, "RGB")
    chosen = choice.choose(Observation(frame, tuple(tracks)), time=0)
    assert [track.number for track, _ in chosen] == [5, 4]
