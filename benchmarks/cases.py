"""Runs the case scripts of a folder one by one and counts which are right.

    python -m benchmarks.cases FOLDER [NAME ...] [--timeout 600]

A case is a script, `*.py` or `*.sh`, that ends with 0 where torchship does right and with 1 where it does not. Each is
given a scratch folder of its own (CASE_WORK) and the interpreter of this environment (TORCHSHIP_PYTHON). Where a
folder's scripts ask for models and pictures of faces (CASE_FACE_STORE, CASE_FACES) and the application `faces` is
installed, they are made once and kept. Exit code 1 when a case is wrong.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import click

SHARED = ("common.py", "harness.py")  # what the cases of a folder import


@click.command(help="Run every case of FOLDER, or those named, and count the right ones.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("names", nargs=-1)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds for one case.")
@click.option("--python", default=sys.executable, help="The interpreter that runs cases and servers.")
def main(folder: Path, names: tuple[str, ...], timeout: float, python: str) -> None:
    scripts = [path for path in sorted(folder.iterdir()) if path.suffix in (".py", ".sh") and path.name not in SHARED]
    if names:
        scripts = [path for path in scripts if path.stem.startswith(names)]
    if not scripts:
        raise click.UsageError(f"there is no such case in {folder}")
    environment = os.environ | {"TORCHSHIP_PYTHON": python} | faces(folder)
    width = max(len(path.stem) for path in scripts)
    wrong = 0
    for script in scripts:
        began = time.monotonic()
        verdict, line = run(script, python=python, environment=environment, timeout=timeout)
        wrong += verdict != "right"
        print(f"{script.stem:{width}}  {verdict:8} {time.monotonic() - began:6.1f} s  {line[:150]}", flush=True)
    print(f"cases={len(scripts)} right={len(scripts) - wrong} wrong={wrong}", flush=True)
    sys.exit(bool(wrong))


def run(script: Path, *, python: str, environment: dict[str, str], timeout: float) -> tuple[str, str]:
    """The verdict on one case, `right`, `wrong` or `timeout`, and the last line that it printed."""
    words = ["bash" if script.suffix == ".sh" else python, script.name]
    scratch = tempfile.mkdtemp(prefix="torchship-case-")
    with tempfile.TemporaryFile() as log:  # not a pipe: a server that outlives its case would hold it open
        child = subprocess.Popen(
            words,
            cwd=script.parent,
            env=environment | {"CASE_WORK": scratch, "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            verdict = "wrong" if child.wait(timeout) else "right"
        except subprocess.TimeoutExpired:
            verdict = "timeout"
        finally:
            end(child)
            shutil.rmtree(scratch, ignore_errors=True)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
    return verdict, lines[-1]


def end(child: subprocess.Popen[bytes]) -> None:
    """End a case with the servers it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.wait()


def faces(folder: Path) -> dict[str, str]:
    """Where pictures and models of faces are, for cases that ask for them; empty where nobody asks or can make them."""
    asked = [name for name in ("CASE_FACES", "CASE_FACE_STORE") if mentioned(name, folder) and name not in os.environ]
    if not asked or find_spec("torchship_faces") is None:
        return {}
    from torchship import pinned
    from torchship_faces import weights

    store = pinned.folder().parent / "case-faces"
    if not (store / "done").exists():
        words: Sequence[str] = (sys.executable, "-m", "torchship", "faces", "prepare", "--quick", "--store", str(store))
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        (store / "done").touch()
    return {"CASE_FACES": str(weights.pictures()), "CASE_FACE_STORE": str(store)}


def mentioned(word: str, folder: Path) -> bool:
    """Whether a script of the folder names a variable."""
    return any(word in path.read_text(errors="replace") for path in folder.glob("*.py"))


if __name__ == "__main__":
    main()
