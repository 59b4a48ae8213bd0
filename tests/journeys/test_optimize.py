"""`torchship optimize` as a user runs it: a real process, a hung backend, Ctrl-C, and what is left afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.unit.optimize.planted import plant
from torchship.artifact import Store, open_artifact

ROOT = Path(__file__).parents[2]
TARGET = "tests.unit.optimize.test_targets:net"


def environment(folder: Path) -> dict[str, str]:
    places = [str(ROOT), str(ROOT / "src"), str(plant(folder / "site"))]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(places),
        "TORCHSHIP_CACHE": str(folder / "cache"),
        "TORCHSHIP_STORE": str(folder / "store"),
    }


def test_ctrl_c_keeps_what_is_done_and_leaves_nothing_behind(tmp_path: Path) -> None:
    words = ["optimize", TARGET, "--input", "input:FP32[-1,4]", "--backends", "planted_good,planted_hang", "--json"]
    child = subprocess.Popen(
        [sys.executable, "-m", "torchship", *words, "--name", "line", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path) | {"FORCE_COLOR": ""},
        cwd=tmp_path,
    )
    # the good trial's result is in the cache when the hung one begins
    watch = threading.Event()
    for _ in range(1200):
        done = [json.loads(path.read_text()) for path in (tmp_path / "cache" / "trials").glob("*.json")]
        if any(trial["recipe"]["backend"] == "planted_good" for trial in done) or child.poll() is not None:
            break
        watch.wait(0.1)
    watch.wait(0.5)
    child.send_signal(signal.SIGINT)
    try:
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 0, err
    told = json.loads(out)
    statuses = {trial["recipe"]["backend"]: trial["status"] for trial in told["report"]["trials"]}
    assert statuses["planted_hang"] == "skipped"
    assert statuses["planted_good"] == "ok"
    assert told["report"]["interrupted"]
    assert Path(told["artifact"], "manifest.json").is_file()
    assert list((tmp_path / "cache" / "work").iterdir()) == []


_AT_ONCE = """
from torchship.cli import main
from torchship.optimize import publishing

publishing.YOUNG_S = 0.0
main()
"""


def test_a_search_that_is_killed_leaves_the_best_so_far_published(tmp_path: Path) -> None:
    words = ["optimize", TARGET, "--input", "input:FP32[-1,4]", "--backends", "planted_good,planted_hang"]
    child = subprocess.Popen(
        [sys.executable, "-c", _AT_ONCE, *words, "--name", "line", "--threads", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
        cwd=tmp_path,
    )
    store, watch = Store(tmp_path / "store"), threading.Event()
    try:
        for _ in range(1200):
            if list((tmp_path / "cache" / "work").glob("*/build-*")) and store.versions("line"):
                break  # the hung one is being built, or the good one is
            assert child.poll() is None
            watch.wait(0.1)
    finally:
        child.kill()
        _, err = child.communicate()
    assert child.returncode == -signal.SIGKILL, err
    (number,) = store.versions("line")
    artifact = open_artifact(store.resolve("line"))
    assert artifact.path.name == str(number)
    assert artifact.manifest.recipe.backend in ("eager", "planted_good")
    assert artifact.manifest.verdict is not None
    assert artifact.manifest.verdict.passed
    if artifact.manifest.recipe.backend == "eager":  # the other one is planted in the child alone
        stage = artifact.open(threads=1)
        assert stage(artifact.inputs())
        stage.close()


def test_a_wrong_target_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "torchship", "optimize", "no.such:thing", "--input", "x:FP32[-1,4]"],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=120,
        check=False,
    )
    assert found.returncode == 1
    assert "cannot be imported" in found.stderr
    assert "Traceback" not in found.stderr
