"""Facts of this machine: cores and memory that this process may use, processor features, GPUs, package versions.

Containers limit a process by its control group, so the limits are read there: the group is the one that
`/proc/self/cgroup` names, found below the mounts of version 1 and 2 in `/proc/self/mountinfo`, and every group above it
counts too. Functions that read files take `root`, the folder in which `proc` and `sys` are looked for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from pathlib import Path

import msgspec

_INTERESTING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8",
                "amx_bf16", "asimddp", "i8mm", "bf16", "sve", "sve2")  # fmt: skip

MEMORY_SHARE = "TORCHSHIP_MEMORY_SHARE"  # of a card's memory, of 1, that torch may take in this process
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_ROOT = Path("/")
_THRIFT = {-1: 2**17, -3: 2**16, -8: 1}  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in bytes, M_ARENA_MAX


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
    def has_bf16(self) -> bool:
        """Whether the processor multiplies bf16 in hardware."""
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(self.features))

    @property
    def line(self) -> str:
        """One line for readers."""
        cards = "".join(f", {gpu.name} {gpu.memory / 2**30:.0f} GiB" for gpu in self.gpus)
        return f"{self.processor} ({self.machine}), {self.cores} cores, {self.memory / 2**30:.0f} GiB{cards}"


@functools.cache
def here() -> Hardware:
    """This machine. Asks the kernel and `nvidia-smi`, never a CUDA library, so that no context is made."""
    name, features = _processor()
    return Hardware(platform.machine(), name, cores(), memory(), features, _gpus())


def version(package: str) -> str:
    """The version of an installed package, or an empty string."""
    try:
        return _version(package)
    except PackageNotFoundError:
        return ""


def cores(*, root: Path = _ROOT) -> int:
    """How many threads of this process can run at once: its CPUs, or the whole cores of its quota if they are fewer."""
    granted = quota(root=root)
    allowed = len(os.sched_getaffinity(0))
    return allowed if granted is None else max(1, min(allowed, int(granted)))


def cpus(count: int) -> list[int]:
    """The CPUs to pin a child of `count` threads to; none where a quota, not a set of CPUs, limits this process.

    Every container of a host would pin to the same first CPUs otherwise.
    """
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[: count or None] if cores() == len(allowed) else []


def quota(*, root: Path = _ROOT) -> float | None:
    """The cores that the control group and those above it grant (a fraction is possible); None without a limit."""
    granted = []
    for version, group in _groups("cpu", root):
        files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in files for word in _read(group / name).split()]
        if len(words) == 2 and all(word.isdigit() and int(word) for word in words):  # no limit: "max" or -1
            granted.append(int(words[0]) / int(words[1]))
    return min(granted, default=None)


def memory(*, root: Path = _ROOT) -> int:
    """Memory in bytes that this process may use: the machine's, or the least limit of its control groups."""
    return min([_meminfo("MemTotal", root), *(limit for limit, _ in _memory_groups(root))])


def free_memory(*, root: Path = _ROOT) -> int:
    """Bytes that this process can still take: the machine's, or what its control groups leave if that is less."""
    return max(0, min([_meminfo("MemAvailable", root), *(limit - used for limit, used in _memory_groups(root))]))


def _memory_groups(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group of this process and the bytes in use that the kernel cannot take back."""
    for version, group in _groups("memory", root):
        if version == 2:
            names, cached = ("memory.max", "memory.current"), "inactive_file"
        else:
            names, cached = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
        limit, used = (_read(group / name) for name in names)
        if limit.isdigit() and used.isdigit():  # "max" where there is no limit
            row = re.search(rf"^{cached} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
            yield int(limit), int(used) - (int(row[1]) if row else 0)


@functools.cache
def _groups(controller: str, root: Path) -> list[tuple[int, Path]]:
    """The folders of this process's control groups, innermost first, with the version of their hierarchy.

    Both hierarchies can be mounted at once, and either can limit a controller.
    """
    paths: dict[int, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller in controllers.split(","):
            paths[1] = path
        elif number == "0" and not controllers:
            paths[2] = path
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        version = {"cgroup": 1, "cgroup2": 2}.get(kind[0] if kind else "", 0)
        if version not in paths or len(fields) < 5 or (version == 1 and controller not in kind[-1].split(",")):
            continue
        mounted, top = (re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), field) for field in fields[3:5])
        top_folder = root / top.lstrip("/")
        inner = Path(paths[version])  # as seen from the hierarchy's root, of which `mounted` is mounted
        inner = inner.relative_to(mounted) if inner.is_relative_to(mounted) else Path()
        inner = Path() if ".." in inner.parts else inner
        found += [(version, top_folder / part) for part in (inner, *inner.parents)]
    return found


def _meminfo(name: str, root: Path) -> int:
    """A row of `/proc/meminfo` in bytes; where it cannot be read, all memory of the machine."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read(path: Path) -> str:
    """The text of a file of the kernel, stripped; empty where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _processor() -> tuple[str, tuple[str, ...]]:
    name, flags = platform.processor() or "unknown", set[str]()
    for line in _read(_ROOT / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags |= set(value.split())
    return name, tuple(sorted(flags.intersection(_INTERESTING)))


def ask_driver(kind: str, fields: str) -> list[list[str]]:
    """The rows that `nvidia-smi --query-KIND=FIELDS` gives, but for odd ones; none where it cannot."""
    command = ["nvidia-smi", f"--query-{kind}={fields}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    return [row for row in rows if len(row) == fields.count(",") + 1]


def _gpus() -> tuple[Gpu, ...]:
    rows = ask_driver("gpu", "name,memory.total,compute_cap,driver_version")
    try:
        return tuple(Gpu(name, int(size) * 2**20, capability, driver) for name, size, capability, driver in rows)
    except ValueError:  # a card that does not tell its memory
        return ()


def give_memory_back() -> None:
    """Let the C library return what it keeps of freed memory to the system, where it can.

    Source: malloc_trim(3) of glibc; other C libraries have no such function.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def keep_no_freed_memory() -> None:
    """From now on the C library takes large pieces from the system and returns them at once, and all threads share one
    heap: a process is then as large as what it holds, and not as what it once held. It costs page faults.

    Source: mallopt(3) of glibc; other C libraries are left as they are.
    """
    if (tune := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for parameter, value in _THRIFT.items():
            tune(parameter, value)
