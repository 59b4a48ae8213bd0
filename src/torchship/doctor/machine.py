"""What this machine is, what its features are good for, and which backends run on it. Needs no torch."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator
from typing import Literal

import msgspec
import psutil

from torchship import plugins
from torchship.doctor import card as cards
from torchship.doctor.card import CardCheck, CardReport, CardUse
from torchship.doctor.catalog import PACKAGES, tables
from torchship.doctor.explain import explain
from torchship.hardware import THREAD_VARIABLES, Gpu, Hardware, free_memory, here, quota, version

_GIB = 2**30
_SHM = "/dev/shm"  # noqa: S108  # nothing is written there, its size is what we are after


class Fact(msgspec.Struct, frozen=True):
    """One line of the examination; `advice` says how to mend what is not `ok`."""

    name: str
    value: str
    level: Literal["ok", "warn", "bad"] = "ok"
    advice: str = ""


class Feature(msgspec.Struct, frozen=True):
    """One hardware feature: whether this machine has it, and what it is good for."""

    name: str
    present: bool
    use: str
    device: str = "cpu"


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
    checks: list[CardCheck] = []


def examine() -> Machine:
    """Look at this machine. Reads the kernel's files and package metadata, imports no torch, and opens no device: where
    there are cards, a child process tries them."""
    hardware = here()
    facts = list(_facts(hardware))
    report = cards.look() if hardware.gpus and version("torch") else CardReport()
    if hardware.gpus:
        facts += [*_memory_of_cards(hardware, cards.uses()), *_torch_on(hardware, report)]
    rows = [
        BackendRow(name, plugins.reason_against("backends", name=name, hardware=hardware))
        for name in plugins.names("backends")
    ]
    packages = {name: found for name in PACKAGES if (found := version(name))}
    advice = [fact.advice for fact in facts if fact.advice]
    if "torch" not in packages:
        advice.append(tables().advice["torch"])
    if hardware.gpus:
        advice += [*_lacking(), *(words for check in report.checks for words in _mends(check.fault))]
    elif "openvino" not in packages and platform.machine() == "x86_64":
        advice.append(tables().advice["openvino"])
    return Machine(hardware, hardware.fingerprint, facts, features(hardware), rows, packages, advice, report.checks)


def _memory_of_cards(hardware: Hardware, uses: list[CardUse]) -> Iterator[Fact]:
    """What is free on each card, and who holds the rest."""
    for number, (gpu, use) in enumerate(zip(hardware.gpus, uses, strict=False)):
        text = f"{use.free / _GIB:.1f} of {gpu.memory / _GIB:.1f} GiB free"
        text += f"; held by {', '.join(use.holders)}" if use.holders else ""
        text += "; cut into MIG instances" if use.mig else ""
        yield _judged(f"memory of card {number}", text, use.free < 2 * _GIB, key="card memory")


def _torch_on(hardware: Hardware, report: CardReport) -> Iterator[Fact]:
    """Whether torch sees the cards, and why not."""
    if not (report.torch or report.fault):
        return
    name, advice, visible = "torch on cards", tables().advice, os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(hardware.gpus)
    text = f"torch {report.torch} for CUDA {report.cuda}, sees {report.cards} of {there}"
    if not report.torch:
        yield Fact(name, f"the self-test ended: {report.fault}", "bad", "; ".join(_mends(report.fault)))
    elif not report.cuda:
        yield Fact(name, f"torch {report.torch} is a build for the processor", "bad", advice["torch cpu build"])
    elif report.cards < there and visible is not None:
        told = advice["hidden cards"].format(visible=visible)
        yield Fact(name, f"{text}: CUDA_VISIBLE_DEVICES={visible}", "warn" if report.cards else "bad", told)
    elif report.cards < there:
        yield Fact(name, f"{text}: {report.fault}", "bad", "; ".join(_mends(report.fault)) or advice["unseen cards"])
    else:
        yield Fact(name, text)


def _mends(fault: str) -> list[str]:
    """What to do about a fault that the catalog knows."""
    return explain(fault)[0].mend if fault and explain(fault) else []


def _lacking() -> Iterator[str]:
    """What a machine with a card could have, and what it would bring."""
    for row in tables().card:
        if not version(row.package) and (not row.beside or version(row.beside)):
            yield f"{row.brings}: pip install {row.pip}"


def _judged(name: str, value: str, trouble: bool, *, key: str = "", **facts: object) -> Fact:
    """A fact with the catalog's advice under `key` (its name, where that is empty) if there is trouble."""
    return Fact(name, value, "warn", tables().advice[key or name].format(**facts)) if trouble else Fact(name, value)


def _facts(hardware: Hardware) -> Iterator[Fact]:
    cores = hardware.cores
    yield Fact("processor", f"{hardware.processor} ({hardware.machine})")
    yield _cores(hardware)
    for gpu in hardware.gpus:
        detail = f"{gpu.memory / _GIB:.0f} GiB, compute capability {gpu.capability}, driver {gpu.driver}"
        yield Fact("gpu", f"{gpu.name}, {detail}")
    if not hardware.gpus:
        yield Fact("gpu", "none (nvidia-smi lists no card)")
    given = {name: os.environ[name] for name in THREAD_VARIABLES if os.environ.get(name)}
    over = next((name for name, value in given.items() if value.isdigit() and int(value) > cores), "")
    text = ", ".join(f"{name}={value}" for name, value in given.items()) or f"libraries' choice ({cores})"
    yield _judged("threads", text, bool(over), variable=over, cores=cores)
    load, free = os.getloadavg()[0], free_memory()
    yield _judged("load", f"{load:.1f} in the last minute", load > cores / 2)
    yield _judged("memory", f"{hardware.memory / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free", free < 2 * _GIB)
    try:
        usage = shutil.disk_usage(_SHM)
    except OSError:
        yield Fact(_SHM, "not there", "bad", tables().advice["no /dev/shm"])
    else:
        text = f"{usage.total / _GIB:.2f} GiB, {usage.free / _GIB:.2f} GiB free"
        yield _judged(_SHM, text, usage.free < _GIB / 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _judged("open files", str(soft), soft < 1024, most=min(hard, 65536))
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    yield _judged(f"disk {folder}", f"{free / _GIB:.0f} GiB free", free < 5 * _GIB, key="disk")
    system = f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}"
    yield Fact("python", f"{platform.python_version()} on {system}".strip())
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    yield _judged("c++ compiler", compiler or "none", not compiler)


def _cores(hardware: Hardware) -> Fact:
    logical = os.cpu_count() or hardware.cores
    physical = psutil.cpu_count(logical=False) or logical
    pinned = sorted(os.sched_getaffinity(0))
    text = f"{hardware.cores} usable of {logical} logical, {physical} physical"
    if len(pinned) < logical:
        text += f"; pinned to {_ranges(pinned)}"
    granted = quota() or len(pinned)
    short, threads = granted < len(pinned), max(1, int(granted))
    text += f"; quota {granted:g}" if short else ""
    return _judged("cores", text, short, granted=granted, pinned=len(pinned), threads=threads)


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2,5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(map(str, span)) for span in spans)


def features(hardware: Hardware) -> list[Feature]:
    """All features that matter on this architecture, present or not."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(hardware.machine, hardware.machine)
    uses = tables().features.get(machine, {})
    found = [Feature(name, name in hardware.features, use) for name, use in uses.items()]
    return [*found, *(feature for gpu in hardware.gpus for feature in tensor_cores(gpu))]


def tensor_cores(gpu: Gpu) -> list[Feature]:
    """The number formats of a card's Tensor Cores, by its compute capability."""
    try:
        capability = float(gpu.capability)
    except ValueError:
        return []
    first, uses = tables().capability, tables().features["tensor_cores"]
    return [Feature(formats, capability >= first[formats], use, gpu.name) for formats, use in uses.items()]


def fast_formats(hardware: Hardware) -> dict[str, str]:
    """Which of int8, bf16 and fp16 this machine computes faster than fp32, each with the feature that does it."""
    fast = tables().fast
    found = {kind: next((name for name in names if name in hardware.features), "") for kind, names in fast.items()}
    for gpu in hardware.gpus:
        for feature in tensor_cores(gpu):
            for kind in feature.name.split("/"):
                if feature.present and kind in found:
                    found[kind] = f"Tensor Cores of {gpu.name}"
    return {kind: by for kind, by in found.items() if by}
