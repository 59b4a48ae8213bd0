"""`torchship watch score`: figures of tracks that were made by hand, and bad files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from torchship.errors import BadInput
from torchship_video.score import compare, read, score

# two that stand still for ten frames
TRUTH = "".join(f"{frame},{number},{100 * number},50,40,80,1,-1,-1,-1\n" for frame in range(1, 11) for number in (1, 2))


def written(folder: Path, text: str, name: str = "ours.txt") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_truth_scores_one(tmp_path: Path) -> None:
    truth = read(written(tmp_path, TRUTH), truth=True)
    found = compare(truth, truth)
    assert (found.hota, found.idf1, found.mota, found.switches) == (1.0, 1.0, 1.0, 0)
    assert (found.frames, found.tracks, found.truth_tracks) == (10, 2, 2)


def test_numbers_that_change_in_the_middle_are_switches(tmp_path: Path) -> None:
    lines = [line.split(",") for line in TRUTH.splitlines()]
    ours = "\n".join(",".join([line[0], str(int(line[1]) + 2 * (int(line[0]) > 5)), *line[2:]]) for line in lines)
    found = compare(read(written(tmp_path, TRUTH), truth=True), read(written(tmp_path, ours, "b.txt")))
    assert found.switches == 2
    assert found.mota == pytest.approx(1 - 2 / 20)
    assert found.idf1 == pytest.approx(0.5)


def test_one_of_two_is_half_the_recall(tmp_path: Path) -> None:
    ours = "".join(line + "\n" for line in TRUTH.splitlines() if line.split(",")[1] == "1")
    found = compare(read(written(tmp_path, TRUTH), truth=True), read(written(tmp_path, ours, "b.txt")))
    assert (found.recall, found.precision, found.misses) == (0.5, 1.0, 10)
    assert found.idf1 == pytest.approx(2 / 3)


def test_truth_of_score_zero_is_ignored(tmp_path: Path) -> None:
    assert read(written(tmp_path, "1,1,0,0,9,9,1\n1,2,0,0,9,9,0\n"), truth=True) == {1: ([1], [(0, 0, 9, 9)])}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1,1,0,0,9,9\n1,2,0,0,9\n", r":2: 5 fields"),
        ("1,1,0,0,9,9\n\n1,2,0,x,9,9\n", r":3: 'x' is no number"),
        ("0,1,0,0,9,9\n", r":1: frame 0"),
        ("1,1.5,0,0,9,9\n", r":1: .*track 1.5"),
        ("1,1,0,0,nan,9\n", r":1: "),
        ("1,1,0,0,0,9\n", r":1: the box is 0 wide"),
        ("1,1,0,0,9,9\n1,1,5,5,9,9\n", r":2: track 1 is on frame 1 twice"),
        ("", "holds no boxes"),
    ],
)
def test_a_bad_file_is_told_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        read(written(tmp_path, text), truth=True)


def test_what_is_no_file_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="No such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(BadInput, match="directory"):
        read(tmp_path)
    (tmp_path / "film.mp4").write_bytes(b"\x00\xff\xfe\x80")
    with pytest.raises(BadInput, match="is no text"):
        read(tmp_path / "film.mp4")


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    paths = [str(written(tmp_path, TRUTH, "truth.txt")), str(written(tmp_path, TRUTH))]
    shown = CliRunner().invoke(score, paths, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "IDF1" in shown.output
    assert "1.000" in shown.output
    found = json.loads(CliRunner().invoke(score, [*paths, "--json"], catch_exceptions=False).output)
    assert found["idf1"] == found["hota"] == 1.0
