"""What `make edge` tells the emulated Raspberry Pi 4 of itself, without a network and without qemu."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import edge


def test_all_that_tells_of_the_processor_tells_of_the_same_one() -> None:
    files = edge.pi_files()
    blocks = list[dict[str, str]]()
    for text in files["proc/cpuinfo"].strip().split("\n\n"):
        pairs = (line.split(":") for line in text.splitlines())
        blocks.append({key.strip(): value.strip() for key, value in pairs})
    cpu = "sys/devices/system/cpu"
    assert [block["processor"] for block in blocks] == ["0", "1", "2", "3"]
    assert {files[f"{cpu}/{name}"] for name in ("possible", "present", "online")} == {"0-3\n"}
    for core, block in enumerate(blocks):
        # Arm Architecture Reference Manual, MIDR_EL1: implementer, variant, architecture, part, revision
        midr = int(files[f"{cpu}/cpu{core}/regs/identification/midr_el1"], 16)
        assert midr >> 24 == int(block["CPU implementer"], 16) == 0x41  # Arm
        assert midr >> 20 & 0xF == int(block["CPU variant"], 16)
        assert midr >> 4 & 0xFFF == int(block["CPU part"], 16) == 0xD08  # Cortex-A72
        assert midr & 0xF == int(block["CPU revision"])
        assert files[f"{cpu}/cpu{core}/topology/core_id"] == f"{core}\n"
        # it has none of what newer ones have: dot product, fp16 arithmetic
        assert not {"asimddp", "asimdhp", "fphp"} & set(block["Features"].split())


def test_children_are_started_by_the_script_that_starts_the_emulator(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(edge.CUSTOMIZE)
    words = [sys.executable, "-c", "import sys; print(sys.executable)"]

    def told(**environment: str) -> str:
        env = {"PYTHONPATH": str(tmp_path), **environment}
        return subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout.strip()

    assert told(EMULATED_PYTHON="/of/the/host/python") == "/of/the/host/python"
    assert told() == sys.executable
