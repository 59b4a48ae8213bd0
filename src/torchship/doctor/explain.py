"""Explains classic run-time failures from an exception or a log: what happened, and what to change. Needs no torch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping

import msgspec

from torchship.doctor import catalog, failure
from torchship.hardware import here, version

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Explanation(msgspec.Struct, frozen=True):
    """What a failure means; `mend` is what to do, best first; `line` is the line of the log that gave it away."""

    name: str
    words: str
    mend: list[str]
    line: str


def explain(fault: BaseException | str) -> list[Explanation]:
    """What an exception, or the text of a log, means: every known failure in it, the most telling first.

    Empty when nothing is known.
    """
    text = fault if isinstance(fault, str) else failure.of(fault).text
    matches = [(row, found) for row in catalog.tables().failure if (found := row.search(text))]
    facts = _machine() if matches else {}
    return [_explained(row, found, text, facts) for row, found in matches]


def _explained(row: catalog.Row, found: re.Match[str], text: str, facts: Mapping[str, str | None]) -> Explanation:
    start = text.rfind("\n", 0, found.start()) + 1
    end = text.find("\n", found.start())
    line = text[start : end if end >= 0 else len(text)].strip()
    facts = {**facts, **found.groupdict(), **_cuda_memory(text[max(0, start - 2000) : found.end() + 2000])}
    filled = (_filled(words, facts) for words in row.fix)
    return Explanation(row.name, row.why, [words for words in filled if words], line[:300])


def _filled(words: str, facts: Mapping[str, str | None]) -> str:
    """Advice with its `{fact}`s, and of `{some facts}` those that are known; empty where none of them is."""
    wanted = re.findall(r"\{([\w ]+)\}", words)
    known = [", ".join(filter(None, map(facts.get, names.split()))) for names in wanted]
    return re.sub(r"\{[\w ]+\}", lambda _: known.pop(0), words) if all(known) else ""


def _machine() -> dict[str, str | None]:
    """What advice quotes of this machine."""
    hardware = here()
    try:
        usage = shutil.disk_usage("/dev/shm")  # noqa: S108  # only its size is read
        shared_memory = f"shared memory here: {_gib(usage.total)}, {_gib(usage.free)} free"
    except OSError:
        shared_memory = "there is no /dev/shm here: mount a tmpfs on it"
    return {
        "cores": str(hardware.cores),
        "memory": _gib(hardware.memory),
        "features": ", ".join(hardware.features) or "none that torchship knows",
        "driver": next((gpu.driver for gpu in hardware.gpus), None),
        "shared_memory": shared_memory,
    } | {name: f"{name} {number}" for name in ("numpy", *catalog.PACKAGES) if (number := version(name))}


def _cuda_memory(text: str) -> dict[str, str]:
    """From what torch says was wanted, free, in use and reserved: what there is room for, and a batch that fits."""
    wanted, free = _bytes(text, "Tried to allocate "), _bytes(text, "of which ")
    used, idle = _bytes(text, "Of the allocated memory "), _bytes(text, "PyTorch, and ")
    facts: dict[str, str] = {}
    needed, room = used + wanted, used + free + idle
    if wanted and used and room < needed:
        share, batch = room / needed * 0.9, re.search(r"batch(?:[ _-]size)?\s*[=:]\s*(\d+)", text, re.I)
        facts |= {"needed": _gib(needed), "room": _gib(room)}
        facts |= (
            {"batch": batch[1], "fits": f"{max(1, int(int(batch[1]) * share))}"} if batch else {"share": f"{share:.0%}"}
        )
    if 0 < wanted < idle:
        facts["idle"] = _gib(idle)
    if used:
        facts |= {"used": _gib(used), "half": _gib(used / 2)}
    return facts


def _bytes(text: str, before: str) -> int:
    """The size behind some words; 0 where they are not there."""
    found = re.search(before + r"(\d+(?:\.\d+)?)\s*([KMG]i?B|bytes)", text)
    return int(float(found[1]) * _UNITS.get(found[2], 1)) if found else 0


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.0f} MiB"
