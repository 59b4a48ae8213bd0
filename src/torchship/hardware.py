"""What this machine is: processor, features, memory, devices; and the fingerprint that artifacts remember."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
from pathlib import Path

import msgspec
import psutil

_INTERESTING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
                "amx_bf16", "asimddp", "i8mm", "bf16", "sve", "sve2")  # fmt: skip


class Gpu(msgspec.Struct, frozen=True):
    """One accelerator; `memory` in bytes, `capability` as NVIDIA counts it (9.0 for Hopper)."""

    name: str
    memory: int
    capability: str
    driver: str = ""


class Hardware(msgspec.Struct, frozen=True):
    """One machine as the search sees it; `cores` are those this process may use."""

    machine: str
    processor: str
    cores: int
    memory: int
    features: tuple[str, ...] = ()
    gpus: tuple[Gpu, ...] = ()

    @property
    def fingerprint(self) -> str:
        """16 hex digits that are equal on machines where native code and timings carry over."""
        facts = (self.machine, self.processor, self.cores, self.features, [(g.name, g.capability) for g in self.gpus])
        return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]

    @property
    def family(self) -> str:
        """16 hex digits that are equal on machines that run the same native code, however many cores they lend."""
        facts = (self.machine, self.processor, self.features, [(g.name, g.capability) for g in self.gpus])
        return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]

    @property
    def line(self) -> str:
        """One line for people."""
        cards = "".join(f", {gpu.name} {gpu.memory / 2**30:.0f} GiB" for gpu in self.gpus)
        return f"{self.processor} ({self.machine}), {self.cores} cores, {self.memory / 2**30:.0f} GiB{cards}"


@functools.cache
def here() -> Hardware:
    """This machine. Asks the kernel and `nvidia-smi`, never a CUDA library, so that no context is made."""
    name, features = _processor()
    return Hardware(platform.machine(), name, len(os.sched_getaffinity(0)), _memory(), features, _gpus())


def _processor() -> tuple[str, tuple[str, ...]]:
    name, flags = platform.processor() or "unknown", set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return name, tuple(sorted(flags.intersection(_INTERESTING)))


def _memory() -> int:
    """Memory in bytes that this process may use: the machine's, or its control group's limit if that is smaller."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _gpus() -> tuple[Gpu, ...]:
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    try:
        text = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
        rows = [[cell.strip() for cell in row.split(",")] for row in text.splitlines() if row.strip()]
        return tuple(Gpu(name, int(size) * 2**20, capability, driver) for name, size, capability, driver in rows)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()
