"""YOLOv3's maps to boxes, Darknet's files to a module, regions and motion, cameras.toml."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from torchship.errors import BadConfig, CorruptArtifact, NotFound, Unsupported
from torchship_video import config, darknet, stages, yolo
from torchship_video.messages import Frame
from torchship_video.motion import MotionGate, Region
from torchship_video.tracking import CameraTracker, TrackerOptions

CFG = """
[net]
width=8
height=8
channels=3
[convolutional]
batch_normalize=1
filters=2
size=3
stride=1
pad=1
activation=leaky
[maxpool]
size=2
stride=1
[convolutional]
filters=2
size=1
stride=1
pad=1
activation=linear
[route]
layers=-1,-2
[yolo]
mask=0
"""


def files(tmp_path: Path, *, more: int = 0, text: str = CFG) -> tuple[Path, Path, np.ndarray]:
    numbers = np.random.default_rng(0).uniform(0.1, 1, 8 + 54 + 2 + 4 + more).astype("<f4")
    cfg, weights = tmp_path / "net.cfg", tmp_path / "net.weights"
    cfg.write_text(text)
    weights.write_bytes(np.array([0, 2, 0, 7, 0], "<i4").tobytes() + numbers.tobytes())
    return cfg, weights, numbers


def test_a_network_of_darknet_computes_what_its_files_say(tmp_path: Path) -> None:
    cfg, weights, numbers = files(tmp_path)
    found = darknet.Darknet(cfg, weights).eval()(torch.full((1, 8, 8, 3), 255, dtype=torch.uint8))["map0"]
    bias, scale, mean, variance = (torch.from_numpy(numbers[at : at + 2].copy()) for at in (0, 2, 4, 6))
    kernel = torch.from_numpy(numbers[8:62].reshape(2, 3, 3, 3).copy())
    x = torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), kernel, padding=1)
    x = torch.nn.functional.batch_norm(x, mean, variance, scale, bias, eps=1e-5)
    x = torch.nn.functional.leaky_relu(x, 0.1)
    pooled = torch.nn.functional.max_pool2d(torch.nn.functional.pad(x, (0, 1, 0, 1), mode="replicate"), 2, 1)
    last = torch.from_numpy(numbers[64:68].reshape(2, 2, 1, 1).copy())
    plain = torch.nn.functional.conv2d(pooled, last, torch.from_numpy(numbers[62:64].copy()))
    assert torch.allclose(found, torch.cat([plain, pooled], 1), atol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    for more in (-1, 1):
        with pytest.raises(CorruptArtifact):
            darknet.Darknet(*files(tmp_path, more=more)[:2])
    with pytest.raises(Unsupported, match="lstm"):
        darknet.Darknet(*files(tmp_path, text=CFG.replace("[maxpool]", "[lstm]"))[:2])


def test_one_box_of_a_map_is_decoded() -> None:
    grid = np.full((2 * 85, 13, 13), -20.0, np.float32)
    grid[85:89, 4, 6] = 0, 0, np.log(2), 0  # of the second anchor: in the middle of its cell, twice as wide
    grid[89, 4, 6], grid[90 + 7, 4, 6] = 20, 0
    boxes, scores, kinds = yolo.decode([grid], anchors=[[(1, 1), (30, 40)]], side=416, least=0.3)
    assert np.allclose(boxes, [[6.5 * 32 - 30, 4.5 * 32 - 20, 6.5 * 32 + 30, 4.5 * 32 + 20]], atol=1e-3)
    assert np.allclose(scores, 0.5)
    assert yolo.COCO[kinds[0]] == "truck"
    assert not len(yolo.decode([grid], anchors=[[(1, 1), (30, 40)]], side=416, least=0.6)[0])


def test_boxes_are_those_of_the_wanted_labels_in_pixels_of_the_frame() -> None:
    empty = np.full((1, 255, 13, 13), -20.0, np.float32)
    fine = np.full((1, 255, 26, 26), -20.0, np.float32)
    empty[0, 0:4, 6, 6], empty[0, 4, 6, 6], empty[0, 5, 6, 6] = 0, 20, 20
    place = np.array([[0.5, 0, 100, 432, 832]], np.float32)
    boxes, scores, labels = stages.Boxes(labels=["person"])(empty, fine, place)
    assert labels.tolist() == [b"person"]
    assert scores[0] > 0.99
    assert np.allclose(boxes, [[(208 - 40.5) * 2, (208 - 41 - 100) * 2, (208 + 40.5) * 2, (208 + 41 - 100) * 2]])
    assert not len(stages.Boxes(labels=["car"])(empty, fine, place)[0])
    with pytest.raises(BadConfig, match="unicorn"):
        stages.Boxes(labels=["unicorn"])


def frame(width: int = 96, height: int = 54) -> Frame:
    return Frame("one", "ring", 0, 0, 0, 0.0, 0.0, width, height, "I420")


def test_a_box_counts_where_it_stands() -> None:
    left = Region([(0, 0), (0.5, 0), (0.5, 1), (0, 1)])
    boxes = np.array([[0, 0, 20, 50], [60, 0, 90, 50], [30, 0, 60, 50]], np.float32)
    assert left.stands(boxes, frame()).tolist() == [True, False, True]
    assert Region(()).stands(boxes, frame()).all()


def test_motion_is_seen_within_the_region_and_holds() -> None:
    still = np.full((81, 96), 50, np.uint8)
    moved = still.copy()
    moved[:20, 60:90] = 200
    whole, left = Region(()), Region([(0, 0), (0.5, 0), (0.5, 1), (0, 1)])
    for region, seen in ((whole, True), (left, False)):
        gate = MotionGate(0.01, hold=1.0, region=region)
        assert gate.moves(still, frame(), 0.0)  # the first frame
        assert not gate.moves(still, frame(), 2.0)
        assert gate.moves(moved, frame(), 2.1) is seen
        assert gate.moves(moved, frame(), 2.9) is seen


@pytest.mark.parametrize("kind", ["bytetrack", "ocsort", "sort", "cbiou"])
def test_a_track_is_confirmed_late_and_goes_on_unseen(kind: str) -> None:
    tracker = CameraTracker(msgspec.convert({"kind": kind, "frames": 3}, TrackerOptions), first=7)
    numbers = []
    for step in range(8):
        box = np.array([[10.0 + step, 10, 50 + step, 90]], np.float32)
        (track,) = tracker.update(box, np.array([0.9]), np.array([b"person"], object), seconds=step / 25)
        assert track.seen
        assert track.confirmed == (track.number > 0)
        numbers.append(track.number)
    assert numbers[-1] == 7
    nothing = np.empty((0, 4), np.float32), np.empty(0), np.empty(0, object)
    (lost,) = tracker.update(*nothing, seconds=8 / 25)
    assert (lost.number, lost.seen, lost.label) == (7, False, "person")
    assert [track.number for track in tracker.predict(9 / 25)] == [7]
    assert not tracker.update(*nothing, seconds=60.0)


def test_faults_of_cameras_toml_have_a_path(tmp_path: Path) -> None:
    file = tmp_path / "cameras.toml"
    for text, words in (
        ('[[camera]]\nname = "a"\nsource = "x.mp4"\nspeed = 3', r"camera\[0\].*speed|speed.*camera\[0\]|unknown field"),
        ('[[camera]]\nname = "a"\nsource = "x"\nevery = 0', r"camera\[0\]\.every|\.camera\[...\]\.every"),
        ('[[camera]]\nname = "a"\nsource = "x"\n[[camera]]\nname = "a"\nsource = "y"', "two cameras"),
        ('[[camera]]\nname = "a"\nsource = "x"\nregion = [[0, 0], [1, 1]]', "three corners"),
        ("[tracker]\nkind = 'magic'", "tracker.kind"),
        ("camera = [", "cameras.toml"),
    ):
        file.write_text(text)
        with pytest.raises(BadConfig, match=words):
            config.read(file)
    with pytest.raises(NotFound):
        config.read(tmp_path / "none.toml")
    file.write_text('[[camera]]\nname = "a"\nsource = "x.mp4"\n[[camera]]\nname = "b"\nsource = "rtsp://u:p@h/1"')
    found = config.read(file).camera
    assert found[0].source == str(tmp_path / "x.mp4")
    assert [camera.keeps for camera in found] == ["wait", "latest"]
    assert config.redacted(f"open {found[1].source} failed") == "open rtsp://***@h/1 failed"
