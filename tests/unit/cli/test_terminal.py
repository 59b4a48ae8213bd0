"""The command line on terminals, full disks and folders: one line, no traceback, no colours where none are wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.artifact.made import linear
from torchship.artifact import Store

FULL = Path("/dev/full")


def run(*words: str, stdout: int | None = subprocess.PIPE, **more: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "torchship", *words], env={**os.environ, **more}, stdout=stdout,
        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, check=False, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("value", ["1", ""])
def test_no_color_means_no_escape_codes(value: str, tmp_path: Path) -> None:
    main, side = os.openpty()
    words = [sys.executable, "-m", "torchship", "store", "--store", str(tmp_path), "show", "nope"]
    environment = {**os.environ, "NO_COLOR": value, "TERM": "xterm"}
    subprocess.run(words, env=environment, stdin=side, stdout=side, stderr=side, check=False, timeout=60)
    text = os.read(main, 4096)
    os.close(main)
    os.close(side)
    assert b"has no 'nope'" in text
    assert (b"\x1b[" in text) == (not value)


def test_the_home_folder_is_found_where_no_shell_does_it(tmp_path: Path) -> None:
    linear(tmp_path / "a")
    done = run("store", "--store=~/s", "publish", "~/a", "--name", "net", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert Store(tmp_path / "s").versions("net") == (1,)
    assert "net" in run("store", "list", HOME=str(tmp_path), TORCHSHIP_STORE="~/s").stdout


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    descriptor = os.open(FULL, os.O_WRONLY)
    done = run("store", "--store", str(tmp_path), "list", stdout=descriptor)
    os.close(descriptor)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: the output: No space left on device"


def test_a_folder_for_a_file_and_a_place_without_rights_are_one_line(tmp_path: Path) -> None:
    linear(tmp_path / "a")
    (tmp_path / "x.toml").mkdir()
    for words in (
        ("pipeline", "check", str(tmp_path / "x.toml")),
        ("serve", str(tmp_path / "x.toml")),
        ("store", "export", str(tmp_path / "a"), "/proc/x.tar"),
        ("predict", str(tmp_path / "a"), "--input", str(tmp_path)),
    ):
        done = run(*words)
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
