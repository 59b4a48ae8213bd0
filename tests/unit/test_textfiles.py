"""Text files as people have them, and what is no text is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchship import textfiles
from torchship.errors import BadConfig, NotFound


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_are_not_part_of_the_text(encoding: str, end: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(f'name = "café"{end}other = 1{end}'.encode(encoding))
    assert textfiles.read(tmp_path / "x.toml") == 'name = "café"\nother = 1\n'
    assert textfiles.read_toml(tmp_path / "x.toml") == {"name": "café", "other": 1}


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("here")
    assert textfiles.read("~/x.txt") == "here"


def test_paths_of_a_toml_file_may_be_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    file = tmp_path / "x.toml"
    file.write_text('a = "~/a"\nb = {c = ["~/d", "~", "~5", "e~/f"], n = 1}\n[[t]]\np = "~nobody-here/x"\n')
    inside = {"c": ["/home/ann/d", "~", "~5", "e~/f"], "n": 1}
    assert textfiles.read_toml(file) == {"a": "/home/ann/a", "b": inside, "t": [{"p": "~nobody-here/x"}]}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("one\ncafé\n".encode("cp1252"), "line 2 is not utf-8 .byte e9"),
        ("кот\n".encode("cp1251"), "line 1 is not utf-8"),
        ("one".encode("utf-16-le"), "zero bytes"),
        (b"\xff\xfeo\0n", "line 1 is not utf-16"),
    ],
)
def test_other_encodings_are_refused_by_line_not_guessed(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(BadConfig, match=words) as caught:
        textfiles.read(tmp_path / "x.txt")
    assert "UTF-8" in caught.value.hint


def test_what_is_not_there_or_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"nope\.toml"):
        textfiles.read_toml(tmp_path / "nope.toml")
    with pytest.raises(BadConfig, match="directory"):
        textfiles.read(tmp_path)
    (tmp_path / "x.toml").write_text("a = ")
    with pytest.raises(BadConfig, match=r"x\.toml: not TOML"):
        textfiles.read_toml(tmp_path / "x.toml")
