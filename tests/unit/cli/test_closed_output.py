"""The command line where nobody reads: standard output is closed before it begins."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_closed_output_is_no_traceback(tmp_path: Path) -> None:
    line = f"exec {sys.executable} -m torchship store --store {tmp_path} list >&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
