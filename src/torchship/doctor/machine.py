"""What this machine is: cores, threads, memory, shared memory, tools, and which backends run on it. Needs no torch."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import msgspec
import psutil

from torchship import plugins
from torchship.doctor import features
from torchship.doctor.features import Feature
from torchship.hardware import THREAD_VARIABLES, Hardware, free_memory, here, quota, version

Level: TypeAlias = Literal["ok", "warn", "bad"]
_PACKAGES = ("torch", "torchvision", "onnx", "onnxruntime", "openvino", "nncf", "torchao", "executorch", "tensorrt")
_GIB = 2**30
_SHM = "/dev/shm"  # noqa: S108  # nothing is written there, its size is what we are after
_SMALL_SHM = 256 * 2**20


class Fact(msgspec.Struct, frozen=True):
    """One line of the examination; `advice` says how to mend what is not `ok`."""

    name: str
    value: str
    level: Level = "ok"
    advice: str = ""


class BackendRow(msgspec.Struct, frozen=True):
    """A backend; `reason` says why it cannot run here and how to mend that, empty when it can."""

    name: str
    reason: str = ""


class Machine(msgspec.Struct, frozen=True):
    """All that the doctor found without looking at a model."""

    hardware: Hardware
    fingerprint: str
    facts: list[Fact]
    features: list[Feature]
    backends: list[BackendRow]
    packages: dict[str, str]
    advice: list[str]


def examine() -> Machine:
    """Look at this machine. Reads the kernel's files and package metadata; imports no torch, opens no device."""
    hardware = here()
    facts = [
        fact for look in (_cores, _threads, _load, _memory, _shared_memory, _files, _tools) for fact in look(hardware)
    ]
    rows = [
        BackendRow(name, plugins.reason_against("backends", name=name, hardware=hardware))
        for name in plugins.names("backends")
    ]
    packages = {name: found for name in _PACKAGES if (found := version(name))}
    return Machine(
        hardware, hardware.fingerprint, facts, features.of(hardware), rows, packages, _advice(facts, packages)
    )


def _advice(facts: list[Fact], packages: Mapping[str, str]) -> list[str]:
    advice = [fact.advice for fact in facts if fact.level != "ok" and fact.advice]
    if "torch" not in packages:
        advice.append("this install opens and serves artifacts; to optimize models: pip install 'torchship[optimize]'")
    if "openvino" not in packages and platform.machine() == "x86_64":
        advice.append("OpenVINO is often the fastest backend on x86: pip install openvino nncf")
    return advice


def _judged(name: str, value: str, trouble: bool, advice: str) -> Fact:
    return Fact(name, value, "warn", advice) if trouble else Fact(name, value)


def _cores(hardware: Hardware) -> Iterator[Fact]:
    logical = os.cpu_count() or hardware.cores
    physical = psutil.cpu_count(logical=False) or logical
    yield Fact("processor", f"{hardware.processor} ({hardware.machine})")
    pinned = sorted(os.sched_getaffinity(0))
    text = f"{hardware.cores} usable of {logical} logical, {physical} physical"
    if len(pinned) < logical:
        text += f"; pinned to {_ranges(pinned)}"
    granted = quota() or len(pinned)
    short, threads = granted < len(pinned), max(1, int(granted))
    advice = (
        f"the control group grants {granted:g} of {len(pinned)} cores: torchship runs with --threads {threads}, "
        f"for other programs export OMP_NUM_THREADS={threads}"
    )
    yield _judged("cores", f"{text}; quota {granted:g}" if short else text, short, advice)
    for gpu in hardware.gpus:
        detail = f"{gpu.memory / _GIB:.0f} GiB, compute capability {gpu.capability}, driver {gpu.driver}"
        yield Fact("gpu", f"{gpu.name}, {detail}")
    if not hardware.gpus:
        yield Fact("gpu", "none (nvidia-smi lists no card)")


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def _threads(hardware: Hardware) -> Iterator[Fact]:
    given = {name: os.environ[name] for name in THREAD_VARIABLES if os.environ.get(name)}
    over = [name for name, value in given.items() if value.isdigit() and int(value) > hardware.cores]
    text = ", ".join(f"{name}={value}" for name, value in given.items()) or f"libraries' choice ({hardware.cores})"
    advice = f"more threads than cores make models much slower: export {(over or [''])[0]}={hardware.cores}"
    yield _judged("threads", text, bool(over), advice)


def _load(hardware: Hardware) -> Iterator[Fact]:
    load = os.getloadavg()[0]
    advice = "the machine is busy: timings taken now are noisy"
    yield _judged("load", f"{load:.1f} in the last minute", load > hardware.cores / 2, advice)


def _memory(hardware: Hardware) -> Iterator[Fact]:
    free = free_memory()
    text = f"{hardware.memory / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free"
    advice = "a search keeps torch in memory (0.5 GiB and more a trial): free at least 2 GiB"
    yield _judged("memory", text, free < 2 * _GIB, advice)


def _shared_memory(hardware: Hardware) -> Iterator[Fact]:
    try:
        usage = shutil.disk_usage(_SHM)
    except OSError:
        yield Fact(_SHM, "not there", "bad", f"mount a tmpfs on {_SHM}: the server passes tensors through it")
        return
    text = f"{usage.total / _GIB:.2f} GiB, {usage.free / _GIB:.2f} GiB free"
    advice = f"{_SHM} is small: a full one kills with a bus error; docker run --shm-size=1g (or --ipc=host)"
    yield _judged(_SHM, text, usage.free < _SMALL_SHM, advice)


def _files(hardware: Hardware) -> Iterator[Fact]:
    import resource
    import tempfile

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"a server needs a file for each connection: ulimit -n {min(hard, 65536)}"
    yield _judged("open files", str(soft), soft < 1024, advice)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    advice = "trials write models there: free 5 GiB"
    yield _judged(f"disk {folder}", f"{free / _GIB:.0f} GiB free", free < 5 * _GIB, advice)


def _tools(hardware: Hardware) -> Iterator[Fact]:
    libc, number = platform.libc_ver()
    yield Fact(
        "python", f"{platform.python_version()} on {platform.system()} {platform.release()}, {libc} {number}".strip()
    )
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "")
    advice = "inductor and aoti compile C++: apt install g++"
    yield _judged("c++ compiler", str(shutil.which(compiler)) if compiler else "none", not compiler, advice)
