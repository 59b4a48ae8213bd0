"""The command line on terminals, full disks and folders: one line, no traceback, no colours where none are wanted."""

from __future__ import annotations

import os
import re
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


def on_terminal(*words: str, **more: str) -> bytes:
    """What Python with these words writes where all its streams are a terminal."""
    main, side = os.openpty()
    subprocess.run(
        [sys.executable, *words], env={**os.environ, "TERM": "xterm", **more}, stdin=side, stdout=side, stderr=side,
        check=False, timeout=60,
    )  # fmt: skip
    text = os.read(main, 4096)
    os.close(main)
    os.close(side)
    return text


@pytest.mark.parametrize("value", ["1", ""])
def test_no_color_means_no_escape_codes(value: str, tmp_path: Path) -> None:
    text = on_terminal("-m", "torchship", "store", "--store", str(tmp_path), "show", "nope", NO_COLOR=value)
    assert b"has no 'nope'" in text
    assert (b"\x1b[" in text) == (not value)


_PROGRESS = {
    "optimize": """
from torchship.cli.optimize import _progress
from torchship.optimize.trial import Trial
from torchship.recipe import Recipe

with _progress(quiet=False) as (show, _):
    show(Trial(Recipe("eager"), "failed", failure="build: it broke"), 1, 2)
""",
    "doctor": """
from torchship.cli.doctor import command
from torchship.doctor import examination

def diagnose_target(target, *, on_step, **_):
    on_step("export")
    return examination.Examination(target, "x -> y", [], [], 0, [])

examination.diagnose_target = diagnose_target
command.main(["net", "--input", "x:FP32[-1,8]"], standalone_mode=False)
""",
}


@pytest.mark.parametrize("value", ["1", ""])
@pytest.mark.parametrize("name", ["optimize", "doctor"])
def test_no_color_holds_for_progress(name: str, value: str) -> None:
    text = on_terminal("-c", _PROGRESS[name], NO_COLOR=value)
    assert {"optimize": b"it broke", "doctor": b"needs care"}[name] in text
    assert bool(re.search(rb"\x1b\[[\d;]*m", text)) == (not value)


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
