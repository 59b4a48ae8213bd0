"""Metrics in Prometheus' text format: Triton's names where it has one, our own for what it does not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from torchship.serve.engine.line import Line
from torchship.serve.engine.station import Station
from torchship.serve.machine import gauges
from torchship.serve.metrics import BUCKETS_MS, LineMeter

_EXACT = 64
_Labels = tuple[tuple[str, str], ...]


class _Family(NamedTuple):
    name: str
    kind: str
    about: str
    samples: Callable[[Line], Iterable[tuple[_Labels, float]]]


def _plain(read: Callable[[Line], float]) -> Callable[[Line], Iterable[tuple[_Labels, float]]]:
    return lambda line: [((), read(line))]


def _failures(line: Line) -> Iterable[tuple[_Labels, float]]:
    for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER"):
        yield (("reason", reason),), line.meter.failures.get(reason, 0)


def _stations(read: Callable[[Station], float]) -> Callable[[Line], Iterable[tuple[_Labels, float]]]:
    return lambda line: [((("stage", node.station.name),), read(node.station)) for node in line.nodes]


def _batches(line: Line) -> Iterable[tuple[_Labels, float]]:
    """Above 64 rows sizes are told as the power of two that holds them: a label has few values."""
    for node in line.nodes:
        counts: dict[int, int] = {}
        for size, batch in sorted(node.station.meter.batches.items()):
            told = size if size <= _EXACT else 1 << (size - 1).bit_length()
            counts[told] = counts.get(told, 0) + batch.calls
        for size, calls in counts.items():
            yield (("stage", node.station.name), ("rows", str(size))), calls


def _slots(station: Station, *, used: bool) -> int:
    return sum(len(replica.in_flight) if used else replica.slots for replica in station.replicas)


def _sum(name: str) -> Callable[[Line], Iterable[tuple[_Labels, float]]]:
    return _plain(lambda line: round(1e6 * sum(getattr(node.station.meter, name) for node in line.nodes)))


_FAMILIES = (
    _Family("nv_inference_request_success", "counter", "Requests answered", _plain(lambda line: line.meter.success)),
    _Family("nv_inference_request_failure", "counter", "Requests without an answer, by reason", _failures),
    _Family("nv_inference_count", "counter", "Rows answered", _plain(lambda line: line.meter.rows)),
    _Family(
        "nv_inference_exec_count",
        "counter",
        "Calls of the model, each with a batch",
        _plain(lambda line: line.executions),
    ),
    _Family(
        "nv_inference_pending_request_count",
        "gauge",
        "Requests on the line",
        _plain(lambda line: line.admission.jobs),
    ),
    _Family(
        "nv_inference_request_duration_us",
        "counter",
        "From arrival to answer, summed over requests",
        _plain(lambda line: round(1e6 * line.meter.seconds)),
    ),
    _Family("nv_inference_queue_duration_us", "counter", "Waiting, summed over requests", _sum("queued")),
    _Family("nv_inference_compute_input_duration_us", "counter", "Handing over, summed", _sum("packing")),
    _Family("nv_inference_compute_infer_duration_us", "counter", "Running, summed over requests", _sum("running")),
    _Family("nv_inference_compute_output_duration_us", "counter", "Collecting, summed over requests", _sum("passing")),
    _Family("torchship_queue_rows", "gauge", "Rows that wait", _stations(lambda s: s.queue.rows)),
    _Family("torchship_stage_rows_total", "counter", "Rows run", _stations(lambda s: s.meter.rows)),
    _Family("torchship_stage_calls_total", "counter", "Calls", _stations(lambda s: s.meter.calls)),
    _Family(
        "torchship_stage_seconds_total",
        "counter",
        "Seconds that calls took",
        _stations(lambda s: sum(batch.running for batch in s.meter.batches.values())),
    ),
    _Family("torchship_batches_total", "counter", "Calls by their number of rows", _batches),
    _Family("torchship_worker_restarts_total", "counter", "Workers replaced", _stations(lambda s: s.meter.restarts)),
    _Family(
        "torchship_workers_ready",
        "gauge",
        "Workers that can take a batch",
        _stations(lambda s: sum(replica.state == "ready" for replica in s.replicas)),
    ),
    _Family("torchship_arena_slots", "gauge", "Slots of shared memory", _stations(lambda s: _slots(s, used=False))),
    _Family("torchship_arena_slots_used", "gauge", "Slots with a batch", _stations(lambda s: _slots(s, used=True))),
    _Family(
        "torchship_arena_bytes",
        "gauge",
        "Shared memory reserved",
        _stations(lambda s: sum(replica.shared for replica in s.replicas)),
    ),
    _Family(
        "torchship_workers_resident_bytes",
        "gauge",
        "Memory of the workers",
        _stations(lambda s: sum(replica.size for replica in s.replicas)),
    ),
)


def render(lines: Mapping[tuple[str, str], Line]) -> str:
    """Everything about these lines, by model and version."""
    text: list[str] = []
    for family in _FAMILIES:
        text += [f"# HELP {family.name} {family.about}", f"# TYPE {family.name} {family.kind}"]
        for (model, version), line in lines.items():
            where = (("model", model), ("version", version))
            text += [_sample(family.name, (*where, *labels), value) for labels, value in family.samples(line)]
    name = "nv_inference_first_response_histogram_ms"
    text += [f"# HELP {name} From arrival to the answer", f"# TYPE {name} histogram"]
    for (model, version), line in lines.items():
        text += _histogram(name, (("model", model), ("version", version)), line.meter)
    for name, found in groupby(sorted(gauges()), key=attrgetter("name")):
        for place, gauge in enumerate(found):
            text += [f"# HELP {name} {gauge.about}", f"# TYPE {name} gauge"] * (not place)
            text.append(f"{name}{{{gauge.labels}}} {gauge.value}" if gauge.labels else f"{name} {gauge.value}")
    return "\n".join(text) + "\n"


def _histogram(name: str, labels: _Labels, meter: LineMeter) -> Iterable[str]:
    total = 0
    for bound, count in zip((*map(str, BUCKETS_MS), "+Inf"), meter.histogram, strict=True):
        total += count
        yield _sample(f"{name}_bucket", (*labels, ("le", bound)), total)
    yield _sample(f"{name}_sum", labels, round(meter.seconds * 1e3, 3))
    yield _sample(f"{name}_count", labels, total)


def _sample(name: str, labels: _Labels, value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{inside}}} {value:g}" if isinstance(value, float) else f"{name}{{{inside}}} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
